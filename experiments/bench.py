"""Measure the machine, every stage of training, and a whole environment step.

  python experiments/bench.py --env=cheetah-run --learners=1,2

This is `dynajax bench`; `--help` lists its flags.
"""

from dynajax.cli import common
from dynajax.cli.bench import main

if __name__ == "__main__":
    common.run(main)
