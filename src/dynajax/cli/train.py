"""Train SAC or MBPO, with or without the fixes, on a dm_control or Gymnasium task.

  dynajax train --env=cheetah-run --fix=scale,target

After an interruption, run the same command again to resume.
"""

import operator
import textwrap
from collections.abc import Sequence
from typing import Any

from absl import flags

from dynajax import envs, make_config, train, write_report
from dynajax.cli import common, config_file
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
        arguments = config_file.read(common.expand_path(FLAGS.config))
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
    """Return the configuration that the flags describe."""
    arguments = arguments_from_flags()
    # The module of a user's task may register fixes, so import it before they are parsed.
    envs.spec(arguments["env"])
    return make_config(**arguments)


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
    if FLAGS.video:
        for path in video.record(config, result.folder, result.state, result.learner_indices):
            print(f"video: {path}")
    if first:
        print(f"report: {write_report(result.folder)}")  # it shows the videos
    return 0
