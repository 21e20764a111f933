"""Copy the finished runs of a study into this folder, as they are committed.

  python results/scripts/collect.py runs/seven results/seven

Of each run it copies config.json, eval.csv and metrics.jsonl, the metrics without the values of single
state dimensions, which are more than half of the file. The path of the study's folder becomes `runs/NAME`
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


def without_dimensions(lines: Sequence[str]) -> list[str]:
    """Return lines of metrics.jsonl without their lists, which hold a value for each dimension."""
    entries = [json.loads(line) for line in lines]
    kept = [{k: v for k, v in entry.items() if not isinstance(v, list)} for entry in entries]
    return [json.dumps(entry) + "\n" for entry in kept]


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
    metrics = without_dimensions((source / "metrics.jsonl").read_text().splitlines())
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / "eval.csv", (source / "eval.csv").read_bytes())
    write_atomically(target / "metrics.jsonl", "".join(metrics).encode())
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
