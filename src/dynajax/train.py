"""The order of things: dyna-style training of all rows, from one log to the next."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import numpy as np

from dynajax import envs
from dynajax.config import Config, config_of, run_name
from dynajax.engines.evaluate import Evaluation, Evaluator
from dynajax.engines.mjx import DeviceEngine
from dynajax.engines.oracle import Oracle
from dynajax.envs.host import HostEnvs
from dynajax.record.journal import Journal, interruptions
from dynajax.runtime.placement import place
from dynajax.runtime.program import Program, build
from dynajax.types import EnvSpec, TrainState, Transition


class Engine(Protocol):
    """Where environments run. Both engines do the same things in the same order."""

    dropped: np.ndarray  # (S,) transitions that were not finite

    def lower(self) -> list[jax.stages.Lowered]:
        """The large programs, before they are compiled."""

    def start(self) -> None:
        """Begins episode 0 of every row."""

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Goes back to an earlier `progress`."""

    def progress(self) -> dict[str, np.ndarray]:
        """All that it takes to go on from here, beside the `TrainState`."""

    def run(
        self, state: TrainState, step: int, journal: Journal, interrupted: Callable[[], bool]
    ) -> tuple[TrainState, int, Evaluation | None]:
        """Trains until an evaluation is done, or an interruption."""

    def pop_finished(self) -> list[tuple[int, float, int]]:
        """(row, return, length) of the episodes that ended since the last call."""

    def close(self) -> None:
        """Ends what the engine started."""


class HostEngine(HostEnvs):
    """Environments in C MuJoCo or Gymnasium, beside the device."""

    def __init__(self, config: Config, spec: EnvSpec, program: Program):
        seeds = [seed for _, seed in program.placement.pairs]
        super().__init__(config, spec, seeds)
        discounts = [
            config_of(config, config.variants[i]).sac.discount for i, _ in program.placement.pairs
        ]
        self._evaluate = Evaluator(config, spec, seeds, discounts)
        self._config, self._program = config, program
        self._pending: tuple[Transition, np.ndarray] | None = None
        self._oracle = None if config.oracle == "none" else Oracle(config, seeds)

    def run(
        self, state: TrainState, step: int, journal: Journal, interrupted: Callable[[], bool]
    ) -> tuple[TrainState, int, Evaluation | None]:
        """Trains until an evaluation is done, or an interruption."""
        config, program = self._config, self._program
        for t in range(step, config.steps):
            learning = t - config.random_steps
            if learning > 0 and config.sac.reset_every and t % config.sac.reset_every == 0:
                state = program.reset_agent(state)
            if config.algo == "mbpo" and learning >= 0 and learning % config.model.fit_every == 0:
                state = journal.fit(t, program.fit, state)
            chosen = program.act(state, self.obs, t)

            # The device learns from the last transition while the environment takes this action.
            if self._pending is None:
                pass
            elif learning < 0:
                state = program.insert(state, *self._pending)
            elif self._oracle is None:
                state, metrics = program.learn(state, *self._pending)
                journal.learned(metrics)
            else:
                state, proposed = program.propose(state, *self._pending)
                told = self._oracle.correct(*program.placement.real(jax.device_get(proposed)))
                state, metrics = program.learn(state, *self._pending, told)
                journal.learned(metrics)

            with journal.clock("update"):
                action = program.placement.real(np.asarray(chosen))
            with journal.clock("environment"):
                if self._oracle is not None:
                    self._oracle.record(self.snapshot())
                self._pending = self.step(action)
            journal.stepped(t + 1)

            if (t + 1) % config.eval.every == 0:
                with journal.clock("evaluate"):
                    found = self._evaluate(self._greedy(state), t + 1)
                    values = np.asarray(program.value(state, found.starts))
                    return state, t + 1, found._replace(values=program.placement.real(values))
            if interrupted():
                return state, t + 1, None
        return state, config.steps, None

    def _greedy(self, state: TrainState) -> Callable[[np.ndarray], np.ndarray]:
        program = self._program
        return lambda obs: program.placement.real(np.asarray(program.greedy(state, obs)))

    def lower(self) -> list[jax.stages.Lowered]:
        """The large programs, before they are compiled."""
        return self._program.lower(self._config, self._spec)

    def progress(self) -> dict[str, np.ndarray]:
        """As in `HostEnvs`, with the transition that is not learned from yet."""
        assert self._pending is not None
        transition, valid = self._pending
        pending = {f"pending.{name}": value for name, value in transition._asdict().items()}
        told = {} if self._oracle is None else self._oracle.progress()
        return {**super().progress(), **pending, "pending.valid": valid, **told}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Goes back to an earlier `progress`; see `HostEnvs`."""
        pending = [progress[f"pending.{name}"] for name in Transition._fields]
        self._pending = Transition(*pending), progress["pending.valid"]
        super().restore(progress)
        if self._oracle is not None:
            self._oracle.restore(progress)

    def close(self) -> None:
        """Ends the environments and their processes."""
        super().close()
        self._evaluate.close()
        if self._oracle is not None:
            self._oracle.close()


ENGINES: dict[str, Callable[[Config, EnvSpec, Program], Engine]] = {
    "host": HostEngine,
    "mjx": DeviceEngine,
}


class Result(NamedTuple):
    """What `train` gives back; `report.read_run(folder)` has the curves as arrays."""

    config: Config
    folder: Path
    state: TrainState
    rows: range  # which of the run's rows it holds: all, unless there are several processes
    finished: bool  # False after an interruption


def train(
    config: Config,
    out: str | Path | None = None,
    *,
    command: str = "dynajax.train",
    quiet: bool = False,
    wandb: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Result:
    """Trains all rows of `config`, or goes on where an earlier call in the same folder stopped.

    Args:
      out: the run's folder; runs/<name of the configuration> if not given.
      command: what is written into config.json as the way to repeat the run.
      quiet: prints nothing.
      wandb: logs to Weights & Biases too.
      devices: those that share the rows; all local ones if not given.

    Raises:
      UsageError: with one line that says what to change.
    """
    folder = Path(out) if out is not None else Path("runs") / run_name(config)
    spec = envs.spec(config.env, time_limit=config.host.time_limit)
    program = build(config, spec, place(config, devices))
    with (
        interruptions() as interrupted,
        # First of all, because not every task runs on every engine.
        contextlib.closing(ENGINES[config.engine](config, spec, program)) as engine,
        Journal(folder, config, program, command, quiet, wandb) as journal,
    ):
        journal.compile(engine.lower)
        state, step = journal.restore(program.init, engine)
        while step < config.steps and not interrupted():
            state, step, evaluation = engine.run(state, step, journal, interrupted)
            if evaluation is not None:
                journal.evaluated(step, evaluation, engine)
            journal.save(step, state, engine)
    state = state._replace(rows=program.placement.real(state.rows))
    rows = program.placement.numbers
    return Result(config, folder, state, rows, finished=step >= config.steps)
