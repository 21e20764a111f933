"""Checks of the real transitions of a run, once in each interval between two evaluations."""

from collections.abc import Iterator

import numpy as np

from dynajax import schedule
from dynajax.engines.base import Engine
from dynajax.envs import checks, terminations
from dynajax.runtime import distributed
from dynajax.runtime.program import Program
from dynajax.types import TrainState


class DataChecks:
    """Compare what a task returns with what the learners assume; each warning is given once.

    An interval costs one call of the task's termination function on its transitions. The ranges of
    observations and rewards are read once.

    Args:
      program: the run's; its termination function is checked if there is a model.
      step: agent step from which on transitions are checked.
    """

    def __init__(self, program: Program, step: int) -> None:
        self._program, self._step = program, step
        self._check_ranges = True
        self._counts = terminations.Counts(*np.zeros((4, program.config.num_learners), int))
        self._warned = False

    def __call__(self, engine: Engine, state: TrainState, step: int) -> Iterator[str]:
        """Yield warnings about the transitions up to an agent step.

        Raises:
          UsageError: see `terminations.compare`.
        """
        config, spec = self._program.config, self._program.spec
        if config.has_model:
            counts = self._count(state, step)
            message = terminations.compare(spec.name, spec.termination, counts)
            if message and not self._warned:
                self._warned = True
                yield message
        # Fewer observations would show less than their ranges.
        if self._check_ranges and schedule.random_steps_done(config, step):
            self._check_ranges = False
            ranges = distributed.gather(engine.value_ranges(state), config.num_learners)
            message = checks.precision_warning(spec.name, spec.obs_names, ranges)
            if message:
                yield message
        self._step = step

    def _count(self, state: TrainState, step: int) -> terminations.Counts:
        """Return the counts of the run with those since the last call, (S,) each."""
        program = self._program
        # All calls but the first and the last are for equally many steps, so that one program does.
        slots = np.arange(step - program.config.eval.every, step) - 1
        oldest = step - 1 - program.config.replay.real
        slots[slots < max(self._step - 1, oldest, 0)] = -1
        counts = program.placement.unpad(program.count_terminations(state, slots.astype(np.int32)))
        counts = distributed.gather(counts, program.config.num_learners)
        self._counts = terminations.Counts(
            *(total + np.asarray(new, int) for total, new in zip(self._counts, counts, strict=True))
        )
        return self._counts
