"""Run writer: the run directory, logs, checkpoints and printed messages of a run.

The writer only records the values that it is given. It does not control training and is
independent of the engine.
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
from dynajax.runs.directory import RunDirectory, count_evaluations, device_name
from dynajax.runs.loggers import DEFAULT_LOGGERS, Loggers, learner_names, written_parts
from dynajax.runs.policies import Policies
from dynajax.runs.progress import Progress
from dynajax.runtime import distributed
from dynajax.runtime.sharding import Placement
from dynajax.types import (
    EnvSpec,
    TrainingInterval,
    TrainState,
    UsageError,
    finite_statistics,
)
from dynajax.xla import backend

#: Number of consecutive agent steps without a finite transition that triggers a warning.
MAX_DROPPED_STEPS = 1000


class RunWriter:
    """Write the directory, logs and checkpoints of a run. Use it in a `with` statement.

    Args:
      folder: run directory.
      config: configuration of the run.
      spec: specification of the task.
      placement: devices of the learners of this process.
      command: shell command that repeats the run.
      parameters: number of parameters of each network of one learner, by name.
      progress: prints messages.
      wandb: log to Weights & Biases too.

    Raises:
      UsageError: the run directory cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        spec: EnvSpec,
        placement: Placement,
        command: str,
        parameters: Mapping[str, int],
        progress: Progress,
        wandb: bool,
    ) -> None:
        self._folder, self._config, self._wandb = folder, config, wandb
        self._placement, self._parameters = placement, parameters
        self._info = {
            "command": command,
            "parameters": dict(parameters),
            "dims": list(spec.obs_names),
        }
        self._policies = Policies(folder / "policies", spec)
        self._is_first_process = distributed.is_main_process()
        self._progress = progress
        self._offsets: Mapping[str, int] = {}
        self._num_finite = 0  # finite transitions so far
        self._last_finite_step = 0  # step at which their number last increased

    def __enter__(self) -> "RunWriter":
        self._stack = contextlib.ExitStack()
        checkpoints = self._folder / "checkpoints"
        if distributed.is_multiprocess():
            distributed.check_same(json.dumps(as_dict(self._config)))
            checkpoints = checkpoints / f"process-{jax.process_index()}"
        if self._is_first_process:
            directory = RunDirectory(self._folder, self._config, self._info)
            self._directory = self._stack.enter_context(directory)
        self._checkpoints = Checkpoints(
            checkpoints, self._config.eval.checkpoints, self._placement.num_learners
        )
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
        """Agent steps done at the newest checkpoint, or 0 if there is none."""
        return self._checkpoints.latest_step() or 0

    def restore(self, shapes: TrainState) -> Restored | None:
        """Return the newest checkpoint that every process has, or None if there is none.

        Processes can have different newest checkpoints if one was killed before its last save.

        Args:
          shapes: shapes and shardings of the training state.

        Raises:
          UsageError: checkpoints of this run are missing, or cannot be read.
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
                    f"{max(steps)} or before, but other processes have one; give every process "
                    "the folder that it wrote to"
                )
            restored = self._checkpoints.restore(shapes, oldest)
        # Every evaluation is followed by a checkpoint, so a run that was killed before its first
        # checkpoint has at most one evaluation.
        if restored is None and self._is_first_process and count_evaluations(self._folder) > 1:
            raise UsageError(
                f"--out={self._folder}: its eval.csv has evaluations, but there is no checkpoint to "
                "resume from; choose another --out, or move eval.csv away to start a new run"
            )
        if restored is not None:
            self._offsets = restored.meta["offsets"]
            self._policies.restore(restored.host)
        return restored

    def _evaluated_before(self, step: int) -> bool:
        """Return True if an evaluation, and thus a checkpoint, is due before step `step`."""
        return any(schedule.due(self._config, t).evaluate for t in range(step - 1))

    def check_can_save(self, state: TrainState, host: Mapping[str, np.ndarray]) -> None:
        """Check that an initial state can be saved; see `Checkpoints.check_can_save`."""
        self._checkpoints.check_can_save(state, host)

    def begin(
        self, step: int, device_bytes: int, notices: Sequence[str], complete: bool = False
    ) -> None:
        """Open the logs at an agent step and print a description of the run.

        Nothing in the folder changes if the run is complete, or if a log cannot be opened.

        Args:
          step: agent steps done so far.
          device_bytes: memory that the learners of one device need.
          notices: warnings to print, such as those from restoring the run.
          complete: the run is over, so nothing will be written.
        """
        self._last_finite_step = step
        self._begin_step, self._begin_time = step, time.perf_counter()
        names: Sequence[str] = ()
        if self._is_first_process:
            written_parts(self._folder, self._offsets)  # refuses files that were changed
        if self._is_first_process and not complete:
            # W&B first: it may refuse to start, and the files are truncated when they are opened.
            names = ("wandb", *DEFAULT_LOGGERS) if self._wandb else DEFAULT_LOGGERS
        self._logs = Loggers(self._folder, self._config, step, self._offsets, names)
        self._stack.callback(self._logs.close)
        if names:
            self._directory.write_config()
        self._progress.begin(step)
        self._stack.callback(self._progress.close)
        for line in self._describe_run(step, device_bytes, complete):
            self._progress.print(line)
        for notice in notices:
            self._progress.print(f"warning: {notice}")

    def _describe_run(self, step: int, device_bytes: int, complete: bool) -> list[str]:
        """Return the lines that follow `progress.header` when a run starts or resumes."""
        c, placement = self._config, self._placement
        where = f" in {jax.process_count()} processes" if distributed.is_multiprocess() else ""
        if placement.mesh.size > 1:
            where += (
                f" on {placement.mesh.size} devices, at most {placement.learners_per_device} each"
            )
        learners = "learner" if c.num_learners == 1 else "learners"
        sizes = ", ".join(f"{name} {size:,}" for name, size in self._parameters.items())
        mebibytes = device_bytes / placement.learners_per_device / 2**20
        lines = [
            f"{c.num_learners} {learners}{where}; {device_name()}; parameters per learner: {sizes}; "
            f"{mebibytes:.0f} MiB of device memory per learner",
        ]
        if c.preset in ("paper", "fast") and backend.target_is_cpu():
            lines.append(
                f"on a CPU, preset {c.preset} takes a day or more; --preset=quick takes minutes"
            )
        if step:
            lines.append(f"resuming from step {step}")
        if complete:
            lines.append("the run is complete; set a larger --steps to continue it")
        return lines

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._progress.print(f"warning: {text}")

    def update_progress(self, step: int) -> None:
        """Update the progress display after `step` agent steps."""
        self._progress.update(step)

    def write(self, interval: TrainingInterval) -> None:
        """Log an interval of all learners.

        If the interval was interrupted, log only its fits. The other metrics belong to the
        evaluation that follows after the run is resumed.
        """
        step, evaluation = interval.step, interval.evaluation
        if evaluation is None:
            self._logs.write(step, fits=interval.fits)
            return
        learn: dict[str, Any] = {}
        if interval.learn:
            learn = {
                **interval.learn,
                "frames": interval.frames,
                "train_return": interval.train_return,
            }
            if evaluation.values is not None:
                # Of the same episodes, so that the two can be compared.
                values = np.where(np.isfinite(evaluation.discounted), evaluation.values, np.nan)
                learn["start_value"], _ = finite_statistics(values)
                learn["start_return"], _ = finite_statistics(evaluation.discounted)
        self._progress.show_evaluation(step, evaluation)
        self._warn_if_not_finite(interval)
        elapsed = time.perf_counter() - self._begin_time
        self._logs.write(
            step,
            fits=interval.fits,
            learn=learn,
            evaluation=evaluation,
            frames=interval.frames,
            time={
                "wall_seconds": sum(interval.seconds.values()),
                "steps_per_second": (step - self._begin_step) / elapsed,
                "seconds": dict(interval.seconds),
                "dropped": int(np.sum(interval.dropped)),
            },
        )

    def _warn_if_not_finite(self, interval: TrainingInterval) -> None:
        """Print a warning if no recent transition, or no evaluation step, was finite."""
        num_finite = int(np.sum(interval.step - np.asarray(interval.dropped)))
        if num_finite > self._num_finite:
            self._num_finite, self._last_finite_step = num_finite, interval.step
        dropped_steps = interval.step - self._last_finite_step
        if dropped_steps >= MAX_DROPPED_STEPS:
            self.warn(
                f"every transition of the last {dropped_steps} steps was dropped because "
                "it was not finite"
            )
        if interval.evaluation is not None:
            names, finite = learner_names(self._config), np.isfinite(interval.evaluation.returns)
            failed = [
                f"{variant} (seed {seed})"
                for (variant, seed), some in zip(names, finite.any(1), strict=True)
                if not some
            ]
            if failed:
                self.warn(
                    f"every evaluation episode of {', '.join(failed)} ended because the policy or "
                    "the task returned a number that is not finite"
                )

    def save_policies(self, interval: TrainingInterval, policies: Any) -> None:
        """Save the policies of all learners, leaves (S, ...), at the evaluation of an interval."""
        assert interval.evaluation is not None
        scores, _ = finite_statistics(interval.evaluation.returns)
        self._policies.add(interval.step, policies, scores, write=self._is_first_process)

    def save(
        self,
        step: int,
        state: TrainState,
        host: Mapping[str, np.ndarray],
        seconds: Mapping[str, float],
    ) -> None:
        """Write a checkpoint with everything that is needed to resume the run.

        Args:
          step: agent steps done so far.
          state: training state.
          host: arrays of the engine that are not part of the training state.
          seconds: wall time of each stage.
        """
        # This is a barrier: no process may delete its oldest checkpoint before every process has
        # saved the previous one. Otherwise there may be no step that all processes have.
        distributed.all_gather_int(step)
        meta = {"offsets": self._logs.offsets(), "seconds": dict(seconds)}
        self._checkpoints.save(step, state, {**host, **self._policies.checkpoint_arrays()}, meta)
