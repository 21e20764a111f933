"""Train SAC or MBPO, with or without the fixes, on a dm_control or Gymnasium task.

  dynajax train --env=cheetah-run --fix=scale,target

After an interruption, run the same command again to resume.
"""

import operator
import signal
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags

from dynajax import envs, make_config, train, write_report
from dynajax.cli import common
from dynajax.cli import flags as shared
from dynajax.config import Config
from dynajax.runs import video
from dynajax.runs.checkpoint import Checkpoints
from dynajax.runtime import distributed, exit_status, signals
from dynajax.settings import all_settings
from dynajax.train import run_folder

FLAGS = flags.FLAGS
shared.define_env("cheetah-run", "dm_control task, or Gymnasium id ([module:]Name-v0).")
shared.define_method()
shared.define_fixes("Repeat for several variants.")
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
    "process", None, "I/N@HOST:PORT: this is process I of the run's N processes; or auto."
)
flags.DEFINE_bool(
    "fields", False, "List the fields of --set with values, ranges and meaning; train nothing."
)
shared.define_video("Record a video of an episode with the final policy.")
flags.DEFINE_bool("wandb", False, "Log to Weights & Biases too (needs the extra wandb).")


def config_from_flags() -> Config:
    """Return the configuration that the flags describe."""
    return make_config(
        FLAGS.env,
        algo=FLAGS.algo,
        agent=FLAGS.agent,
        trust=FLAGS.trust,
        preset=FLAGS.preset,
        fixes=FLAGS.fix,
        vary={
            path: values.split(",")
            for path, values in common.parse_assignments("--vary", FLAGS.vary).items()
        },
        settings=common.parse_assignments("--set", FLAGS.set),
        seeds=FLAGS.seeds,
        seed=FLAGS.seed,
        steps=FLAGS.steps,
        engine=FLAGS.engine,
        oracle=FLAGS.oracle,
    )


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
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown = shown.lower() if isinstance(value, bool) else shown
        lines += textwrap.wrap(
            f"{setting.about} ({setting.values})",
            110,
            initial_indent=f"{'* ' if setting.traced else '  '}{path:<{width}}{shown:<9} ",
            subsequent_indent=" " * (width + 12),
        )
    return "\n".join(lines)


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
    # The module of a user's task may register fixes, so import it before they are parsed.
    envs.spec(FLAGS.env)
    config = config_from_flags()
    if FLAGS.fields:
        print(list_fields(config))
        return 0
    if FLAGS.video:
        video.check(config)
    folder = run_folder(config, FLAGS.out)

    def end(number: int) -> NoReturn:
        saved_step = Checkpoints(folder / "checkpoints").latest_step() or 0
        common.end_at_once(*_describe_interruption(folder, saved_step, number))

    # Several processes end together, at the same step.
    with signals.ending_at_once(() if FLAGS.process else numbers, end):
        result = train(config, folder, command=common.command_line(), wandb=FLAGS.wandb)
    first = distributed.is_main_process()
    if not result.finished:
        text, status = _describe_interruption(folder, result.saved_step, signal.SIGTERM)
        if not distributed.is_initialized():
            common.end_at_once(text, status)
        if first:
            print(text)
        return status
    report = write_report(result.folder) if first else None
    if FLAGS.video:
        for path in video.record(config, result.folder, result.state, result.learner_indices):
            print(f"video: {path}")
    if first:
        print(f"report: {report}")
    return 0
