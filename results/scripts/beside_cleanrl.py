"""Compare whole runs of SAC in dynajax with CleanRL (PyTorch), on one core.

    python3.10 -m venv cleanrl  # its package needs a Python before 3.11
    cleanrl/bin/pip install "setuptools<66" "wheel<0.38" "numpy<2" torch tensorboard pandas matplotlib
    cleanrl/bin/pip install --no-build-isolation gym==0.23.1
    cleanrl/bin/pip install --no-deps stable-baselines3==1.2.0 cleanrl==1.2.0 labmaze mujoco==3.3.3 \\
      dm_control==1.0.31
    cleanrl/bin/pip install "numpy<2" dm-env dm-tree glfw lxml protobuf pyopengl pyparsing requests scipy \\
      tqdm "etils[epath]"
    taskset -c 0 python results/scripts/beside_cleanrl.py --python=cleanrl/bin/python --out=comparison

Writes CACHE_UPDATES.csv, a line for each pair of runs; see `whole_runs`. beside.py computes the ratios.
CleanRL's networks are 256 wide, and it takes one update per environment step.
"""

from collections.abc import Sequence

from absl import flags

import whole_runs
from dynajax import UsageError
from dynajax.cli import common

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(whole_runs)


def main(argv: Sequence[str]) -> None:
    """Time both codes."""
    if (FLAGS.updates, FLAGS.width) != (1, 256):
        raise UsageError("CleanRL has one update per step, and networks 256 wide: leave both flags")
    whole_runs.compare("cleanrl", "theirs_cleanrl.py", "torch", "dm_control", "mujoco")


if __name__ == "__main__":
    common.run(main)
