"""Import MuJoCo even if no OpenGL library is installed, since training does not render.

`import mujoco` loads the OpenGL library that the environment variable MUJOCO_GL names, and fails if
that library is missing.
"""

import os
import sys

__all__ = ["mujoco", "remove_modules"]


def remove_modules(*packages: str) -> None:
    """Remove partially imported packages from `sys.modules`, so that they can be imported again."""
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]


try:
    import mujoco
except Exception:  # The type depends on which OpenGL library is missing.
    remove_modules("mujoco", "OpenGL")
    os.environ["MUJOCO_GL"] = "disabled"
    import mujoco
