"""Where environments run: beside the device, or on it. `ENGINES` is the one place that lists them."""

from collections.abc import Callable

from dynajax.engines.base import Engine
from dynajax.engines.host import HostEngine
from dynajax.engines.mjx import DeviceEngine
from dynajax.runtime.clock import Clock
from dynajax.runtime.program import Program

__all__ = ["ENGINES", "Engine"]

ENGINES: dict[str, Callable[[Program, Clock], Engine]] = {
    "host": HostEngine,
    "mjx": DeviceEngine,
}
