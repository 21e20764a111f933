"""Compare runs: learning curves, final returns relative to a base, and a table.

  python experiments/plot.py runs/cheetah-run-* --out=comparison

This is `dynajax plot`; `--help` lists its flags.
"""

from dynajax.cli import common
from dynajax.cli.plot import main

if __name__ == "__main__":
    common.run(main)
