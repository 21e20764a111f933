"""Compile the programs of a run for a device that you do not have, and report their cost.

  dynajax ahead --device=h100 --env=humanoid-run --preset=paper --seeds=6

The flags of `dynajax train` describe the run. Prints memory, kernel counts and a lower bound of the
time, and writes ahead-DEVICE-ENV-ALGORITHM-AGENT-PRESET-LEARNERS.json into --out.
docs/absent-devices.md explains the numbers.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from dynajax import envs
from dynajax.cli import common, train
from dynajax.profiling import aot, devices
from dynajax.runs.directory import expand_user, make_writable, write_atomically

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "device",
    None,
    f"The device to compile for: {', '.join(devices.ACCELERATORS)}.",
    required=True,
)
#: Flags of `dynajax train` that have no effect here.
_UNUSED = ("fields", "process", "video", "wandb")
for flag in FLAGS.get_key_flags_for_module(train):
    if flag.name not in _UNUSED:
        flags.declare_key_flag(flag.name)
FLAGS["out"].help = "The folder of the report. By default the working directory."
flags.DEFINE_bool(
    "capacity", True, "Find how many learners fit into memory, by compiling larger programs."
)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def format_report(report: dict[str, Any]) -> str:
    """Return the report as text for a terminal."""
    lines = [
        f"{report['env']}, preset {report['preset']}, {report['algo']} {report['agent']}, engine "
        f"{report['engine']}: {_learners(report['learners'])} on {report['devices']} x "
        f"{report['device']}, jax {report['jax']}",
        "",
        *_memory_table(report["programs"]),
        "",
        *_kernel_table(report["programs"]),
        "",
        *_environment_step(report["environment_step"]),
    ]
    if report["learners_that_fit"]:
        lines.append(_capacity(report))
    return "\n".join(lines)


def _learners(count: int) -> str:
    return f"{count} learner{'s' * (count != 1)}"


def _memory_table(programs: dict[str, Any]) -> list[str]:
    """Return the lines about the memory of each program."""
    lines = [
        f"{'program':<16}{'arguments':>11}{'temporary':>11}{'donated':>11}{'a learner':>11}"
        "  MiB on a device"
    ]
    for name, facts in programs.items():
        size = facts["bytes"]
        values = (
            size["arguments"],
            size["temporaries"],
            size["donated"],
            size["needed_per_learner"],
        )
        lines.append(f"{name:<16}" + "".join(f"{_mib(value):>11}" for value in values))
    return lines


def _kernel_table(programs: dict[str, Any]) -> list[str]:
    """Return the lines about the kernels of each program."""
    lines = [
        f"{'program':<16}{'kernels':>24}{'open loops':>12}{'copies > 1 MiB':>16}{'all-reduces':>13}"
    ]
    for name, facts in programs.items():
        kernels = facts["kernels"]
        text = f"{kernels['outside_main_loop']}"
        if kernels["in_main_loop"]:
            trips = kernels["main_loop_trips"]
            text += f" + {'?' if trips is None else trips} x {kernels['in_main_loop']}"
        lines.append(
            f"{name:<16}{text:>24}{facts['data_dependent_loops']:>12}"
            f"{len(facts['large_copies']):>16}{facts['all_reduces']:>13}"
        )
    return lines


def _environment_step(step: dict[str, Any]) -> list[str]:
    """Return the lines about an environment step."""
    lines = [
        f"An environment step of all learners: {step['kernels']:,.0f} kernels on each device, "
        f"{step['operations'] / 1e9:,.1f} GFLOP, {_mib(step['bytes_moved_by_kernels'])} MiB read and "
        f"written by kernels"
    ]
    if "seconds_at_least" in step:
        bound = step["seconds_at_least"]
        lines.append(
            f"Lower bound of its time: {1e3 * bound['bound']:.3f} ms "
            f"({1e3 * bound['arithmetic']:.3f} arithmetic, {1e3 * bound['memory']:.3f} memory)"
        )
    return lines


def _capacity(report: dict[str, Any]) -> str:
    """Return the line about how many learners fit into memory."""
    fits = report["learners_that_fit"]
    more = fits["bytes_with_one_more"]
    limit = "is refused by the compiler" if more is None else f"takes {_mib(more)}"
    return (
        f"Learners that fit: {report['devices'] * fits['on_a_device']} ({_mib(fits['bytes'])} of "
        f"{_mib(report['memory_limit'])} MiB on a device; one more learner {limit}); compiled "
        f"{', '.join(map(str, fits['tried']))}"
    )


def main(arguments: Sequence[str]) -> int:
    """Compile the programs of the run that the flags describe, and report their cost."""
    common.refuse_arguments(arguments)
    common.refuse_flags(_UNUSED, "on what is compiled")
    devices.accelerator(FLAGS.device)
    # Only the compiler for the device is used, so JAX must not look for the device itself.
    jax.config.update("jax_platforms", "cpu")
    config = train.config_from_flags()
    out = expand_user(FLAGS.out or ".")
    make_writable(out, f"--out={out}")
    spec = envs.spec(config.env, **config.stepping)
    report = aot.report(config, spec, FLAGS.device, learners_that_fit=FLAGS.capacity)
    report["command"] = common.command_line()
    print(format_report(report))
    name = (
        f"ahead-{FLAGS.device}-{config.env}-{config.algo}-{config.agent_name}-{config.preset}-"
        f"{config.num_learners}.json"
    )
    path = out / name.replace(":", "-").replace("/", "-")
    write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
    print(f"written: {path}")
    return 0
