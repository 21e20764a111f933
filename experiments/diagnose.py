"""Measure what a model can learn of a task before training, or what went wrong in a run.

  python experiments/diagnose.py --env=humanoid-stand

This is `dynajax diagnose`; `--help` lists its flags.
"""

from dynajax.cli import common
from dynajax.cli.diagnose import main

if __name__ == "__main__":
    common.run(main)
