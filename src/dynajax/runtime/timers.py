"""Wall-clock time of a run by stage."""

import contextlib
import time
from collections.abc import Iterator, Mapping

#: Stages of a run; "start" is the first state of learners and environments, or restoring it.
STAGES = ("start", "compile", "act", "environment", "update", "fit", "evaluate", "checkpoint")


class Clock:
    """Seconds by stage and in total since the run began, earlier processes of the run included."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._earlier = 0.0
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time spent inside the `with` statement to a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin

    def stages(self) -> dict[str, float]:
        """Return the seconds by stage, with "other" for the rest; they sum to the run's total."""
        total = self._earlier + time.perf_counter() - self._begin
        return {**self.seconds, "other": total - sum(self.seconds.values())}

    def restore(self, stages: Mapping[str, float]) -> None:
        """Continue from the seconds that an earlier process returned from `stages`."""
        self._earlier = sum(stages.values())
        # An earlier version may have had fewer stages.
        self.seconds.update({name: stages.get(name, 0.0) for name in STAGES})
