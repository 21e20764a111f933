"""Wall-clock time of a run by stage."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping

from jax import monitoring

#: The stages of a run, each with its meaning in words for a summary.
STAGES = {
    "imports": "imports",
    "setup": "environments and start",
    "init": "initial weights and buffers",
    "compile": "compilation",
    "act": "choosing actions",
    "environment": "environment",
    "insert": "storing transitions",
    "update": "agent updates and rollouts",
    "fit": "model fits",
    "evaluate": "evaluation",
    "logs": "logs",
    "checkpoint": "checkpoints and policies",
    "report": "report",
    "other": "other",
}
#: Tracing, lowering, and compiling a program or reading it from the compilation cache.
_COMPILATION = "/jax/core/compile/"


class _Compilation(threading.local):
    """Seconds that JAX has spent on compilation in the current thread.

    JAX reports the duration of each part when it ends. Parts of an inner function lie within those
    of the outer one, so the time is that of the union of all intervals.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._intervals: list[tuple[float, float]] = []  # disjoint, in the order of time

    def listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Add the interval of a part of the compilation that has just ended."""
        if not event.startswith(_COMPILATION):
            return
        end = time.perf_counter()
        begin = end - duration_secs
        while self._intervals and self._intervals[-1][1] > begin:
            earlier = self._intervals.pop()
            self.seconds -= earlier[1] - earlier[0]
            begin = min(begin, earlier[0])
        self._intervals.append((begin, end))
        self.seconds += end - begin


_compilation = _Compilation()
monitoring.register_event_duration_secs_listener(_compilation.listen)


class Clock:
    """Seconds by stage since the run began, earlier processes of the run included.

    At each moment one stage is timed: the innermost `with` statement's, or else that of
    `time_rest_as`, at first "imports". What JAX compiles meanwhile counts as "compile". The stages
    therefore sum to the wall time.

    Args:
      begin: `time.perf_counter()` at the beginning of the process; by default it is now.
    """

    def __init__(self, begin: float | None = None) -> None:
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._stages = ["imports"]  # that of the rest, then those of the `with` statements
        self._last = time.perf_counter() if begin is None else begin
        self._compiled = _compilation.seconds

    def _add_elapsed(self) -> None:
        """Add the time since the previous call to the current stage."""
        now, compiled = time.perf_counter(), _compilation.seconds
        elapsed = now - self._last
        compile_seconds = min(compiled - self._compiled, elapsed)
        self._seconds["compile"] += compile_seconds
        self._seconds[self._stages[-1]] += elapsed - compile_seconds
        self._last, self._compiled = now, compiled

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what happens inside the `with` statement as a stage, one of `STAGES`."""
        self._add_elapsed()
        self._stages.append(stage)
        try:
            yield
        finally:
            self._add_elapsed()
            self._stages.pop()

    def time_rest_as(self, stage: str) -> None:
        """Time what happens outside of `with` statements as a stage from now on."""
        self._add_elapsed()
        self._stages[0] = stage

    def stages(self) -> dict[str, float]:
        """Return the seconds of each stage that took time; they sum to the run's wall time."""
        self._add_elapsed()
        return {name: seconds for name, seconds in self._seconds.items() if seconds}

    def restore(self, stages: Mapping[str, float]) -> None:
        """Add the seconds that an earlier process returned from `stages`."""
        for name, seconds in stages.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
