"""Plays episodes with a trained policy, and says what they return.

  python experiments/play.py runs/cheetah-run-...

The same as `dynajax play`; `--help` says the rest.
"""

from dynajax import cli
from dynajax.commands.play import main

if __name__ == "__main__":
    cli.run(main)
