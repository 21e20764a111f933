"""Train SAC or MBPO, with or without the fixes, on a dm_control or Gymnasium task.

  dynajax train --env=cheetah-run --fix=scale,target

After an interruption, run the same command again to resume.
"""

import operator
import textwrap
from collections.abc import Sequence

from absl import flags

from dynajax import envs, make_config, train, write_report
from dynajax.cli import common
from dynajax.cli import flags as shared
from dynajax.config import Config
from dynajax.runs import video
from dynajax.runtime import distributed, exit_status
from dynajax.settings import all_settings

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


def main(arguments: Sequence[str]) -> int:
    """Train the run that the flags describe, and write its report."""
    common.refuse_arguments(arguments)
    common.start(FLAGS.process)
    # The module of a user's task may register fixes, so import it before they are parsed.
    envs.check_name(FLAGS.env)
    config = config_from_flags()
    if FLAGS.fields:
        print(list_fields(config))
        return 0
    if FLAGS.video:
        video.check(config)
    result = train(config, FLAGS.out, command=common.command_line(), wandb=FLAGS.wandb)
    first = distributed.is_main_process()
    if not result.finished:
        if first:
            print(f"interrupted and saved; the same command resumes it: {result.folder}")
        return exit_status.INTERRUPTED
    report = write_report(result.folder) if first else None
    if FLAGS.video:
        for path in video.record(config, result.folder, result.state, result.learner_indices):
            print(f"video: {path}")
    if first:
        print(f"report: {report}")
    return 0
