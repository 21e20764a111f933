"""Write the report of a run that is finished, still training, or was interrupted.

  python experiments/report.py runs/cheetah-run-...

This is `dynajax report`; `--help` lists its flags.
"""

from dynajax.cli import common
from dynajax.cli.report import main

if __name__ == "__main__":
    common.run(main)
