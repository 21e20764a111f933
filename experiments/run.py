"""Train SAC or MBPO, with or without the fixes, on a dm_control or Gymnasium task.

  python experiments/run.py --env=cheetah-run --fix=scale,target

This is `dynajax train`; `--help` lists its flags.
"""

from dynajax.cli import common
from dynajax.cli.train import main

if __name__ == "__main__":
    common.run(main)
