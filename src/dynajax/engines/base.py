"""The interface of an engine: it runs the environments and schedules acting and learning."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from dynajax.types import Evaluation, Metrics, TrainState


class Engine(Protocol):
    """The environments of this process's learners.

    All engines do the same operations in the same order.
    """

    dropped: np.ndarray  # (S,) transitions of the run that were not finite
    frames: np.ndarray  # (S,) simulator steps of the run; as of the last evaluation or `progress`

    host_memory: int  # bytes that the environments need on the host

    def memory(self) -> int:
        """Compile the large programs, and return the bytes that the largest needs on each device.

        It is remembered with the programs: a second run of the same configuration compiles nothing.
        """

    def start(self) -> None:
        """Begin episode 0 of every learner."""

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics, int]:
        """Act, and learn from the previous transition, for one agent step or more.

        Args:
          state: the training state.
          step: agent steps done so far.

        Returns:
          The state, the metrics (S,) of the last step that learned (empty if none did), and the
          number of steps done by this call.
        """

    def evaluate(
        self, state: TrainState, step: int, check: Callable[[], None] | None = None
    ) -> Evaluation:
        """Run episodes with the deterministic policy, and estimate the value of their starts.

        Args:
          state: the training state.
          step: agent steps done so far.
          check: is called while the episodes run, and may raise `signals.Interrupted`. The
            evaluation can then be repeated with the same result.
        """

    def value_ranges(self, state: TrainState) -> np.ndarray:
        """Return the ranges of the first observations and rewards.

        Returns:
          (S, 3, D + 1) float64: smallest and largest values, and largest changes in one step; the
          reward is the last entry. NaN or an empty range stands for no finite value.
        """

    def train_returns(self) -> np.ndarray:
        """Return the mean return (S,) of the training episodes that ended in the interval.

        It is called once in each interval. Entries are NaN where no episode ended.
        """

    def progress(self) -> dict[str, np.ndarray]:
        """Return everything that is needed to resume, besides the `TrainState`."""

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Restore what `progress` returned."""

    def close(self) -> None:
        """Release the processes and files that the engine holds."""
