"""Lays runs side by side: learning curves, final returns relative to a base, and a table.

  python experiments/plot.py runs/cheetah-run-* --out=comparison

The same as `dynajax plot`; `--help` says the rest.
"""

from dynajax.cli import common
from dynajax.cli.plot import main

if __name__ == "__main__":
    common.run(main)
