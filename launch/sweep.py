"""Runs a study: every run of a study file, here or on a cluster, until all of them are done.

  python launch/sweep.py launch/studies/tiny.toml

The same as `dynajax sweep`; `--help` says the rest.
"""

from dynajax.cli import common
from dynajax.cli.sweep import main

if __name__ == "__main__":
    common.run(main)
