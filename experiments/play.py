"""Plays episodes with a trained policy, and says what they return.

  python experiments/play.py runs/cheetah-run-...

The same as `dynajax play`; `--help` says the rest.
"""

from dynajax.cli import common
from dynajax.cli.play import main

if __name__ == "__main__":
    common.run(main)
