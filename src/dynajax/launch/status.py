"""How far the runs of a study are, told from their folders by whoever asks.

What is finished is read from the runs themselves. What is under way is in a small file for each,
`launch/NAME.json` in the study's folder, which whoever runs it keeps up to date.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynajax import report
from dynajax.launch.study import StudyRun
from dynajax.runs.checkpoint import Checkpoints
from dynajax.runs.directory import write_atomically
from dynajax.runs.progress import duration
from dynajax.types import UsageError

#: What every note has, and the kinds of what else is read of one.
_NOTED = {"time": int | float, "state": str, "attempts": int, "message": str, "job": str}
#: Seconds between two signs of life, and without one until a run counts as stopped.
BEAT, SILENCE = 10.0, 60.0


class RunStatus(NamedTuple):
    """A run as the table shows it."""

    name: str
    state: str  # done, running, queued, stopped, failed, or missing (not begun)
    step: int
    steps: int
    returns: dict[str, float]  # variant -> mean over seeds
    left: float | None  # seconds
    attempts: int
    message: str


def note_path(out: Path, name: str) -> Path:
    return out / "launch" / f"{name}.json"


def read_note(out: Path, name: str) -> dict[str, Any]:
    """What was last noted about a run; empty if nothing was, or the file is damaged."""
    try:
        note = json.loads(note_path(out, name).read_text())
    except (OSError, ValueError):
        return {}
    whole = isinstance(note, dict) and "time" in note
    if not whole or not all(isinstance(note[key], _NOTED.get(key, object)) for key in note):
        return {}
    return note


def write_note(out: Path, name: str, **content: Any) -> None:
    """Notes something about a run; what is not given stays."""
    path = note_path(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**read_note(out, name), **content, "time": time.time()}
    write_atomically(path, (json.dumps(merged) + "\n").encode())


def saved_step(folder: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    return Checkpoints(folder / "checkpoints").latest_step() or 0


def look(run: StudyRun, out: Path) -> RunStatus:
    """How far a run is."""
    note = read_note(out, run.name)
    folder = out / run.name
    try:
        written = report.read_run(folder)
    except UsageError:
        written = None
    step = int(written.steps[-1]) if written is not None and written.steps.size else 0
    returns, left = {}, None
    if written is not None and step:
        returns = {v: float(np.nanmean(values[:, -1])) for v, values in written.evals.items()}
        left = _seconds_left(written.metrics["time"], step, run.config.steps)
    state = note.get("state", "missing")
    if written is not None and _finished(run, written, step):
        state, step, left = "done", run.config.steps, None
    elif state == "done" or (state == "running" and time.time() - note["time"] > SILENCE):
        state = "stopped"
    if state != "running":
        left = None
    message = note.get("message", "") if state in ("failed", "stopped", "running") else ""
    attempts = note.get("attempts", 0)
    return RunStatus(run.name, state, step, run.config.steps, returns, left, attempts, message)


def _finished(run: StudyRun, written: report.Run, step: int) -> bool:
    """All evaluations are there, and the page, which is written last."""
    rows = sum(len(values) for values in written.evals.values())
    if step < run.config.steps or rows < run.config.num_learners:
        return False
    if not (written.folder / "report.html").exists():
        return False
    # Checkpoints of a finished run may be deleted; older ones say that it is being extended.
    saved = saved_step(written.folder)
    return saved == 0 or saved >= run.config.steps


def _seconds_left(times: list[dict[str, Any]], step: int, steps: int) -> float | None:
    """From the rate between the last two evaluations, or of the only one."""
    lines = [line for line in times if line["step"] <= step][-2:]
    if len(lines) == 2:
        seconds = lines[1]["wall_seconds"] - lines[0]["wall_seconds"]
        rate = (lines[1]["step"] - lines[0]["step"]) / seconds if seconds > 0 else 0
    else:
        rate = lines[0]["steps_per_second"] if lines else 0
    return (steps - step) / rate if rate else None


def table(rows: Iterable[RunStatus]) -> str:
    """The runs in columns, and how many are in which state."""
    rows = list(rows)
    header = ("run", "state", "step", "return", "time left")
    cells = []
    for row in rows:
        several = len(row.returns) > 1
        scores = (f"{v} {x:.4g}" if several else f"{x:.4g}" for v, x in row.returns.items())
        state = f"{row.state} ({row.attempts} starts)" if row.attempts > 1 else row.state
        left = "-" if row.left is None else duration(row.left)
        cells.append(
            (row.name, state, f"{row.step:,} of {row.steps:,}", " | ".join(scores) or "-", left)
        )
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *cells]
    ]
    lines += [f"{row.name}: {row.message}" for row in rows if row.message]
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    return "\n".join([*lines, f"{len(rows)} runs: {counts}"])
