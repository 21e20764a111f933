"""Trains SAC or MBPO, with or without the fixes, on a dm_control or Gymnasium task.

  python experiments/run.py --env=cheetah-run --fix=scale,target

The same as `dynajax train`; `--help` says the rest.
"""

from dynajax.cli import common
from dynajax.cli.train import main

if __name__ == "__main__":
    common.run(main)
