"""Test learners on several devices."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_several_devices():
    """Run `on_devices.py` in a process that splits the host's CPU into four devices."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            HERE / "on_devices.py",
        ],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
