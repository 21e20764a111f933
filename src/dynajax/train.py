"""The training loop: Algorithm 2 of Janner et al. (2019), from one evaluation to the next."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dynajax import envs, schedule, user_code
from dynajax.config import Config, HostConfig, run_name
from dynajax.engines import ENGINES, Engine
from dynajax.engines.data_checks import DataChecks
from dynajax.envs import checks
from dynajax.envs.terminations import TIME_LIMIT
from dynajax.runs import progress
from dynajax.runs.directory import expand_user
from dynajax.runs.writer import MAX_DROPPED_STEPS, RunWriter
from dynajax.runtime import distributed, signals
from dynajax.runtime.program import Program, build
from dynajax.runtime.timers import Clock
from dynajax.types import Metrics, TrainingInterval, TrainState, UsageError
from dynajax.xla import backend


class Result(NamedTuple):
    """The result of `train`; `report.read_run(folder)` returns the curves as arrays."""

    config: Config
    folder: Path
    state: TrainState
    learner_indices: range  # learners of the run in `state`; all, unless there are other processes
    finished: bool  # False after an interruption
    saved_step: int  # agent steps done at the newest checkpoint, 0 if there is none

    def __repr__(self) -> str:
        """Return one line, without the arrays of the state."""
        return f"Result({self.config.env}, {self.folder}, finished={self.finished})"


class Undone(NamedTuple):
    """What an interrupted interval has left undone at its last step; a checkpoint contains it."""

    fit: bool = False  # the fit due at this step; a reset due there is done
    evaluation: bool = False  # the evaluation due after this step
    learn: Mapping[str, Any] = {}  # the metrics (S,) to log with the evaluation

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return named arrays for a checkpoint."""
        metrics = {f"undone.learn.{name}": np.asarray(value) for name, value in self.learn.items()}
        return {"undone": np.array([self.fit, self.evaluation]), **metrics}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Undone":
        """Return what `to_arrays` returned, from these and other arrays."""
        fit, evaluation = map(bool, arrays["undone"])
        prefix = "undone.learn."
        learn = {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
        return cls(fit, evaluation, learn)


def run_folder(config: Config, out: str | Path | None = None) -> Path:
    """Return the run directory; by default runs/<name of the configuration>.

    Raises:
      UsageError: `out` begins with ~ and the user is unknown or has no home folder.
    """
    return expand_user(out, "--out=") if out is not None else Path("runs") / run_name(config)


def train(
    config: Config,
    out: str | Path | None = None,
    *,
    command: str = "dynajax.train",
    quiet: bool = False,
    wandb: bool = False,
    devices: Sequence[jax.Device] | None = None,
    clock: Clock | None = None,
) -> Result:
    """Train all learners of `config`, or resume an earlier call in the same folder.

    Once the programs are compiled, Ctrl-C and the other signals of `signals.catchable` make this
    return after a checkpoint.

    Args:
      config: the configuration of the run.
      out: the run directory; by default runs/<name of the configuration>.
      command: written to config.json as the command that repeats the run.
      quiet: print nothing.
      wandb: also log to Weights & Biases.
      devices: devices that share the learners; by default all local ones.
      clock: measures the stages of this process; by default it begins now.

    Raises:
      UsageError: with one line that says what to change.
    """
    if not isinstance(config, Config):
        raise UsageError(
            f"dynajax.train({type(config).__name__}): it takes a configuration from "
            "dynajax.make_config"
        )
    folder = run_folder(config, out)
    numbers = signals.catchable()
    clock = clock or Clock()
    clock.time_rest_as("setup")
    display = progress.Progress(config, quiet or not distributed.is_main_process())
    for line in progress.header(config, folder):
        display.print(line)
    # A task that can exist only once is made here, and then used by the engine.
    once = config.host.evaluate_on == "training"
    spec = envs.spec(config.env, **config.stepping, seed=config.seed, keep=once)
    program = build(config, spec, devices)
    placement = program.placement
    memory = placement.check_memory(backend.size(program.shapes()) // placement.mesh.size)
    with (
        # The engine comes before the run directory, because not every task runs on every engine.
        contextlib.closing(ENGINES[config.engine](program, clock)) as engine,
        RunWriter(
            folder, config, spec, placement, command, program.parameters(), display, wandb
        ) as writer,
    ):
        if writer.saved_step < config.steps:
            display.print(progress.compilation_notice())
            with clock("compile"), user_code.one_line("while the run's programs were traced"):
                memory = placement.check_memory(engine.memory(), engine.host_memory)
        state, step, undone, messages = _start_or_resume(program, engine, clock, writer)
        complete = step >= config.steps and not undone.evaluation
        notices = [*configuration_warnings(program), *messages]
        writer.begin(step, memory, notices, complete)
        clock.time_rest_as("other")
        # An interrupted interval is checked as a whole, because its first part may not have been.
        checked = (step - undone.evaluation) // config.eval.every * config.eval.every
        check_data = DataChecks(program, checked)
        # The handlers are installed after the environments are made, which may install their own,
        # and after the compilation, which they could not interrupt.
        with distributed.interruptions(numbers) as interrupted:

            def stop(step: int) -> bool:
                writer.update_progress(step)
                return interrupted()

            def check() -> None:
                if interrupted():
                    raise signals.Interrupted

            # Several processes must ask equally often, so they ask only after each step.
            check_within = None if distributed.is_multiprocess() else check
            while not complete and not interrupted():
                state, interval, undone = run_until_evaluation(
                    program, engine, clock, state, step, stop, undone, check_within
                )
                step = interval.step
                complete = step >= config.steps and not undone.evaluation
                # The checks run programs, which would wait for the end of an abandoned fit.
                if not (undone.fit or undone.evaluation):
                    for message in check_data(engine, state, step):
                        writer.warn(message)
                _write(interval, state, undone, program, engine, clock, writer)
                _check_finite(interval, config)
        saved_step = writer.saved_step
    state = state._replace(learners=placement.unpad(state.learners))
    return Result(config, folder, state, program.numbers, complete, saved_step)


def run_until_evaluation(
    program: Program,
    engine: Engine,
    clock: Clock,
    state: TrainState,
    step: int,
    stop: Callable[[int], bool],
    undone: Undone,
    check: Callable[[], None] | None,
) -> tuple[TrainState, TrainingInterval, Undone]:
    """Train until the next evaluation (Janner et al., 2019, Algorithm 2, lines 2 to 10).

    Args:
      program: the jitted functions of the learners.
      engine: the environments.
      clock: measures the stages.
      state: the training state.
      step: agent steps done so far.
      stop: is called with the steps done, and returns whether to end early.
      undone: what the previous interval has left undone.
      check: is called during fits and evaluations, and may raise `signals.Interrupted`.

    Returns:
      The state, the interval, and what it has left undone.
    """
    config, unpad = program.config, program.placement.unpad
    fits: list[tuple[int, Metrics]] = []
    learn, stopped, evaluation = undone.learn, False, None
    while evaluation is None:
        if not undone.evaluation:
            due = schedule.due(config, step)
            if due.reset and not undone.fit:
                state = program.reset(state)
            if due.fit:  # line 3: train the model on D_env
                with clock("update"):
                    jax.block_until_ready(state)
                try:
                    with clock("fit"):
                        state, metrics = jax.block_until_ready(program.fit(state, check))
                except signals.Interrupted:
                    undone = Undone(fit=True)
                    break
                fits.append((step, metrics))

            # Lines 5 to 10: act in the environment, roll out the model, and update the policy.
            state, metrics, steps = engine.advance(state, step)
            learn, step = metrics or learn, step + steps
            stopped = stop(step)
        if undone.evaluation or schedule.due(config, step - 1).evaluate:
            try:
                with clock("evaluate"):
                    evaluation = engine.evaluate(state, step, check)
            except signals.Interrupted:
                undone = Undone(evaluation=True, learn=unpad(learn))
                break
        undone = Undone()
        if stopped:
            break
    return (
        state,
        TrainingInterval(
            step=step,
            learn=unpad(learn),
            fits=[(at, unpad(metrics)) for at, metrics in fits],
            train_return=engine.train_returns() if evaluation is not None else None,
            dropped=engine.dropped,
            frames=engine.frames,
            seconds=clock.stages(),
            evaluation=evaluation,
        ),
        undone,
    )


def gather_interval(interval: TrainingInterval, num_learners: int) -> TrainingInterval:
    """Return an interval with the learners of all processes, from this process's share."""
    steps, fits = [step for step, _ in interval.fits], [metrics for _, metrics in interval.fits]
    counts = interval.dropped, interval.frames
    local = (interval.learn, fits, interval.train_return, counts, interval.evaluation)
    learn, fits, returns, (dropped, frames), evaluation = distributed.gather(local, num_learners)
    return interval._replace(
        learn=learn,
        fits=list(zip(steps, fits, strict=True)),
        train_return=returns,
        dropped=dropped,
        frames=frames,
        evaluation=evaluation,
    )


def configuration_warnings(program: Program) -> list[str]:
    """Return warnings about settings that may stop the run later or make it useless."""
    config, spec = program.config, program.spec
    messages = []
    if not schedule.learns(config):
        messages.append(
            f"--steps={config.steps}: all steps are random, so nothing is learned; use more steps, "
            f"or --set random_steps below {config.steps}"
        )
    if config.has_model and not config.synthetic_batch and not config.rollout.value_expansion_steps:
        cause = "rollout.source=none"
        if config.rollout.source != "none":
            cause = f"rollout.real_fraction={config.rollout.real_fraction:g}"
        messages.append(
            f"--set {cause}: the agent learns from no synthetic transition, so the model is trained "
            "but never used for policy updates"
        )
    share = config.rollout.real_fraction
    if config.has_rollouts and share and not config.real_batch:
        messages.append(
            f"--set rollout.real_fraction={share:g}: of learn.batch={config.learn.batch} transitions "
            "it rounds to none, so the agent learns from synthetic ones only; raise one of them"
        )
    limit, repeat = config.host.time_limit, config.task.repeat
    if limit != HostConfig().time_limit and spec.time_limit != -(-limit // repeat):
        messages.append(
            f"--set host.time_limit={limit}: it has no effect, because {config.env} has a time limit of "
            f"its own; leave it out, episodes have {spec.time_limit} agent steps"
        )
    if message := checks.bounds_warning(spec):
        messages.append(message)
    if config.has_model and spec.termination is None:
        name = config.env.rpartition(":")[2]
        messages.append(
            f"it is not known when episodes of {config.env} terminate, and training stops at the "
            f"first one that does; call dynajax.register_termination({name!r}, function), or use "
            f"--algo=model-free; {TIME_LIMIT}"
        )
    return messages


def _start_or_resume(
    program: Program, engine: Engine, clock: Clock, writer: RunWriter
) -> tuple[TrainState, int, Undone, list[str]]:
    """Return the initial or restored state, its step, what is undone, and warnings for the user."""
    undone = Undone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        restored = writer.restore(program.shapes())
        if restored is None:
            engine.start()
            with clock("init"):
                state, step = jax.block_until_ready(program.init()), 0
            with clock("checkpoint"):
                writer.check_can_save(state, engine.progress())
        else:
            engine.restore(restored.host)
            clock.restore(restored.meta["seconds"])
            state, step = restored.state, restored.step
            undone = Undone.from_arrays(restored.host)
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return state, step, undone, messages


def _write(
    interval: TrainingInterval,
    state: TrainState,
    undone: Undone,
    program: Program,
    engine: Engine,
    clock: Clock,
    writer: RunWriter,
) -> None:
    """Write the logs, the policies if there was an evaluation, and a checkpoint."""
    num_learners = program.config.num_learners
    with clock("logs"):
        gathered = gather_interval(interval, num_learners)
        writer.write(gathered)
    with clock("checkpoint"):
        if gathered.evaluation is not None:
            policies = distributed.gather(program.policies(state), num_learners)
            writer.save_policies(gathered, policies)
        host = {**engine.progress(), **undone.to_arrays()}
        writer.save(interval.step, state, host, clock.stages())


def _check_finite(interval: TrainingInterval, config: Config) -> None:
    """Check that some transition of the run was finite, once there were enough of them.

    Raises:
      UsageError: none was.
    """
    enough = interval.step >= min(MAX_DROPPED_STEPS, config.steps)
    if enough and (interval.dropped >= interval.step).all():
        raise UsageError(
            f"--env={config.env}: none of the transitions of {interval.step} steps was finite; "
            "observations and rewards must be finite numbers"
        )
