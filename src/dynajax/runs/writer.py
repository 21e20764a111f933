"""The book-keeping of a run: its folder, logs and checkpoints, and what the user is told.

It is handed values and writes them down; it drives nothing, and knows no engine.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from dynajax import schedule
from dynajax.config import Config, as_dict
from dynajax.runs.checkpoint import Checkpoints, Restored
from dynajax.runs.directory import RunDirectory, device_name, evaluated
from dynajax.runs.loggers import DEFAULT, Loggers
from dynajax.runs.policies import Policies
from dynajax.runs.progress import Progress
from dynajax.runtime import distributed
from dynajax.runtime.sharding import Placement
from dynajax.types import EnvSpec, TrainingInterval, TrainState, UsageError
from dynajax.xla import backend

#: Steps of which not one was finite, from which on the user is told.
LOST_STEPS = 1000


class RunWriter:
    """A run's folder, logs and checkpoints; use it in a `with` statement.

    Args:
      folder: where.
      config: the run.
      spec: its task.
      placement: this process's rows.
      command: what to type to repeat the run.
      parameters: how many a network of a row has, by its name.
      quiet: print nothing.
      wandb: log to Weights & Biases too.

    Raises:
      UsageError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        spec: EnvSpec,
        placement: Placement,
        command: str,
        parameters: Mapping[str, int],
        quiet: bool,
        wandb: bool,
    ) -> None:
        self._folder, self._config, self._wandb = folder, config, wandb
        self._placement, self._parameters = placement, parameters
        self._info = {
            "command": command,
            "parameters": dict(parameters),
            "channels": list(spec.obs_names),
        }
        self._policies = Policies(folder / "policies", spec)
        self._first = distributed.is_main_process()
        self._quiet = quiet or not self._first
        self._offsets: Mapping[str, int] = {}
        self._good = 0  # transitions that were finite, and when there last were some
        self._good_step = 0

    def __enter__(self) -> "RunWriter":
        self._stack = contextlib.ExitStack()
        checkpoints = self._folder / "checkpoints"
        if distributed.is_multiprocess():
            distributed.check_same(json.dumps(as_dict(self._config)))
            checkpoints = checkpoints / f"process-{jax.process_index()}"
        if self._first:
            self._stack.enter_context(RunDirectory(self._folder, self._config, self._info))
        keep, rows = self._config.eval.checkpoints, self._placement.num_learners
        self._checkpoints = Checkpoints(checkpoints, keep, rows=rows)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def saved_step(self) -> int:
        """Environment steps of the newest checkpoint, 0 without one."""
        return self._checkpoints.latest_step() or 0

    def restore(self, shapes: TrainState) -> Restored | None:
        """The newest checkpoint whose step every process has, or None if nothing was ever saved.

        One of them may have been ended before it saved what another had saved already.

        Args:
          shapes: of the state, with the devices that it lies on.
        """
        restored = self._checkpoints.restore(shapes)
        while True:
            steps = distributed.all_gather_int(-1 if restored is None else restored.step)
            if len(set(steps)) == 1:
                break
            oldest = min(steps)
            if oldest < 0 and self._evaluated_before(max(steps)):
                raise UsageError(
                    f"--out={self._folder}: process {steps.index(-1)} has no checkpoint of step "
                    f"{max(steps)}, or of one before it, which others have; give every process "
                    "the folder that it had"
                )
            restored = self._checkpoints.restore(shapes, oldest)
        # A checkpoint follows an evaluation, so one at most is left where none had been saved.
        if restored is None and self._first and evaluated(self._folder) > 1:
            raise UsageError(
                f"--out={self._folder}: its eval.csv has evaluations, and there is no checkpoint to go "
                "on from; choose another --out, or move eval.csv away to start anew"
            )
        if restored is not None:
            self._offsets = restored.meta["offsets"]
            self._policies.restore(restored.host)
        return restored

    def _evaluated_before(self, step: int) -> bool:
        """Whether there was an evaluation, and so a checkpoint, before `step` steps were done."""
        return any(schedule.due(self._config, t).evaluate for t in range(step - 1))

    def begin(self, step: int, device_bytes: int, remarks: Sequence[str]) -> None:
        """Opens the logs at an environment step, and tells the user what begins.

        Args:
          device_bytes: memory that the rows of a device take.
          remarks: what went wrong while the run was restored.
        """
        self._good_step = step
        self._begin_step, self._begin_time = step, time.perf_counter()
        names = (*DEFAULT, "wandb") if self._wandb else DEFAULT
        self._logs = Loggers(
            self._folder, self._config, step, self._offsets, names if self._first else ()
        )
        self._stack.callback(self._logs.close)
        self._progress = Progress(self._config, step, self._quiet)
        self._stack.callback(self._progress.close)
        self._introduce(step, device_bytes)
        for remark in remarks:
            self._progress.say(f"warning: {remark}")

    def _introduce(self, step: int, device_bytes: int) -> None:
        c, say, placement = self._config, self._progress.say, self._placement
        devices = placement.mesh.size
        spread = f" in {jax.process_count()} processes" if distributed.is_multiprocess() else ""
        if devices > 1:
            spread += f" on {devices} devices, at most {placement.learners_per_device} each"
        names = " | ".join(v.name for v in c.variants)
        fixes = f"fixes {names}; " if c.has_model else ""
        method = f"mbpo with {c.agent_name}" if c.has_model else c.agent_name
        if c.trust_name != "none":
            method += f", trust {c.trust_name}"
        repeat = f" of {c.task.repeat} frames" if c.task.repeat > 1 else ""
        say(
            f"{method} on {c.env}, preset {c.preset}, {c.steps} steps{repeat}, "
            f"{c.random_steps} at random"
        )
        say(f"{c.num_learners} rows{spread}: {fixes}seeds {c.seed} to {c.seed + c.seeds - 1}")
        sizes = ", ".join(f"{name} {size:,}" for name, size in self._parameters.items())
        per_row = device_bytes / placement.learners_per_device
        say(
            f"{device_name()}; parameters a row: {sizes}; {per_row / 2**20:.0f} MiB of device "
            "memory a row"
        )
        say(f"folder {self._folder}")
        if c.preset in ("paper", "fast") and backend.target_is_cpu():
            say(f"on a CPU preset {c.preset} takes a day or more, --preset=quick minutes")
        if step:
            say(f"going on from step {step}")
        if step >= c.steps:
            say("the run is complete; a larger --steps goes on with it")

    def stepped(self, step: int) -> None:
        """Notes that `step` environment steps are done."""
        self._progress.stepped(step)

    def write(self, interval: TrainingInterval) -> None:
        """Logs an interval of all rows. Of one that was interrupted only the fits, for the rest
        is that of the evaluation which is still to come.
        """
        step, evaluation = interval.step, interval.evaluation
        if evaluation is None:
            self._logs.write(step, fits=interval.fits)
            return
        learn: dict[str, Any] = {}
        if interval.learn:
            learn = {**interval.learn, "train_return": interval.train_return}
            if evaluation.values is not None:
                learn["start_value"] = np.mean(evaluation.values, 1)
                learn["start_return"] = np.mean(evaluation.discounted, 1)
        self._progress.evaluation(step, evaluation)
        self._warn_of_losses(interval)
        elapsed = time.perf_counter() - self._begin_time
        self._logs.write(
            step,
            fits=interval.fits,
            learn=learn,
            evaluation=evaluation,
            time={
                "wall_seconds": sum(interval.seconds.values()),
                "steps_per_second": (step - self._begin_step) / elapsed,
                "seconds": dict(interval.seconds),
                "dropped": int(np.sum(interval.dropped)),
            },
        )

    def _warn_of_losses(self, interval: TrainingInterval) -> None:
        """Says so where nothing of the evaluation, or of the last steps, was a number."""
        good = int(np.sum(interval.step - np.asarray(interval.dropped)))
        if good > self._good:
            self._good, self._good_step = good, interval.step
        lost, say = interval.step - self._good_step, self._progress.say
        if lost >= LOST_STEPS:
            say(f"warning: every transition of the last {lost} steps was dropped, no number in it")
        if interval.evaluation is not None and np.max(interval.evaluation.lengths) == 0:
            say("warning: every episode of the evaluation ended at a step without a number")

    def keep(self, interval: TrainingInterval, policies: Any) -> None:
        """Keeps the policies, leaves (S, ...), of an interval's evaluation, both of all rows."""
        assert interval.evaluation is not None
        scores = np.mean(interval.evaluation.returns, 1)
        self._policies.add(interval.step, policies, scores, write=self._first)

    def save(
        self,
        step: int,
        state: TrainState,
        host: Mapping[str, np.ndarray],
        seconds: Mapping[str, float],
    ) -> None:
        """Writes a checkpoint that holds all that is needed to go on.

        Args:
          host: what the engine keeps beside the state.
          seconds: by stage.
        """
        # Nobody drops its oldest checkpoint before all have their newest one but this.
        distributed.all_gather_int(step)
        meta = {"offsets": self._logs.offsets(), "seconds": dict(seconds)}
        self._checkpoints.save(step, state, {**host, **self._policies.progress()}, meta)
