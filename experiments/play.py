"""Play episodes with a trained policy and print their returns.

  python experiments/play.py runs/cheetah-run-...

This is `dynajax play`; `--help` lists its flags.
"""

from dynajax.cli import common
from dynajax.cli.play import main

if __name__ == "__main__":
    common.run(main)
