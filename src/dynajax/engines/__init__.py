"""Where environments run: on the host, or on the device. `ENGINES` lists the engines."""

from collections.abc import Callable

from dynajax.engines.base import Engine
from dynajax.engines.device import DeviceEngine
from dynajax.engines.host import HostEngine
from dynajax.runtime.program import Program
from dynajax.runtime.timers import Clock

__all__ = ["ENGINES", "Engine"]

ENGINES: dict[str, Callable[[Program, Clock], Engine]] = {
    "host": HostEngine,
    "mjx": DeviceEngine,
}
