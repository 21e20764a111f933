"""Compile the programs of a run for a device that you do not have, and report their cost.

  python experiments/ahead.py --device=h100 --env=humanoid-run --preset=paper --seeds=6

This is `dynajax ahead`; `--help` lists its flags.
"""

from dynajax.cli import common
from dynajax.cli.ahead import main

if __name__ == "__main__":
    common.run(main)
