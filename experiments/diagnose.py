"""Measures what synthetic data can be of a task, before training or of a run, on one page.

  python experiments/diagnose.py --env=humanoid-stand

The same as `dynajax diagnose`; `--help` says the rest.
"""

from dynajax.cli import common
from dynajax.cli.diagnose import main

if __name__ == "__main__":
    common.run(main)
