"""Compare whole runs of SAC in dynajax with SBX (Stable-Baselines3 in JAX), on one core.

    python3.11 -m venv sbx
    sbx/bin/pip install torch sbx-rl==0.28.0 dm_control "mujoco<4"
    taskset -c 0 python results/scripts/beside_sbx.py --python=sbx/bin/python --out=comparison

Writes CACHE_UPDATES.csv, a line for each pair of runs; see `whole_runs`. beside.py computes the ratios.
"""

from collections.abc import Sequence

from absl import flags

import whole_runs
from dynajax.cli import common

flags.adopt_module_key_flags(whole_runs)


def main(argv: Sequence[str]) -> None:
    """Time both codes."""
    whole_runs.compare("sbx-rl", "theirs_sbx.py", "jax", "dm_control", "mujoco")


if __name__ == "__main__":
    common.run(main)
