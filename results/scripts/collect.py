"""Copy the finished runs of a study into this folder, as they are committed.

  python results/scripts/collect.py runs/seven results/seven

Of each run it copies config.json, eval.csv and metrics.jsonl. Of the fits after one evaluation's
step and up to the next one's, only the last one with an R² of the reward stays in the metrics. (A
fit at the step of an evaluation comes after it.) The path of the study's folder becomes `runs/NAME`
in config.json. Runs that are not finished, or were copied before, are left alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import seven_runs
from dynajax import UsageError
from dynajax.cli import common
from dynajax.report.run import read_run
from dynajax.runs.directory import write_atomically


def thinned(lines: Sequence[str], evaluated: Sequence[int]) -> list[str]:
    """Return metrics without the fits that another fit of the same learner follows.

    A fit on whose holdout the reward is constant, and has no R², only follows others like it.

    Args:
      lines: of metrics.jsonl.
      evaluated: agent steps of the evaluations, in ascending order.
    """
    fits: dict[tuple[object, ...], int] = {}
    with_value, kept = set(), set()
    for number, line in enumerate(lines):
        entry = json.loads(line)
        if entry["kind"] != "fit":
            kept.add(number)
            continue
        interval = next((step for step in evaluated if step >= entry["step"]), None)
        key = entry.get("variant"), entry.get("seed"), interval
        has_value = entry.get("r2_reward") is not None
        if has_value or key not in with_value:
            fits[key] = number
        if has_value:
            with_value.add(key)
    return [lines[number] for number in sorted(kept | set(fits.values()))]


def copy(source: Path, target: Path) -> str:
    """Copy a run if it is finished and the target does not exist, and return what was done."""
    if (target / "config.json").exists():
        return "there already"
    run = read_run(source)
    # The report is the last file that a run writes.
    if not (seven_runs.is_finished(run) and (source / "report.html").exists()):
        return "not finished"
    config = (source / "config.json").read_text()
    study = source.resolve().parent
    config = config.replace(str(study), f"runs/{study.name}")
    metrics = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / "eval.csv", (source / "eval.csv").read_bytes())
    write_atomically(
        target / "metrics.jsonl", "".join(thinned(metrics, run.steps.tolist())).encode()
    )
    # Last, because a folder with a configuration counts as a run.
    write_atomically(target / "config.json", config.encode())
    return "copied"


def main(arguments: Sequence[str]) -> int:
    """Copy every finished run of the first folder into the second."""
    if len(arguments) != 2:
        raise UsageError("give two folders, such as runs/seven results/seven")
    source, target = map(Path, arguments)
    folders = sorted(path.parent for path in source.glob("*/config.json"))
    if not folders:
        raise UsageError(f"{source}: it contains no run directory")
    failed = False
    for folder in folders:
        try:
            done = copy(folder, target / folder.name)
        except (UsageError, OSError, ValueError) as error:
            done, failed = f"not copied ({error})", True
        print(f"{folder.name}: {done}")
    return int(failed)


if __name__ == "__main__":
    common.run(main)
