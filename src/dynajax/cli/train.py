"""Train an agent on a task, with synthetic data from a learned model or without a model.

  dynajax train --env=cheetah-run --fix=scale,target

After an interruption, run the same command again to resume.
"""

import operator
import signal
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from absl import flags

import dynajax
from dynajax import cli, envs, make_config, train
from dynajax.cli import common, config_file
from dynajax.cli import flags as shared
from dynajax.config import MODEL_GROUPS, Config
from dynajax.runs import video
from dynajax.runs.checkpoint import Checkpoints
from dynajax.runs.directory import expand_user
from dynajax.runs.progress import duration
from dynajax.runtime import distributed, exit_status, signals
from dynajax.runtime.timers import STAGES, Clock
from dynajax.settings import all_settings, format_value
from dynajax.train import Result, run_folder
from dynajax.types import UsageError

FLAGS = flags.FLAGS
shared.define_env("cheetah-run", "dm_control task, or Gymnasium id ([module:]Name-v0).")
shared.define_method()
shared.define_fixes(
    "Repeat for several variants. By default scale,auto,beta with --algo=dynajax, otherwise none."
)
shared.define_seeds(1, "Number of seeds of each variant; all train in one program.")
shared.define_seed("The first seed.")
flags.DEFINE_integer("steps", None, "Agent steps of each learner. By default those of the preset.")
shared.define_preset("quick")
shared.define_engine()
shared.define_out(None, "The run directory. By default runs/NAME.")
shared.define_settings()
flags.DEFINE_multi_string(
    "vary", [], "FIELD=A,B,...: train a variant for each value of a runtime parameter."
)
flags.DEFINE_string(
    "config",
    None,
    "A run's config.json, or a TOML file with the names of these flags and a table [settings]; "
    "other flags take precedence.",
)
flags.DEFINE_string(
    "process", None, "I/N@HOST:PORT: this is process I of the run's N processes; or auto."
)
flags.DEFINE_bool(
    "fields", False, "List the fields of --set with values, ranges and meaning; train nothing."
)
shared.define_video("Record a video of an episode with the final policy.")
flags.DEFINE_bool("wandb", False, "Log to Weights & Biases too (needs the extra wandb).")


def arguments_from_flags() -> dict[str, Any]:
    """Return the arguments of `make_config`: those of the file of --config, then those of flags."""
    arguments: dict[str, Any] = {}
    if FLAGS.config is not None:
        arguments = config_file.read(expand_user(FLAGS.config))
        if FLAGS["algo"].present and FLAGS.algo == "model-free":
            arguments = config_file.without_model(arguments)
    arguments |= {
        name: FLAGS[name].value
        for name in config_file.VALUES
        if FLAGS[name].present or name not in arguments
    }
    if FLAGS.fix:
        arguments["fixes"] = FLAGS.fix
    vary = common.parse_assignments("--vary", FLAGS.vary)
    settings = common.parse_assignments("--set", FLAGS.set)
    return arguments | {
        "vary": arguments.get("vary", {}) | {p: values.split(",") for p, values in vary.items()},
        "settings": arguments.get("settings", {}) | settings,
    }


def config_from_flags() -> Config:
    """Return the configuration that the flags describe.

    Raises:
      UsageError: a flag is wrong, or has no effect.
    """
    arguments = arguments_from_flags()
    # The module of a user's task may register fixes, so import it before they are parsed.
    envs.check_name(arguments["env"])
    config = make_config(**arguments)
    for path, value in arguments["settings"].items():
        if not config.has_model and path.split(".")[0] in MODEL_GROUPS:
            raise UsageError(
                f"--set {path}={value}: without a model it has no effect; leave it out, or choose "
                "--algo=mbpo"
            )
    return config


def list_fields(config: Config) -> str:
    """Return every field that --set takes, with its value in a configuration."""
    lines = [
        f"Fields of --set for --agent={config.agent_name} --trust={config.trust_name} "
        f"--preset={config.preset}; * --vary takes them too"
    ]
    settings = all_settings(config)
    width = max(map(len, settings)) + 1
    for path, setting in settings.items():
        value = operator.attrgetter(path)(config)
        shown = format_value(value)
        lines += textwrap.wrap(
            f"{setting.about} ({setting.values})",
            110,
            initial_indent=f"{'* ' if setting.traced else '  '}{path:<{width}}{shown:<9} ",
            subsequent_indent=" " * (width + 12),
        )
    return "\n".join(lines)


def summary(result: Result, stages: Mapping[str, float]) -> list[str]:
    """Return the lines that a finished run ends with: final returns, and where its time went.

    Args:
      result: the finished run.
      stages: seconds by stage, see `Clock`.
    """
    from dynajax.report import statistics  # slow to import

    lines = []
    evals = dynajax.read_run(result.folder).evals
    for variant, returns in evals.items():
        if not returns.size:
            continue
        mean, low, high = map(float, statistics.interval(returns[:, -1]))
        seeds = statistics.format_count(returns[:, -1])
        interval = f"95 % interval {low:,.1f} to {high:,.1f} over {seeds} seeds"
        if len(returns) == 1:
            interval = "no interval, because it is one seed"
        elif np.isnan(low):
            interval = "no interval, because fewer than two seeds have a finite return"
        name = f"{variant}: " if len(evals) > 1 else ""
        lines.append(f"{name}final return {mean:,.1f} ({interval})")
    total = sum(stages.values())
    longest = sorted(stages, key=lambda name: -stages[name])
    large = [name for name in longest if name != "other" and stages[name] >= 0.01 * total]
    parts = [f"{STAGES.get(name, name)} {_seconds(stages[name])}" for name in large]
    rest = total - sum(stages[name] for name in large)
    lines.append(f"wall time {_seconds(total)}: {', '.join(parts)}, the rest {_seconds(rest)}")
    return lines


def _seconds(seconds: float) -> str:
    """Format a duration; those below ten minutes in seconds, so that parts can be added up."""
    return f"{seconds:.1f} s" if seconds < 600 else duration(seconds)


def _describe_interruption(folder: Path, saved_step: int, number: int) -> tuple[str, int]:
    """Return what is true of a run after a signal, and the exit status."""
    if saved_step:
        text = f"interrupted and saved at step {saved_step}; the same command resumes it: {folder}"
        return text, exit_status.INTERRUPTED
    text = f"interrupted before anything was saved; the same command starts again: {folder}"
    return text, exit_status.ended_by(number)


def main(arguments: Sequence[str]) -> int:
    """Train the run that the flags describe, and write its report."""
    common.refuse_arguments(arguments)
    numbers = signals.catchable()
    common.start(FLAGS.process)
    config = config_from_flags()
    if FLAGS.fields:
        print(list_fields(config))
        return 0
    if FLAGS.video:
        print(f"checking that a video of {config.env} can be recorded", flush=True)
        video.check(config)
    clock = Clock(cli.BEGIN)
    folder = run_folder(config, FLAGS.out)

    def end(number: int) -> NoReturn:
        saved_step = Checkpoints(folder / "checkpoints").latest_step() or 0
        common.end_at_once(*_describe_interruption(folder, saved_step, number))

    # Several processes end together, at the same step.
    with signals.ending_at_once(() if FLAGS.process else numbers, end):
        result = train(
            config, folder, command=common.command_line(), wandb=FLAGS.wandb, clock=clock
        )
    first = distributed.is_main_process()
    if not result.finished:
        text, status = _describe_interruption(folder, result.saved_step, signal.SIGTERM)
        if not distributed.is_initialized():
            common.end_at_once(text, status)
        if first:
            print(text)
        return status
    failure = None
    if FLAGS.video:
        try:
            for path in video.record(config, result.folder, result.state, result.learner_indices):
                print(f"video: {path}")
        except UsageError as error:
            failure = error  # the report is written without it
    if first:
        clock.time_rest_as("report")
        report = dynajax.write_report(result.folder)  # it shows the videos
        print("\n".join(summary(result, clock.stages())))
        print(f"report: {report}")
    if failure is not None:
        raise failure
    return 0
