"""Runs some environment steps under JAX's profiler, and prints the kernels' times beside a bound.

    python experiments/trace.py --env=cheetah-run --preset=paper --seeds=6 --bound=FOLDER

The flags are those of run.py; --bound is where ahead.py wrote its JSON for the same run. Writes
trace.json, and the profiler's own files, into --out.
"""

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from dynajax import UsageError, envs
from dynajax.cli import common, train
from dynajax.profiling.benchmark import Workload
from dynajax.runs.directory import write_atomically

FLAGS = flags.FLAGS
flags.DEFINE_string("bound", None, "Folder with the JSON of ahead.py.")

#: What is traced, by stage: an environment step without its share of a fit, and gradient steps.
STAGES = ("learn", "fit step")


def kernels(folder: Path) -> dict[str, list[float]]:
    """Times (ms) of each kernel that the profiler saw on a device, by the kernel's name."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                # A GPU's streams; on a TPU the line of operations.
                if line.name.startswith("Stream") or line.name == "XLA Ops":
                    for event in line.events:
                        times[event.name].append(event.duration_ns / 1e6)
    return times


def bounds(folder: Path | None) -> list[dict[str, Any]]:
    """What ahead.py said of an environment step, by report."""
    if folder is None:
        return []
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("ahead-*.json"))]
    if not reports:
        raise UsageError(f"--bound={folder}: there is no JSON of ahead.py in it")
    return reports


def main(argv: Sequence[str]) -> int:
    if argv:
        raise UsageError(f"{argv[0]}: flags only, such as --env={argv[0]}")
    reports = bounds(FLAGS.bound and common.folder(FLAGS.bound))
    common.start()
    envs.spec(FLAGS.env)
    config = train.configured()
    out = common.folder(FLAGS.out or "trace")
    result: dict[str, Any] = {"env": config.env, "rows": config.num_learners, "stages": {}}
    with Workload(config) as work:
        stages, step = work.stages(), 0.0
        for name in (name for name in STAGES if name in stages):
            stage, folder = stages[name], out / name.replace(" ", "-")
            stage.run()
            with jax.profiler.trace(str(folder)):
                stage.run()
            times = kernels(folder)
            busy = sum(map(sum, times.values())) / stage.calls
            count = sum(map(len, times.values())) / stage.calls
            # `learn` is once in an environment step.
            step += busy * (stage.per_step or 1)
            print(f"{name}: {count:.0f} kernels, {busy:.3f} ms of the device's time")
            longest = sorted(times, key=lambda kernel: -sum(times[kernel]))[:10]
            for kernel in longest:
                print(f"  {sum(times[kernel]) / stage.calls:9.4f} ms  {kernel[:90]}")
            result["stages"][name] = {
                "kernels": count,
                "ms": busy,
                "longest": {kernel: sum(times[kernel]) / stage.calls for kernel in longest},
            }
    result["environment_step_ms"] = step
    for report in reports:
        bound = report["environment_step"].get("seconds_at_least", {}).get("bound")
        if bound is not None:
            print(
                f"environment step: {step:.3f} ms; at least {1e3 * bound:.3f} on {report['device']}"
            )
            result["bound_ms"] = 1e3 * bound
    write_atomically(out / "trace.json", (json.dumps(result, indent=1) + "\n").encode())
    print(f"written: {out / 'trace.json'}")
    return 0


if __name__ == "__main__":
    common.run(main)
