"""The book-keeping of a run: times, logs, checkpoints, and what the user is told."""

import contextlib
import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dynajax import compiler
from dynajax.config import Config, as_dict
from dynajax.engines.evaluate import Evaluation
from dynajax.record.checkpoint import Checkpoints, Restored
from dynajax.record.folder import RunFolder, device_name
from dynajax.record.loggers import Loggers, NoLoggers, Progress, duration
from dynajax.runtime import processes
from dynajax.runtime.program import HelpedFit, Program
from dynajax.types import Metrics, TrainState, UsageError

if TYPE_CHECKING:
    from dynajax.train import Engine

STAGES = ("compile", "environment", "update", "fit", "evaluate", "checkpoint")


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C and SIGTERM set a flag; yields the function that reads it.

    Several processes of a run set it for each other, see `processes.interruptions`.
    """
    if processes.several():
        with processes.interruptions() as interrupted:
            yield interrupted
        return
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    try:
        old = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread has handlers
        old = {}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Clock:
    """Seconds by stage, earlier processes of the same run included."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._earlier = 0.0
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin

    @property
    def total(self) -> float:
        return self._earlier + time.perf_counter() - self._begin

    def restore(self, total: float, seconds: dict[str, float]) -> None:
        self._earlier = total
        self.seconds.update(seconds)


class Journal:
    """Opens a run's folder, and keeps its logs and checkpoints; use it in a `with` statement.

    Args:
      folder: where.
      config: the run.
      program: the run's, for the shapes of its state and where the rows are.
      command: what to type to repeat the run.
      quiet: print nothing.
      wandb: log to Weights & Biases too.

    Raises:
      UsageError: the folder cannot be used, or the rows do not fit into memory.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        program: Program,
        command: str,
        quiet: bool,
        wandb: bool,
    ) -> None:
        self.clock = Clock()
        self._config, self._wandb, self._quiet = config, wandb, quiet
        self._placement = program.placement
        self._shapes = shapes = program.shapes()
        agent, model = shapes.rows.agent, shapes.rows.model
        nets = {"actor": agent.actor, "critic": agent.critic}
        if model is not None:
            nets["model"] = model.params
        # Every row has its own, so the sizes are those of one.
        sizes = {
            name: sum(leaf.size for leaf in jax.tree.leaves(net)) // program.placement.places
            for name, net in nets.items()
        }
        self._first = processes.first()
        self._path = folder
        self._info = {"command": command, "parameters": sizes}
        self._sizes = sizes
        self._metrics: Metrics = {}
        self._fits: list[tuple[int, Metrics]] = []
        self._needed = compiler.size(shapes) // program.placement.mesh.size
        self._learned, self._learned_before = 0, 0
        self._learning_since = 0.0

    def __enter__(self) -> "Journal":
        self._check_memory()
        self._stack = contextlib.ExitStack()
        checkpoints = self._path / "checkpoints"
        if processes.several():
            processes.check_same(json.dumps(as_dict(self._config)))
            checkpoints = checkpoints / f"process-{jax.process_index()}"
        if self._first:
            self._stack.enter_context(RunFolder(self._path, self._config, self._info))
        self._checkpoints = Checkpoints(
            checkpoints, self._config.eval.checkpoints, rows=self._placement.rows
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _check_memory(self) -> None:
        if self._needed > 0.9 * (there := compiler.available(self._placement.mesh.size)):
            raise UsageError(
                f"--seeds: {self._placement.each} rows on a device take "
                f"{self._needed / 2**30:.1f} GiB, and it has {there / 2**30:.1f}; take "
                "fewer seeds or variants, or lower "
                "--set replay.real and replay.synthetic"
            )

    def compile(self, lower: Callable[[], Sequence[jax.stages.Lowered]]) -> None:
        """Compiles the large programs, which also tells how much memory they take.

        Raises:
          UsageError: more than there is.
        """
        if (self._checkpoints.latest_step() or 0) >= self._config.steps:
            return  # nothing is left to run
        with self.clock("compile"):
            self._needed = compiler.memory(lower())
        self._check_memory()

    def restore(self, init: Callable[[], TrainState], engine: "Engine") -> tuple[TrainState, int]:
        """The state to go on from, and the environment steps done; the engine is set to it."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            found = self._newest_of_all()
            if found is None:
                engine.start()
                state, step, meta = init(), 0, {}
            else:
                state, step, meta = found.state, found.step, found.meta
                engine.restore(found.host)
                self.clock.restore(meta["seconds_total"], meta["seconds"])
        self._begin_step = step
        self._begin_time = time.perf_counter()
        self.logs = (
            Loggers(self._path, self._config, step, meta.get("offsets", {}), self._wandb)
            if self._first
            else NoLoggers()
        )
        self._stack.callback(self.logs.close)
        self._progress = Progress(self._config, step, self._quiet or not self._first)
        self._stack.callback(self._progress.close)
        self._introduce(step)
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                self._progress.say(f"warning: {warning.message}")
        return state, step

    def _newest_of_all(self) -> Restored | None:
        """The newest checkpoint whose step every process has, or None if nothing was ever saved.

        One of them may have been ended before it saved what another had saved already.
        """
        found = self._checkpoints.restore(self._shapes)
        while True:
            steps = processes.everyones(-1 if found is None else found.step)
            if len(set(steps)) == 1:
                return found
            oldest = min(steps)
            if oldest < 0 and max(steps) > self._config.eval.every:
                raise UsageError(
                    f"--out={self._path}: process {steps.index(-1)} has no checkpoint of step "
                    f"{max(steps)}, or of one before it, which others have; give every process "
                    "the folder that it had"
                )
            found = self._checkpoints.restore(self._shapes, oldest)

    def _of_all(self, tree: Any) -> Any:
        """Results of this process's rows (places, ...) as those of all rows (S, ...)."""
        return processes.gather(self._placement.real(tree), self._config.rows)

    def _introduce(self, step: int) -> None:
        c, say = self._config, self._progress.say
        per_row = self._needed / self._placement.each
        devices = self._placement.mesh.size
        spread = f" in {jax.process_count()} processes" if processes.several() else ""
        if devices > 1:
            spread += f" on {devices} devices, at most {self._placement.each} each"
        names = " | ".join(v.name for v in c.variants)
        fixes = f"fixes {names}; " if c.algo == "mbpo" else ""
        say(f"{c.algo} on {c.env}, preset {c.preset}, {c.steps} steps, {c.random_steps} at random")
        say(f"{c.rows} rows{spread}: {fixes}seeds {c.seed} to {c.seed + c.seeds - 1}")
        say(
            f"{device_name()}; parameters a row: "
            + ", ".join(f"{name} {size:,}" for name, size in self._sizes.items())
            + f"; {per_row / 2**20:.0f} MiB of device memory a row"
        )
        say(f"folder {self._path}")
        if c.preset != "quick" and compiler.small_caches():
            say(f"on a CPU preset {c.preset} takes a day or more, --preset=quick minutes")
        if step:
            say(f"going on from step {step}")
        if step >= c.steps:
            say("the run is complete; a larger --steps goes on with it")

    def fit(self, step: int, fit: jax.stages.Wrapped | HelpedFit, state: TrainState) -> TrainState:
        """Runs and times the jitted fit; its figures are logged at the next evaluation."""
        with self.clock("update"):
            jax.block_until_ready(state)
        with self.clock("fit"):
            state, metrics = fit(state)
            jax.block_until_ready(state)
        self.fitted(step, metrics)
        return state

    def fitted(self, step: int, metrics: Metrics) -> None:
        """Notes a fit's figures (S,), to be logged at the next evaluation."""
        self._fits.append((step, metrics))

    def learned(self, metrics: Metrics, steps: int = 1) -> None:
        """Notes the learning of some environment steps, the last one's figures being `metrics`,
        and soon after the first the time that is left."""
        self._metrics = metrics
        self._learned += steps
        if self._learned == steps:
            jax.block_until_ready(metrics)  # a first run's extras are not counted into the rate
            self._learning_since = time.perf_counter()
            self._learned_before = steps
        elif steps == 1 and self._learned == 30:
            step_seconds = (time.perf_counter() - self._learning_since) / 29
            fit_seconds = self.clock.seconds["fit"] / max(1, len(self._fits))
            if self._config.algo == "mbpo":
                step_seconds += fit_seconds / self._config.model.fit_every
            left = step_seconds * (self._config.steps - self._step)
            self._progress.say(f"about {duration(left)} left")

    def stepped(self, step: int, steps: int = 1) -> None:
        """Notes that `step` environment steps are done, `steps` more than before."""
        self._step = step
        self._progress.advance(steps)

    def evaluated(self, step: int, result: Evaluation, engine: "Engine") -> None:
        """Logs an evaluation and what was learned and fitted since the one before."""
        result = self._of_all(result)
        now, left = time.perf_counter(), None
        if self._learned > self._learned_before:
            rate = (now - self._learning_since) / (self._learned - self._learned_before)
            left = rate * (self._config.steps - step)
        self._progress.evaluation(step, result, left)
        self.logs.evaluation(step, result)
        self._log(step, engine, result)
        dropped = int(self._of_all(engine.dropped).sum())
        self.logs.time(
            step,
            {
                "wall_seconds": self.clock.total,
                "steps_per_second": (step - self._begin_step) / (now - self._begin_time),
                "seconds": {
                    **self.clock.seconds,
                    "other": self.clock.total - sum(self.clock.seconds.values()),
                },
                "dropped": dropped,
            },
        )

    def _log(self, step: int, engine: "Engine", result: Evaluation | None = None) -> None:
        for fit_step, metrics in self._fits:
            self.logs.metrics("fit", fit_step, self._of_all(metrics))
        self._fits = []
        ended: list[list[float]] = [[] for _ in range(self._placement.places)]
        for row, score, _ in engine.pop_finished():
            ended[row].append(score)
        train_return = np.array([np.mean(scores) if scores else np.nan for scores in ended])
        if self._metrics:
            metrics = self._of_all({**self._metrics, "train_return": train_return})
            if result is not None and result.values is not None:
                metrics["start_value"] = result.values.mean(1)
                metrics["start_return"] = result.discounted.mean(1)
            self.logs.metrics("learn", step, metrics)

    def save(self, step: int, state: TrainState, engine: "Engine") -> None:
        """Writes a checkpoint that holds all that is needed to go on."""
        with self.clock("checkpoint"):
            if self._fits:
                self._log(step, engine)
            # Nobody drops its oldest checkpoint before all have their newest one but this.
            processes.everyones(step)
            self._checkpoints.save(
                step,
                state,
                engine.progress(),
                {
                    "offsets": self.logs.offsets(),
                    "seconds": dict(self.clock.seconds),
                    "seconds_total": self.clock.total,
                },
            )
