"""Trains SAC or MBPO, with or without the fixes, on a dm_control or Gymnasium task.

  dynajax train --env=cheetah-run --fix=scale,target

Run the same command again to go on after an interruption.
"""

import operator
import textwrap
from collections.abc import Sequence

from absl import flags

from dynajax import UsageError, envs, make_config, train, write_report
from dynajax.cli import common
from dynajax.config import Config
from dynajax.config.presets import PRESETS
from dynajax.runs import video
from dynajax.runtime import distributed, exit_status
from dynajax.settings import all_settings

FLAGS = flags.FLAGS
flags.DEFINE_string("env", "cheetah-run", "dm_control task, or Gymnasium id ([module:]Name-v0).")
flags.DEFINE_enum("algo", "mbpo", ["mbpo", "model-free"], "With a model, or without one.")
flags.DEFINE_string(
    "agent", None, "What acts and learns: sac, simba, bro, module:NAME; the preset's by default."
)
flags.DEFINE_string(
    "trust", "none", "Rule: none, macura, m2ac, infoprop, penalty, uncertainty_weight, module:NAME."
)
flags.DEFINE_multi_string(
    "fix", [], "List of scale, target, auto, beta, or none. Repeat for variants."
)
flags.DEFINE_integer("seeds", 1, "Seeds of each variant, as rows of one program.")
flags.DEFINE_integer("seed", 0, "The first seed.")
flags.DEFINE_integer("steps", None, "Environment steps of each row; the preset's by default.")
flags.DEFINE_enum("preset", "quick", list(PRESETS), "A laptop's sizes; the paper's; faster fits.")
flags.DEFINE_enum("engine", "host", ["host", "mjx"], "Environments beside the device, or on it.")
flags.DEFINE_enum(
    "oracle",
    "none",
    ["none", "reward", "state", "both"],
    "Which half of a synthetic transition the simulator gives.",
)
flags.DEFINE_string("out", None, "The run's folder; runs/NAME by default.")
flags.DEFINE_multi_string("set", [], "FIELD=VALUE of the configuration, such as learn.utd=10.")
flags.DEFINE_multi_string("vary", [], "FIELD=A,B,...: variants of a field that only scales.")
flags.DEFINE_string("process", None, "I/N@HOST:PORT, this one of the run's N processes; or auto.")
flags.DEFINE_bool(
    "fields", False, "List what --set takes: values, ranges, meaning. Trains nothing."
)
flags.DEFINE_bool("video", False, "Record an episode of the final policy.")
flags.DEFINE_bool("wandb", False, "Log to Weights & Biases too (needs the extra wandb).")


def configured() -> Config:
    """The configuration that the flags say."""
    return make_config(
        FLAGS.env,
        algo=FLAGS.algo,
        agent=FLAGS.agent,
        trust=FLAGS.trust,
        preset=FLAGS.preset,
        fixes=FLAGS.fix,
        vary={
            path: values.split(",")
            for path, values in common.assignments("--vary", FLAGS.vary).items()
        },
        settings=common.assignments("--set", FLAGS.set),
        seeds=FLAGS.seeds,
        seed=FLAGS.seed,
        steps=FLAGS.steps,
        engine=FLAGS.engine,
        oracle=FLAGS.oracle,
    )


def listed(config: Config) -> str:
    """Every field that --set reaches, with its value in a configuration."""
    lines = [
        f"Fields of --set for --agent={config.agent_name} --trust={config.trust_name} "
        f"--preset={config.preset}; * --vary takes them too"
    ]
    for path, setting in all_settings(config).items():
        value = operator.attrgetter(path)(config)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown = shown.lower() if isinstance(value, bool) else shown
        lines += textwrap.wrap(
            f"{setting.about} ({setting.values})",
            110,
            initial_indent=f"{'* ' if setting.traced else '  '}{path:<26}{shown:<9} ",
            subsequent_indent=" " * 38,
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    if argv:
        raise UsageError(f"{argv[0]}: flags only, such as --env={argv[0]}")
    common.start(FLAGS.process)
    # A user's module may register fixes and terminations, so it is imported before they are read.
    envs.spec(FLAGS.env)
    run = configured()
    if FLAGS.fields:
        print(listed(run))
        return 0
    if FLAGS.video:
        video.check(run)
    result = train(run, FLAGS.out, command=common.command(), wandb=FLAGS.wandb)
    first = distributed.is_main_process()
    if not result.finished:
        if first:
            print(f"interrupted and saved; the same command goes on: {result.folder}")
        return exit_status.INTERRUPTED
    page = write_report(result.folder) if first else None
    if FLAGS.video:
        for film in video.record(run, result.folder, result.state, result.learner_indices):
            print(f"video: {film}")
    if first:
        print(f"report: {page}")
    return 0
