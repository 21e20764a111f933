"""What an engine is: where the environments of all rows run, and in which steps they go on."""

from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np

from dynajax.types import Evaluation, Metrics, TrainState


class Engine(Protocol):
    """Environments of a process's rows. All engines do the same things in the same order."""

    dropped: np.ndarray  # (S,) transitions of the run that were not finite

    def lower(self) -> list[jax.stages.Lowered]:
        """The large programs, before they are compiled."""

    def start(self) -> None:
        """Begins episode 0 of every row."""

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics, int]:
        """Acts, and learns from what happened before, for one environment step or more.

        Args:
          step: environment steps done so far.

        Returns:
          The state, the figures (S,) of the last step that learned (empty if none did), and the
          steps done now.
        """

    def evaluate(self, state: TrainState, step: int) -> Evaluation:
        """Episodes with the deterministic policy, and what the critics say of their starts."""

    def train_returns(self) -> np.ndarray:
        """Mean return (S,) of the training episodes that ended since the last call, or NaN."""

    def progress(self) -> dict[str, np.ndarray]:
        """All that it takes to go on from here, beside the `TrainState`."""

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Goes back to an earlier `progress`."""

    def close(self) -> None:
        """Ends what the engine started."""
