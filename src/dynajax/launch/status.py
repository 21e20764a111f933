"""Read the progress of a study's runs from their folders.

Results are read from the run directories. The state of a run that is queued or training is in a
small file, `launch/NAME.json` in the study's folder (its *note*), which the launcher and the job
runner keep up to date.
"""

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dynajax import report
from dynajax.launch.study import StudyRun
from dynajax.report.statistics import interval
from dynajax.runs.checkpoint import Checkpoints
from dynajax.runs.directory import write_atomically
from dynajax.runs.progress import duration
from dynajax.types import UsageError

#: The types of the entries of a note.
_NOTE_TYPES = {"state": str, "attempts": int, "message": str, "on": str, "job": str}
#: Seconds between two updates of a training run's note.
NOTE_INTERVAL = 10.0
#: Seconds without an update after which the run counts as stopped.
NOTE_TIMEOUT = 60.0


class RunStatus(NamedTuple):
    """The progress of a run, as the table shows it."""

    name: str
    state: str  # done, running, queued, stopped, failed, or missing (not started)
    step: int
    steps: int
    returns: dict[str, float]  # variant -> mean over seeds
    seconds_left: float | None
    attempts: int
    message: str


def note_path(out: Path, name: str) -> Path:
    """Return the path of a run's note."""
    return out / "launch" / f"{name}.json"


def read_note(out: Path, name: str) -> dict[str, Any]:
    """Return a run's note; empty if there is none or the file is damaged."""
    try:
        note = json.loads(note_path(out, name).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(note, dict) or "state" not in note:
        return {}
    valid = all(isinstance(note[key], _NOTE_TYPES.get(key, object)) for key in note)
    return note if valid else {}


def write_note(out: Path, name: str, **content: Any) -> None:
    """Update the given entries of a run's note."""
    path = note_path(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**read_note(out, name), **content}
    write_atomically(path, (json.dumps(merged) + "\n").encode())


def _note_age(out: Path, name: str) -> float:
    """Return the seconds since a run's note was last written.

    The clocks of the machine that wrote the note and of this one may differ, so the time of the note
    is compared with that of a file which is written now: the file system gives both.
    """
    path = note_path(out, name)
    try:
        # An open file has its present time; a path may have one that NFS remembers.
        with open(path) as note, tempfile.TemporaryFile(dir=path.parent) as new:
            new.write(b" ")
            new.flush()
            os.fsync(new.fileno())
            return os.fstat(new.fileno()).st_mtime - os.fstat(note.fileno()).st_mtime
    except OSError:
        return _age_without_writing(path)


def _age_without_writing(path: Path) -> float:
    """Return the age of a note in a folder that this user cannot write into."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return float("inf")


def _has_launcher(out: Path) -> bool:
    """Return whether a launcher holds the lock of the study's folder; True if that is unknown."""
    try:
        # A shared lock needs no permission to write.
        with open(out / "launch" / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _is_waiting(note: Mapping[str, Any], out: Path) -> bool:
    """Return whether something will start a queued run."""
    # A job stays in SLURM's queue without a launcher.
    return (note.get("on") == "slurm" and "job" in note) or _has_launcher(out)


def saved_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, or 0 if there is none."""
    return Checkpoints(folder / "checkpoints").latest_step() or 0


def run_status(run: StudyRun, out: Path) -> RunStatus:
    """Return the progress of a run."""
    note = read_note(out, run.name)
    folder = out / run.name
    try:
        results = report.read_run(folder)
    except UsageError:
        results = None
    step = int(results.steps[-1]) if results is not None and results.steps.size else 0
    returns, left = {}, None
    if results is not None and step:
        returns = mean_returns(results, -1)
        left = _seconds_left(results.metrics["time"], step, run.config.steps)
    state = note.get("state", "missing")
    if results is not None and _is_finished(run, results, step):
        state, step, left = "done", run.config.steps, None
    elif state == "done" or (state == "running" and _note_age(out, run.name) > NOTE_TIMEOUT):
        state = "stopped"
    elif state == "queued" and not _is_waiting(note, out):
        state = "stopped" if folder.exists() else "missing"
    if state != "running":
        left = None
    message = note.get("message", "") if state in ("failed", "stopped", "running") else ""
    attempts = note.get("attempts", 0)
    return RunStatus(run.name, state, step, run.config.steps, returns, left, attempts, message)


def _is_finished(run: StudyRun, results: report.Run, step: int) -> bool:
    """Return whether all evaluations and the report, which is written last, are there."""
    learners = sum(len(values) for values in results.evals.values())
    if step < run.config.steps or learners < run.config.num_learners:
        return False
    if not (results.folder / "report.html").exists():
        return False
    # The checkpoints of a finished run may have been deleted. If the newest one is of an earlier
    # step, the run is being extended.
    saved = saved_step(results.folder)
    return saved == 0 or saved >= run.config.steps


def _seconds_left(times: list[dict[str, Any]], step: int, steps: int) -> float | None:
    """Estimate the remaining time from the last two evaluations, or from the only one."""
    lines = [line for line in times if line["step"] <= step][-2:]
    if len(lines) == 2:
        seconds = lines[1]["wall_seconds"] - lines[0]["wall_seconds"]
        rate = (lines[1]["step"] - lines[0]["step"]) / seconds if seconds > 0 else 0
    else:
        rate = lines[0]["steps_per_second"] if lines else 0
    return (steps - step) / rate if rate else None


def mean_returns(run: report.Run, index: int) -> dict[str, float]:
    """Return the mean over seeds of each variant's return at an evaluation."""
    return {v: float(interval(values[:, index]).point) for v, values in run.evals.items()}


def format_returns(returns: Mapping[str, float]) -> str:
    """Return the mean return of each variant: "12.3", or "none: 12.3 | scale: 45.6"."""
    several = len(returns) > 1
    return " | ".join(f"{v}: {x:.4g}" if several else f"{x:.4g}" for v, x in returns.items()) or "-"


def table(runs: Iterable[RunStatus]) -> str:
    """Return a table of the runs, and the number of runs in each state."""
    runs = list(runs)
    header = ("run", "state", "step", "return", "time left")
    cells = []
    for run in runs:
        state = f"{run.state} ({run.attempts} starts)" if run.attempts > 1 else run.state
        left = "-" if run.seconds_left is None else duration(run.seconds_left)
        cells.append(
            (run.name, state, f"{run.step:,} of {run.steps:,}", format_returns(run.returns), left)
        )
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *cells]
    ]
    lines += [f"{run.name}: {run.message}" for run in runs if run.message]
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    return "\n".join([*lines, f"{len(runs)} runs: {counts}"])
