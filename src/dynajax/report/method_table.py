"""Tabulate the final return of each method, relative to the same agent without a model.

Agarwal et al. (2021) for the interquartile mean, its interval, and the probability of improvement.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynajax.report import figures, statistics
from dynajax.report.curves import Curve, Tasks
from dynajax.report.figures import Bars
from dynajax.report.statistics import ConfidenceInterval
from dynajax.types import UsageError

#: The unit of returns relative to the baseline.
BASELINE_UNIT = "model-free = 100"
_EXACT = "The intervals of returns relative to model-free take the IQM of model-free as exact."
#: Explanation of the last columns of the table.
_COLUMNS = (
    "The baseline of a method is the same agent, model-free. P(improvement): probability that a "
    "seed of the method has a higher final return than a seed of the baseline. Sample efficiency: "
    "frames in which the baseline first reaches its last mean return, divided by the frames in "
    "which the method reaches it; 0 if it never does."
)
#: Suffixes of the columns of an estimate.
_PARTS = ("", "_low", "_high")
_UNKNOWN = ConfidenceInterval(np.nan, np.nan, np.nan)


def x_label(curves: Sequence[Curve]) -> str:
    """Return what the x axis of some curves counts."""
    return figures.FRAMES if any(c.run.repeat > 1 for c in curves) else figures.STEPS


def common_frames(task: str, curves: dict[str, Curve]) -> tuple[int, list[str]]:
    """Return the largest number of frames that all curves of a task cover, and notes on them.

    Raises:
      UsageError: there is no such number, or a curve has no finite return there.
    """
    count = x_label(list(curves.values()))
    last = min(curves.values(), key=lambda c: int(c.frames[-1]))
    late = max(curves.values(), key=lambda c: int(c.frames[0]))
    frames = int(last.frames[-1])
    if frames < late.frames[0]:
        raise UsageError(
            f"{task}: {last.label} ends at {frames:,} {count}, before the first evaluation of "
            f"{late.label} at {int(late.frames[0]):,}; compare them when it has been trained longer"
        )
    notes = [note for curve in curves.values() for note in curve.notes]
    ends = sorted({int(c.frames[-1]) for c in curves.values()})
    presets = sorted({c.run.config["preset"] for c in curves.values()})
    if len(ends) > 1:
        notes.append(
            f"{task}: compared at {frames:,} {count}, the largest number that all runs have "
            f"(they end at {' and '.join(f'{e:,}' for e in ends)})."
        )
    if any(frames not in c.frames for c in curves.values()):
        notes.append(f"{task}: returns between two evaluations are interpolated linearly.")
    if len(presets) > 1:
        notes.append(
            f"{task}: runs of presets {' and '.join(presets)}, compared at {frames:,} {count}."
        )
    for name, curve in curves.items():
        lost = len(curve.returns) - len(curve.at(frames))
        if lost == len(curve.returns):
            raise UsageError(f"{task}: {name} has no finite return at {frames:,} {count}")
        if lost:
            notes.append(f"{task}: {lost} seeds of {name} have no finite return and are left out.")
    return frames, notes


def baseline_iqms(
    task: str, curves: dict[str, Curve], frames: int
) -> tuple[dict[str, float], list[str]]:
    """Return the IQM of each curve's baseline, by the label of the curve, and notes.

    Curves without a baseline, or whose baseline has no positive IQM, are left out and noted.
    """
    values, notes = {}, []
    for name, curve in curves.items():
        baseline = curves.get(curve.baseline)
        iqm = float(statistics.iqm(baseline.at(frames))) if baseline is not None else 0.0
        if baseline is None:
            notes.append(f"{task}: there is no run of {curve.baseline}, so raw returns are shown.")
        elif iqm <= 0:
            notes.append(
                f"{task}: the return of {curve.baseline} is not positive, so raw returns are shown."
            )
        else:
            values[name] = iqm
    return values, list(dict.fromkeys(notes))


def compare(tasks: Tasks) -> tuple[list[dict[str, Any]], list[Bars], list[str]]:
    """Return the rows of the table, the panels of the headline figure, and notes on both."""
    rows: list[dict[str, Any]] = []
    panels, notes = [], []
    for task, curves in tasks.items():
        frames, frame_notes = common_frames(task, curves)
        iqms, baseline_notes = baseline_iqms(task, curves, frames)
        notes += [*frame_notes, *baseline_notes, *_efficiency_notes(task, curves, frames)]
        final = {name: curve.at(frames) for name, curve in curves.items()}
        # All bars of a panel have the same unit.
        relative = len(iqms) == len(curves)
        shown = {n: 100 * final[n] / iqms[n] for n in iqms} if relative else final
        panels.append(
            Bars(
                f"{task}\n{_thousands(frames)} {x_label(list(curves.values()))}",
                f"final return, {BASELINE_UNIT}" if relative else "final return",
                {n: statistics.stratified_bootstrap([v]) for n, v in shown.items()},
                100.0 if relative else None,
            )
        )
        rows += [
            _row(curves[name], values, frames, iqms.get(name), curves.get(curves[name].baseline))
            for name, values in final.items()
        ]
    if any(panel.reference is not None for panel in panels):
        notes.append(_EXACT)
    if any(row["seeds"] == 1 for row in rows):
        notes.append("A single seed has no interval.")
    if any(1 < row["seeds"] < 5 for row in rows):
        notes.append("With fewer than 5 seeds, bootstrap intervals are too narrow.")
    return rows, panels, notes


def _efficiency_notes(task: str, curves: dict[str, Curve], frames: int) -> list[str]:
    """Return a note on each curve whose sample efficiency has fewer seeds than its final return."""
    notes = []
    pairs = [(name, c.baseline) for name, c in curves.items() if c.baseline in curves]
    for name in dict.fromkeys(n for pair in pairs if len(set(pair)) == 2 for n in pair):
        # A final return needs one evaluation of a seed, and its curve all of them.
        seeds, whole = (len(v) for v in (curves[name].at(frames), curves[name].until(frames)[1]))
        if whole < seeds:
            notes.append(
                f"{task}: sample efficiency leaves out {seeds - whole} of {seeds} seeds of {name}, "
                "because a return before the last is not finite."
            )
    return notes


def _row(
    curve: Curve,
    values: np.ndarray,
    frames: int,
    baseline_iqm: float | None,
    baseline: Curve | None,
) -> dict[str, Any]:
    """Return a row of table.csv."""
    raw, run = statistics.stratified_bootstrap([values]), curve.run
    row = {
        "task": curve.task,
        "variant": curve.label,
        "preset": run.config["preset"],
        "steps": round(float(np.interp(frames, run.frames, run.steps))),
        "frames": frames,
        "seeds": len(values),
        # Significant digits, because the returns of a task may be small.
        "final_iqm": f"{raw.point:.6g}",
        "low": _number(raw.low, ".6g"),
        "high": _number(raw.high, ".6g"),
        "model_free_100": "" if baseline_iqm is None else f"{100 * raw.point / baseline_iqm:.1f}",
    }
    improvement = efficiency = _UNKNOWN
    if baseline is not None and baseline is not curve:
        improvement = statistics.probability_of_improvement([values], [baseline.at(frames)])
        own, base = curve.until(frames), baseline.until(frames)
        if len(own[1]) and len(base[1]):
            efficiency = statistics.sample_efficiency(*own, *base)
    for name, estimate in (
        ("probability_of_improvement", improvement),
        ("sample_efficiency", efficiency),
    ):
        row |= {f"{name}{part}": _number(v) for part, v in zip(_PARTS, estimate, strict=True)}
    return row


def _thousands(count: int) -> str:
    return f"{count / 1000:g}k" if count >= 1000 else str(count)


def _number(value: float, form: str = ".2f") -> str:
    return format(value, form) if np.isfinite(value) else ""


def _return(text: str) -> str:
    return statistics.format_number(float(text))


def _estimate(row: dict[str, Any], name: str) -> str:
    point, low, high = (row[name + part] for part in _PARTS)
    return (f"{point} ({low} to {high})" if low else point) or "-"


def markdown(rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    """Return the table as Markdown whose columns line up in a terminal, followed by notes."""
    header = [
        "task",
        "variant",
        "preset",
        "steps",
        "frames",
        "seeds",
        "final IQM",
        "95 % interval",
        "model-free = 100",
        "P(improvement)",
        "sample efficiency",
    ]
    cells = [
        [
            r["task"],
            r["variant"],
            r["preset"],
            f"{r['steps']:,}",
            f"{r['frames']:,}",
            str(r["seeds"]),
            _return(r["final_iqm"]),
            f"{_return(r['low'])} to {_return(r['high'])}" if r["low"] else "-",
            r["model_free_100"] or "-",
            _estimate(r, "probability_of_improvement"),
            _estimate(r, "sample_efficiency"),
        ]
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [False] * 3 + [True] * 8
    lines = [
        "| "
        + " | ".join(
            text.rjust(w) if r else text.ljust(w)
            for text, w, r in zip(row, widths, right, strict=True)
        )
        + " |"
        for row in [header, *cells]
    ]
    rule = "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    table = "\n".join([lines[0], f"|{rule}|", *lines[1:]])
    explained = any(row["probability_of_improvement"] for row in rows)
    notes = [*([_COLUMNS] if explained else []), *notes]
    return table + "\n" + "".join(f"\n{note}\n" for note in notes)
