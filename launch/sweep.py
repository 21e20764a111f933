"""Complete every run of a study file, on this machine or on a cluster.

  python launch/sweep.py launch/studies/tiny.toml

This is `dynajax sweep`; `--help` lists its flags.
"""

from dynajax.cli import common
from dynajax.cli.sweep import main

if __name__ == "__main__":
    common.run(main)
