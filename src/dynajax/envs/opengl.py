"""MuJoCo, imported so that a missing OpenGL library stops nobody who draws nothing.

`import mujoco` takes the library that the variable MUJOCO_GL names, and fails where it is missing.
"""

import os
import sys

__all__ = ["forget", "mujoco"]


def forget(*packages: str) -> None:
    """Lets packages that were imported in part be imported again."""
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]


try:
    import mujoco
except Exception:  # whatever a missing library raises
    forget("mujoco", "OpenGL")
    os.environ["MUJOCO_GL"] = "disabled"
    import mujoco
