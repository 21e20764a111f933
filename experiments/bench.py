"""Measures the machine, every stage of training, and a whole environment step.

  python experiments/bench.py --env=cheetah-run --rows=1,2

The same as `dynajax bench`; `--help` says the rest.
"""

from dynajax.cli import common
from dynajax.cli.bench import main

if __name__ == "__main__":
    common.run(main)
