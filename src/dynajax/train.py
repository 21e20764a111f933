"""Training: the order of things, from one evaluation to the next."""

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
    """What `train` gives back; `report.read_run(folder)` has the curves as arrays."""

    config: Config
    folder: Path
    state: TrainState
    rows: range  # which of the run's rows it holds: all, unless there are several processes
    finished: bool  # False after an interruption


def run_until_evaluation(
    program: Program,
    engine: Engine,
    clock: Clock,
    state: TrainState,
    step: int,
    interrupted: Callable[[int], bool],
) -> tuple[TrainState, TrainingInterval]:
    """Model-based policy optimisation (Janner et al., 2019, algorithm 2) until an evaluation.

    Args:
      step: environment steps done so far.
      interrupted: is told the steps done, and says whether to end early.
    """
    config = program.config
    fits: list[tuple[int, Metrics]] = []
    figures: Metrics = {}
    evaluation = None
    while evaluation is None:
        due = schedule.due(config, step)
        if due.reset:
            state = program.reset(state)
        if due.fit:
            with clock("update"):
                jax.block_until_ready(state)
            with clock("fit"):
                state, metrics = jax.block_until_ready(program.fit(state))
            fits.append((step, metrics))

        # The environment takes the policy's action, and the agent learns from real and imagined
        # transitions.
        state, metrics, steps = engine.advance(state, step)
        figures, step = metrics or figures, step + steps

        stop = interrupted(step)
        if schedule.due(config, step - 1).evaluate:
            with clock("evaluate"):
                evaluation = engine.evaluate(state, step)
        elif stop:
            break
    real = program.placement.unpad
    return state, TrainingInterval(
        step,
        real(figures),
        [(at, real(metrics)) for at, metrics in fits],
        engine.train_returns() if evaluation is not None else None,
        engine.dropped,
        clock.stages(),
        evaluation,
    )


def gather_interval(interval: TrainingInterval, rows: int) -> TrainingInterval:
    """An interval with the rows of all processes, of which this one has its share."""
    at, fits = [step for step, _ in interval.fits], [metrics for _, metrics in interval.fits]
    share = (interval.learn, fits, interval.train_return, interval.dropped, interval.evaluation)
    learn, fits, returns, dropped, evaluation = distributed.gather(share, rows)
    return interval._replace(
        learn=learn,
        fits=list(zip(at, fits, strict=True)),
        train_return=returns,
        dropped=dropped,
        evaluation=evaluation,
    )


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
    folder = Path(out).expanduser() if out is not None else Path("runs") / run_name(config)
    clock = Clock()
    spec = envs.spec(config.env, **config.stepping)
    program = build(config, spec, devices)
    placement, shapes = program.placement, program.shapes()
    needed = placement.check_memory(backend.size(shapes) // placement.mesh.size)
    with (
        distributed.interruptions() as interrupted,
        # First of all, because not every task runs on every engine.
        contextlib.closing(ENGINES[config.engine](program, clock)) as engine,
        RunWriter(
            folder, config, spec, placement, command, program.parameters(), quiet, wandb
        ) as journal,
    ):
        if journal.saved_step < config.steps:
            with clock("compile"):
                needed = placement.check_memory(backend.memory(engine.lower()))

        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always", UserWarning)
            restored = journal.restore(shapes)
            if restored is None:
                engine.start()
                state, step = program.init(), 0
            else:
                engine.restore(restored.host)
                clock.restore(restored.meta["seconds"])
                state, step = restored.state, restored.step
        journal.begin(
            step,
            needed,
            [*configuration_warnings(program), *map(_text, filter(_for_user, remarks))],
        )

        def stop(step: int) -> bool:
            journal.update_progress(step)
            return interrupted()

        while step < config.steps and not interrupted():
            state, interval = run_until_evaluation(program, engine, clock, state, step, stop)
            step = interval.step
            of_all = gather_interval(interval, config.num_learners)
            journal.write(of_all)
            with clock("checkpoint"):
                if of_all.evaluation is not None:
                    journal.save_policies(
                        of_all, distributed.gather(program.policies(state), config.num_learners)
                    )
                journal.save(step, state, engine.progress(), clock.stages())
            _check_numbers(interval, config)
    state = state._replace(learners=placement.unpad(state.learners))
    return Result(config, folder, state, program.numbers, finished=step >= config.steps)


def _check_numbers(interval: TrainingInterval, config: Config) -> None:
    """Ends a run that never saw a finite transition.

    Raises:
      UsageError: it is one, and has gone on for long enough.
    """
    enough = interval.step >= min(MAX_DROPPED_STEPS, config.steps)
    if enough and (interval.dropped >= interval.step).all():
        raise UsageError(
            f"--env={config.env}: not one of the transitions of {interval.step} steps was finite; "
            "observations and rewards must be numbers"
        )


def configuration_warnings(program: Program) -> list[str]:
    """What may stop the run later or make it useless, and can be mended now."""
    config, spec = program.config, program.spec
    remarks = []
    if not schedule.learns(config):
        remarks.append(
            f"--steps={config.steps}: all of them are random and nothing is learned; choose more, "
            f"or --set random_steps below {config.random_steps}"
        )
    if config.has_model and not config.synthetic_batch and not config.rollout.value_expansion_steps:
        remarks.append(
            "--set rollout.real_fraction=1: the agent learns from no synthetic transition, and the "
            "model is fitted for its figures alone"
        )
    if config.has_model and spec.termination is None:
        name = config.env.rpartition(":")[2]
        remarks.append(
            f"it is not known when episodes of {config.env} terminate, and training stops at the "
            f"first one that does; tell the model by dynajax.register_termination({name!r}, "
            "function), or choose --algo=model-free"
        )
    return remarks


def _text(remark: warnings.WarningMessage) -> str:
    return str(remark.message)


def _for_user(remark: warnings.WarningMessage) -> bool:
    return issubclass(remark.category, UserWarning)
