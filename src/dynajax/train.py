"""The training loop: Algorithm 2 of Janner et al. (2019), from one evaluation to the next."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from dynajax import envs, schedule
from dynajax.config import Config, run_name
from dynajax.engines import ENGINES, Engine
from dynajax.runs.writer import MAX_DROPPED_STEPS, RunWriter
from dynajax.runtime import distributed
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


def train(
    config: Config,
    out: str | Path | None = None,
    *,
    command: str = "dynajax.train",
    quiet: bool = False,
    wandb: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Result:
    """Train all learners of `config`, or resume an earlier call in the same folder.

    Args:
      config: the configuration of the run.
      out: the run directory; by default runs/<name of the configuration>.
      command: written to config.json as the command that repeats the run.
      quiet: print nothing.
      wandb: also log to Weights & Biases.
      devices: devices that share the learners; by default all local ones.

    Raises:
      UsageError: with one line that says what to change.
    """
    folder = Path(out).expanduser() if out is not None else Path("runs") / run_name(config)
    clock = Clock()
    spec = envs.spec(config.env, **config.stepping)
    program = build(config, spec, devices)
    placement = program.placement
    memory = placement.check_memory(backend.size(program.shapes()) // placement.mesh.size)
    with (
        distributed.interruptions() as interrupted,
        # The engine comes before the run directory, because not every task runs on every engine.
        contextlib.closing(ENGINES[config.engine](program, clock)) as engine,
        RunWriter(
            folder, config, spec, placement, command, program.parameters(), quiet, wandb
        ) as writer,
    ):
        if writer.saved_step < config.steps:
            with clock("compile"):
                memory = placement.check_memory(engine.memory())
        with clock("start"):
            state, step, messages = _start_or_resume(program, engine, clock, writer)
        writer.begin(step, memory, [*configuration_warnings(program), *messages])

        def stop(step: int) -> bool:
            writer.update_progress(step)
            return interrupted()

        while step < config.steps and not interrupted():
            state, interval = run_until_evaluation(program, engine, clock, state, step, stop)
            step = interval.step
            _write(interval, state, program, engine, clock, writer)
            _check_finite(interval, config)
    state = state._replace(learners=placement.unpad(state.learners))
    return Result(config, folder, state, program.numbers, finished=step >= config.steps)


def run_until_evaluation(
    program: Program,
    engine: Engine,
    clock: Clock,
    state: TrainState,
    step: int,
    stop: Callable[[int], bool],
) -> tuple[TrainState, TrainingInterval]:
    """Train until the next evaluation (Janner et al., 2019, Algorithm 2, lines 2 to 10).

    Args:
      program: the jitted functions of the learners.
      engine: the environments.
      clock: measures the stages.
      state: the training state.
      step: environment steps done so far.
      stop: is called with the steps done, and returns whether to end early.
    """
    config = program.config
    fits: list[tuple[int, Metrics]] = []
    learn: Metrics = {}
    evaluation = None
    while evaluation is None:
        due = schedule.due(config, step)
        if due.reset:
            state = program.reset(state)
        if due.fit:  # line 3: train the model on D_env
            with clock("update"):
                jax.block_until_ready(state)
            with clock("fit"):
                state, metrics = jax.block_until_ready(program.fit(state))
            fits.append((step, metrics))

        # Lines 5 to 10: act in the environment, roll out the model, and update the policy.
        state, metrics, steps = engine.advance(state, step)
        learn, step = metrics or learn, step + steps

        stopped = stop(step)
        if schedule.due(config, step - 1).evaluate:
            with clock("evaluate"):
                evaluation = engine.evaluate(state, step)
        elif stopped:
            break
    unpad = program.placement.unpad
    return state, TrainingInterval(
        step=step,
        learn=unpad(learn),
        fits=[(at, unpad(metrics)) for at, metrics in fits],
        train_return=engine.train_returns() if evaluation is not None else None,
        dropped=engine.dropped,
        seconds=clock.stages(),
        evaluation=evaluation,
    )


def gather_interval(interval: TrainingInterval, num_learners: int) -> TrainingInterval:
    """Return an interval with the learners of all processes, from this process's share."""
    steps, fits = [step for step, _ in interval.fits], [metrics for _, metrics in interval.fits]
    local = (interval.learn, fits, interval.train_return, interval.dropped, interval.evaluation)
    learn, fits, returns, dropped, evaluation = distributed.gather(local, num_learners)
    return interval._replace(
        learn=learn,
        fits=list(zip(steps, fits, strict=True)),
        train_return=returns,
        dropped=dropped,
        evaluation=evaluation,
    )


def configuration_warnings(program: Program) -> list[str]:
    """Return warnings about settings that may stop the run later or make it useless."""
    config, spec = program.config, program.spec
    messages = []
    if not schedule.learns(config):
        messages.append(
            f"--steps={config.steps}: all steps are random, so nothing is learned; use more steps, "
            f"or --set random_steps below {config.random_steps}"
        )
    if config.has_model and not config.synthetic_batch and not config.rollout.value_expansion_steps:
        messages.append(
            "--set rollout.real_fraction=1: the agent learns from no synthetic transition, so the "
            "model is trained but never used for policy updates"
        )
    if config.has_model and spec.termination is None:
        name = config.env.rpartition(":")[2]
        messages.append(
            f"it is not known when episodes of {config.env} terminate, and training stops at the "
            f"first one that does; call dynajax.register_termination({name!r}, function), or use "
            "--algo=model-free"
        )
    return messages


def _start_or_resume(
    program: Program, engine: Engine, clock: Clock, writer: RunWriter
) -> tuple[TrainState, int, list[str]]:
    """Return the initial or restored state, its environment step, and warnings for the user."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        restored = writer.restore(program.shapes())
        if restored is None:
            engine.start()
            state, step = program.init(), 0
        else:
            engine.restore(restored.host)
            clock.restore(restored.meta["seconds"])
            state, step = restored.state, restored.step
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return state, step, messages


def _write(
    interval: TrainingInterval,
    state: TrainState,
    program: Program,
    engine: Engine,
    clock: Clock,
    writer: RunWriter,
) -> None:
    """Write the logs, the policies if there was an evaluation, and a checkpoint."""
    num_learners = program.config.num_learners
    gathered = gather_interval(interval, num_learners)
    writer.write(gathered)
    with clock("checkpoint"):
        if gathered.evaluation is not None:
            policies = distributed.gather(program.policies(state), num_learners)
            writer.save_policies(gathered, policies)
        writer.save(interval.step, state, engine.progress(), clock.stages())


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
