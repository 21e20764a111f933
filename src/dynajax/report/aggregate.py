"""One figure over several tasks, as papers show it: IQM of normalised returns with stratified
bootstrap intervals, along training and at its end, and probabilities of improvement.

Agarwal et al. (2021).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dynajax.report import method_table, statistics
from dynajax.report.curves import Curve, Tasks
from dynajax.report.figures import Bars, Panel
from dynajax.report.statistics import ConfidenceInterval

#: The most that an episode of dm_control's tasks gives: 1,000 rewards of at most 1.
DM_CONTROL_MOST = 1000.0


class Aggregate(NamedTuple):
    """A figure over tasks, and its numbers; T evaluations that all curves have."""

    panels: list[Panel | Bars]
    title: str
    rows: list[dict[str, Any]]  # a line for each method and number of frames


def aggregate(tasks: Tasks) -> tuple[Aggregate | None, list[str]]:
    """The methods that have run on all of several tasks, together; or None, and why.

    Returns are divided by 1,000 where all tasks are dm_control's, else by the final IQM of the same
    agent without a model.
    """
    if len(tasks) < 2:
        return None, []
    first = next(iter(tasks.values()))
    broadcast_to_members = [n for n in first if all(n in curves for curves in tasks.values())]
    if not broadcast_to_members:
        return None, ["No method has run on all tasks, so there is no figure over tasks."]
    ends = {task: method_table.compare_at(task, curves)[0] for task, curves in tasks.items()}
    if all(_is_dm_control(task) for task in tasks):
        units = {task: dict.fromkeys(broadcast_to_members, DM_CONTROL_MOST) for task in tasks}
        unit = "return / 1,000"
    else:
        units = {t: method_table.bases(t, curves, ends[t])[0] for t, curves in tasks.items()}
        broadcast_to_members = [
            n for n in broadcast_to_members if all(n in unit for unit in units.values())
        ]
        unit = "return, same agent without a model = 1"
        if not broadcast_to_members:
            return None, ["Returns of these tasks have no common unit: no figure over tasks."]

    def score(name: str, at: dict[str, int]) -> list[np.ndarray]:
        return [tasks[t][name].at(at[t]) / units[t][name] for t in tasks]

    every = [tasks[t][n] for t in tasks for n in broadcast_to_members]
    common = sorted(set.intersection(*map(_complete, every)))
    rows: list[dict[str, Any]] = []
    lines, bands = {}, {}
    for name in broadcast_to_members if common else ():
        points = [
            statistics.stratified_bootstrap(score(name, dict.fromkeys(tasks, f))) for f in common
        ]
        bands[name] = ConfidenceInterval(*map(np.array, zip(*points, strict=True)))
        lines[name] = np.array(common), bands[name].point[None]
        rows += [
            {"variant": name, "tasks": len(tasks), "frames": f}
            | {k: f"{v:.4f}" for k, v in zip(("iqm", "low", "high"), p, strict=True)}
            for f, p in zip(common, points, strict=True)
        ]
    panels: list[Panel | Bars] = []
    if lines:
        x = method_table.unit(every)
        panels.append(
            Panel(lines, f"IQM, {unit}", "Along training", include=0.0, xlabel=x, bands=bands)
        )
    final = {n: statistics.stratified_bootstrap(score(n, ends)) for n in broadcast_to_members}
    panels.append(Bars("At the end", f"IQM, {unit}", final))
    improves = _improvements(tasks, broadcast_to_members, ends)
    if improves:
        panels.append(Bars("Better than without a model", "probability", improves, 0.5, 1.0))
    return Aggregate(panels, f"All {len(tasks)} tasks together", rows), []


def _improvements(
    tasks: Tasks, names: Sequence[str], ends: dict[str, int]
) -> dict[str, ConfidenceInterval]:
    """The probability of improvement over its base of each method whose base has run on all tasks."""
    improves = {}
    for name in names:
        bases = [curves.get(curves[name].base) for curves in tasks.values()]
        known = [b for b in bases if b is not None and b.label != name]
        if len(known) == len(tasks):
            scores = [curves[name].at(ends[t]) for t, curves in tasks.items()]
            theirs = [b.at(ends[t]) for t, b in zip(tasks, known, strict=True)]
            improves[name] = statistics.probability_of_improvement(scores, theirs)
    return improves


def _complete(curve: Curve) -> set[int]:
    """Frames of the evaluations that have a finite return of some seed."""
    finite = np.isfinite(curve.returns).any(0)
    return {int(f) for f in curve.frames[finite]}


def _is_dm_control(task: str) -> bool:
    return ":" not in task and not re.search(r"-v\d+$", task)
