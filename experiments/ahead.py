"""Compiles a run's programs for a device that is not here, and says what they would take.

  python experiments/ahead.py --device=h100 --env=humanoid-run --preset=paper --seeds=6

The same as `dynajax ahead`; `--help` says the rest.
"""

from dynajax.cli import common
from dynajax.cli.ahead import main

if __name__ == "__main__":
    common.run(main)
