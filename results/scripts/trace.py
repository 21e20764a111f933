"""Profile some environment steps, and compare the kernels' times with a lower bound.

    python results/scripts/trace.py --env=cheetah-run --preset=paper --seeds=6 --bound=FOLDER

The flags of run.py describe the run; --bound is the folder where ahead.py wrote its JSON for the same
run. Writes trace.json and the files of JAX's profiler into --out.
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
from dynajax.runs.directory import expand_user, write_atomically

FLAGS = flags.FLAGS
flags.DEFINE_string("bound", None, "Folder with the JSON files of ahead.py.")

#: The stages that are profiled: the learning of an environment step, and a model's gradient steps.
STAGES = ("learn", "fit step")


def kernels(folder: Path) -> dict[str, list[float]]:
    """Return the times (ms) of each kernel in the newest trace of a folder, by name."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    # The profiler keeps the traces of earlier calls in the folder.
    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
    for path in traces[-1:]:
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                # Kernels are in the streams of a GPU, and in the line of operations of a TPU.
                if line.name.startswith("Stream") or line.name == "XLA Ops":
                    for event in line.events:
                        times[event.name].append(event.duration_ns / 1e6)
    return times


def bounds(folder: Path | None) -> list[dict[str, Any]]:
    """Return the reports that ahead.py wrote.

    Raises:
      UsageError: there is none in the folder.
    """
    if folder is None:
        return []
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("ahead-*.json"))]
    if not reports:
        raise UsageError(f"--bound={folder}: it has no JSON file of ahead.py")
    return reports


def main(argv: Sequence[str]) -> int:
    """Profile the run that the flags describe, and write the kernels' times."""
    common.refuse_arguments(argv)
    reports = bounds(FLAGS.bound and expand_user(FLAGS.bound))
    common.start()
    envs.spec(FLAGS.env)
    config = train.config_from_flags()
    out = expand_user(FLAGS.out or "trace")
    result: dict[str, Any] = {"env": config.env, "learners": config.num_learners, "stages": {}}
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
            # `learn` has no `per_step`: it runs once in an environment step.
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
