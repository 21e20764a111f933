"""Methods side by side: what each came to, beside the same agent without a model.

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

#: What a curve's base is, in words.
BASE = "same agent without a model = 100"
#: What the table's last columns are.
_COLUMNS = (
    '"It" is the same agent without a model. P: probability that a seed has the higher final return. '
    "Sample efficiency: frames in which it first comes to its last mean return, over those in which "
    "this method does; 0 where this one does not."
)
#: Columns of an estimate.
_PARTS = ("", "_low", "_high")
_NOTHING = ConfidenceInterval(np.nan, np.nan, np.nan)


def unit(curves: Sequence[Curve]) -> str:
    """What the x axis of some curves counts."""
    return figures.FRAMES if any(c.run.repeat > 1 for c in curves) else figures.STEPS


def compare_at(task: str, curves: dict[str, Curve]) -> tuple[int, list[str]]:
    """The most frames at which all curves of a task have an evaluation, and what the reader has to
    know of the comparison.

    Raises:
      UsageError: there is no such evaluation.
    """
    count = unit(list(curves.values())).removeprefix("environment ")
    common = set.intersection(*(set(c.frames.tolist()) for c in curves.values()))
    if not common:
        raise UsageError(f"{task}: its runs have no evaluation step in common")
    frames = max(common)
    notes = []
    ends = sorted({int(c.frames[-1]) for c in curves.values()})
    presets = sorted({c.run.config["preset"] for c in curves.values()})
    if len(ends) > 1:
        notes.append(
            f"{task}: compared at {frames:,} {count}, the largest that all runs have "
            f"(they end at {' and '.join(f'{e:,}' for e in ends)})."
        )
    if len(presets) > 1:
        notes.append(
            f"{task}: presets {' and '.join(presets)} are mixed, compared at {frames:,} {count}."
        )
    for name, curve in curves.items():
        lost = len(curve.returns) - len(curve.at(frames))
        if lost == len(curve.returns):
            raise UsageError(f"{task}: {name} has no finite return at {frames:,} {count}")
        if lost:
            notes.append(f"{task}: {name} has {lost} seeds without a finite return, left out.")
    return frames, notes


def bases(task: str, curves: dict[str, Curve], frames: int) -> tuple[dict[str, float], list[str]]:
    """The IQM of every curve's base, by the curve's label, where there is a positive one; and what
    the reader has to know of those that are missing."""
    values, notes = {}, []
    for name, curve in curves.items():
        base = curves.get(curve.base)
        iqm = float(statistics.iqm(base.at(frames))) if base is not None else 0.0
        if base is None:
            notes.append(
                f"{task}: no run of {curve.base} without a model, so raw returns are shown."
            )
        elif iqm <= 0:
            notes.append(
                f"{task}: {curve.base}'s return is not positive, so raw returns are shown."
            )
        else:
            values[name] = iqm
    return values, list(dict.fromkeys(notes))


def compare(tasks: Tasks) -> tuple[list[dict[str, Any]], list[Bars], list[str]]:
    """The table's lines, the headline figure's panels, and what the reader has to know of both."""
    rows: list[dict[str, Any]] = []
    panels, notes = [], []
    for task, curves in tasks.items():
        frames, remarks = compare_at(task, curves)
        base, missing = bases(task, curves, frames)
        notes += [*remarks, *missing]
        final = {name: curve.at(frames) for name, curve in curves.items()}
        # Bars of one panel have one unit.
        whole = len(base) == len(curves)
        shown = {n: 100 * final[n] / base[n] for n in base} if whole else final
        panels.append(
            Bars(
                f"{task}\n{protocol(curves, frames)}",
                f"final return, {BASE}" if whole else "final return",
                {n: statistics.stratified_bootstrap([v]) for n, v in shown.items()},
                100.0 if whole else None,
            )
        )
        rows += [
            _row(curves[name], values, frames, base.get(name), curves.get(curves[name].base))
            for name, values in final.items()
        ]
    if any(row["seeds"] == 1 for row in rows):
        notes.append("One seed has no interval.")
    if any(1 < row["seeds"] < 5 for row in rows):
        notes.append("With fewer than 5 seeds bootstrap intervals come out too narrow.")
    return rows, panels, notes


def _row(
    curve: Curve, values: np.ndarray, frames: int, base_iqm: float | None, base: Curve | None
) -> dict[str, Any]:
    """A line of the table."""
    raw, run = statistics.stratified_bootstrap([values]), curve.run
    row = {
        "task": curve.task,
        "variant": curve.label,
        "preset": run.config["preset"],
        "steps": frames // run.repeat,
        "frames": frames,
        "seeds": len(values),
        "final_iqm": f"{raw.point:.2f}",
        "low": _number(raw.low),
        "high": _number(raw.high),
        "model_free_100": "" if base_iqm is None else f"{100 * raw.point / base_iqm:.1f}",
    }
    improves = fewer = _NOTHING
    if base is not None and base is not curve:
        improves = statistics.probability_of_improvement([values], [base.at(frames)])
        whole, base_whole = curve.until(frames), base.until(frames)
        if len(whole[1]) and len(base_whole[1]):
            fewer = statistics.sample_efficiency(*whole, *base_whole)
    for name, estimate in (("improves", improves), ("efficiency", fewer)):
        row |= {f"{name}{part}": _number(v) for part, v in zip(_PARTS, estimate, strict=True)}
    return row


def protocol(curves: dict[str, Curve], frames: int) -> str:
    """What a title has to say beside the task: "preset quick, 10k steps"."""
    presets = "+".join(sorted({c.run.config["preset"] for c in curves.values()}))
    count = unit(list(curves.values())).removeprefix("environment ")
    return f"preset {presets}, {f'{frames / 1000:g}k' if frames >= 1000 else frames} {count}"


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else ""


def _range(row: dict[str, Any], name: str) -> str:
    point, low, high = (row[name + part] for part in _PARTS)
    return (f"{point} ({low} to {high})" if low else point) or "-"


def markdown(rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    """The table as people read it, in columns that line up in a terminal too."""
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
        "beats it with P",
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
            f"{float(r['final_iqm']):,.1f}",
            f"{float(r['low']):,.1f} to {float(r['high']):,.1f}" if r["low"] else "-",
            r["model_free_100"] or "-",
            _range(r, "improves"),
            _range(r, "efficiency"),
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
    rule = (
        "|"
        + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
        + "|"
    )
    table = "\n".join([lines[0], rule, *lines[1:]])
    notes = [*([_COLUMNS] if any(row["improves"] for row in rows) else []), *notes]
    return table + "\n" + "".join(f"\n{note}\n" for note in notes)
