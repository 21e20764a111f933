"""The host engine: environments in C MuJoCo or Gymnasium, outside the device."""

import contextlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from dynajax import schedule
from dynajax.config import variant_config
from dynajax.engines.evaluate import Evaluator
from dynajax.engines.oracle import Oracle, OracleProgram
from dynajax.envs.training_envs import TrainingEnvs
from dynajax.runtime.program import Program
from dynajax.runtime.timers import Clock
from dynajax.types import Evaluation, Metrics, TrainState, Transition
from dynajax.xla import backend


class HostEngine(TrainingEnvs):
    """Steps one agent step at a time; the device learns while the environments step.

    Raises:
      UsageError: the task's simulator cannot do what the configuration asks for.
    """

    def __init__(self, program: Program, clock: Clock):
        config, spec = program.config, program.spec
        seeds = [seed for _, seed in program.pairs]
        discounts = [
            variant_config(config, config.variants[index]).learn.discount
            for index, _ in program.pairs
        ]
        super().__init__(config, spec, seeds)
        with contextlib.ExitStack() as opened:
            opened.callback(super().close)
            self._evaluator = Evaluator(
                config,
                spec,
                seeds,
                discounts,
                training=self._vector_env if config.host.evaluate_on == "training" else None,
            )
            opened.callback(self._evaluator.close)
            self.host_memory = self._vector_env.memory + self._evaluator.memory
            self._config, self._program, self._clock = config, program, clock
            self._pending: tuple[Transition, np.ndarray] | None = None  # the next to learn from
            self._oracle: tuple[Oracle, OracleProgram] | None = None
            if config.oracle != "none":
                before = backend.resident_memory()
                oracle = opened.enter_context(contextlib.closing(Oracle(config, seeds)))
                self._oracle = oracle, OracleProgram(program)
                self.host_memory += max(0, backend.resident_memory() - before)
            self._opened = opened.pop_all()

    def memory(self) -> int:
        """Return the bytes that the largest program needs on each device; see `Engine`."""
        if self._oracle is not None:
            return backend.memory(self._oracle[1].lower())
        jitted = self._program.jitted
        if jitted.memory is None:
            jitted.memory = backend.memory(self._program.lower())
        return jitted.memory

    def advance(self, state: TrainState, step: int) -> tuple[TrainState, Metrics, int]:
        """Take one agent step; see `Engine`."""
        program, due = self._program, schedule.due(self._config, step)
        with self._clock("act"):
            chosen = program.act(program.acting_part(state), self.obs, step)
        metrics: Metrics = {}
        if self._pending is not None and due.insert:
            with self._clock("insert"):
                state = program.insert(state, *self._pending)
        elif self._pending is not None and due.learn:
            with self._clock("update"):
                state, metrics = self._learn(state, *self._pending)
        with self._clock("update"):
            action = program.placement.unpad(np.asarray(chosen))
        with self._clock("environment"):
            if self._oracle is not None:
                self._oracle[0].record(self.snapshot())
            self._pending = self.step(action)
        return state, metrics, 1

    def _learn(
        self, state: TrainState, transition: Transition, valid: np.ndarray
    ) -> tuple[TrainState, Metrics]:
        if self._oracle is None:
            return self._program.learn(state, transition, valid)
        oracle, program = self._oracle
        state, proposed = program.propose(state, transition, valid)
        proposed = self._program.placement.unpad(jax.device_get(proposed))
        return program.learn(state, oracle.correct(proposed))

    def evaluate(
        self, state: TrainState, step: int, check: Callable[[], None] | None = None
    ) -> Evaluation:
        """See `Engine`."""
        program = self._program
        acting = program.acting_part(state)

        def deterministic_action(obs: np.ndarray) -> np.ndarray:
            return program.placement.unpad(np.asarray(program.deterministic_action(acting, obs)))

        evaluation = self._evaluator(deterministic_action, step, check)
        if self._config.host.evaluate_on == "training":
            self.restart_episodes()
        values = program.placement.unpad(np.asarray(program.value(state, evaluation.starts)))
        return evaluation._replace(values=values)

    def train_returns(self) -> np.ndarray:
        """See `Engine`."""
        ended: list[list[float]] = [[] for _ in self._program.pairs]
        for row, score, _ in self.pop_finished():
            ended[row].append(score)
        return np.array([np.mean(scores) if scores else np.nan for scores in ended])

    def progress(self) -> dict[str, np.ndarray]:
        """Return the progress of `TrainingEnvs`, and the next transition to learn from."""
        pending: dict[str, np.ndarray] = {}
        if self._pending is not None:
            transition, valid = self._pending
            pending = {f"pending.{name}": value for name, value in transition._asdict().items()}
            pending["pending.valid"] = valid
        oracle = {} if self._oracle is None else self._oracle[0].progress()
        return {**super().progress(), **pending, **oracle}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Return to an earlier `progress`; see `TrainingEnvs`."""
        pending = [progress[f"pending.{name}"] for name in Transition._fields]
        self._pending = Transition(*pending), progress["pending.valid"]
        super().restore(progress)
        if self._oracle is not None:
            self._oracle[0].restore(progress)

    def close(self) -> None:
        """Close the environments and their processes."""
        self._opened.close()
