"""Compiles a run's programs for a device that is not here, and says what they would take.

  dynajax ahead --device=h100 --env=humanoid-run --preset=paper --seeds=6

The flags that say what to train are those of `dynajax train`. Prints a table and writes
ahead-DEVICE-ENV-PRESET-ROWS.json into --out, by default the working directory.
docs/absent-devices.md explains the figures.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from dynajax import UsageError, envs
from dynajax.cli import train as run
from dynajax.profiling import aot, devices
from dynajax.runs.directory import write_atomically

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "device", None, f"What to compile for: {', '.join(devices.ACCELERATORS)}.", required=True
)
flags.adopt_module_key_flags(run)
flags.DEFINE_bool("fit_rows", True, "Find how many rows fit, by compiling more of them.")


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    count = report["devices"]
    lines = [
        f"{report['env']}, preset {report['preset']}, {report['algo']} {report['agent']}, engine "
        f"{report['engine']}: {report['rows']} rows on {count} x {report['device']}, "
        f"jax {report['jax']}",
        "",
        f"{'program':<16}{'arguments':>11}{'temporary':>11}{'donated':>11}{'by row':>10}  MiB on a device",
    ]
    programs = report["programs"]
    for name, facts in programs.items():
        size = facts["bytes"]
        values = (size["arguments"], size["temporaries"], size["donated"])
        lines.append(
            f"{name:<16}"
            + "".join(f"{_mib(value):>11}" for value in values)
            + f"{_mib(size['needed_by_row']):>10}"
        )
    lines += [
        "",
        f"{'program':<16}{'kernels':>24}{'open loops':>12}{'copies > 1 MiB':>16}{'all-reduces':>13}",
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
    step = report["environment_step"]
    lines += [
        "",
        f"An environment step of all rows: {step['kernels']:,.0f} kernels on each device, "
        f"{step['operations'] / 1e9:,.1f} GFLOP, {_mib(step['bytes_moved_by_kernels'])} MiB read and "
        f"written by kernels",
    ]
    if "seconds_at_least" in step:
        bound = step["seconds_at_least"]
        lines.append(
            f"Lower bound of its time: {1e3 * bound['bound']:.3f} ms "
            f"({1e3 * bound['arithmetic']:.3f} arithmetic, {1e3 * bound['memory']:.3f} memory)"
        )
    if fits := report["rows_that_fit"]:
        more = fits["bytes_with_one_more"]
        lines.append(
            f"Rows that fit: {count * fits['on_a_device']} ({_mib(fits['bytes'])} of "
            f"{_mib(report['memory_limit'])} MiB on a device; one more row "
            f"{'is refused by the compiler' if more is None else f'takes {_mib(more)}'}); compiled "
            f"{', '.join(map(str, fits['tried']))}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    if argv:
        raise UsageError(f"{argv[0]}: flags only, such as --env={argv[0]}")
    devices.accelerator(FLAGS.device)
    # Of an extra only the compiler is used, so JAX looks for no device of its.
    jax.config.update("jax_platforms", "cpu")
    # A user's module may register fixes and terminations, so it is imported before they are read.
    envs.spec(FLAGS.env)
    config = run.configured()
    spec = envs.spec(config.env, **config.stepping)
    report = aot.report(config, spec, FLAGS.device, rows_that_fit=FLAGS.fit_rows)
    report["command"] = " ".join(["python", "experiments/ahead.py", *sys.argv[1:]])
    print(table(report))
    name = f"ahead-{FLAGS.device}-{config.env}-{config.preset}-{config.num_learners}.json"
    path = Path(FLAGS.out or ".").expanduser() / name.replace(":", "-").replace("/", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
    print(f"written: {path}")
    return 0
