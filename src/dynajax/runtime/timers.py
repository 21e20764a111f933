"""Where a run's time goes."""

import contextlib
import time
from collections.abc import Iterator, Mapping

STAGES = ("compile", "environment", "update", "fit", "evaluate", "checkpoint")


class Clock:
    """Seconds by stage, and in all, since the run began; earlier processes of it are included."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._earlier = 0.0
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Counts what happens inside as time of this stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin

    def stages(self) -> dict[str, float]:
        """Seconds by stage, what belongs to none as "other"; in all, since the run began."""
        total = self._earlier + time.perf_counter() - self._begin
        return {**self.seconds, "other": total - sum(self.seconds.values())}

    def restore(self, stages: Mapping[str, float]) -> None:
        """Goes on from what an earlier process had counted."""
        self._earlier = sum(stages.values())
        self.seconds.update({name: stages[name] for name in STAGES})
