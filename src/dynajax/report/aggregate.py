"""Aggregate returns over several tasks, as papers do.

The IQM of normalised returns with stratified bootstrap intervals, over training and at its end, and
probabilities of improvement (Agarwal et al., 2021).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynajax.report import method_table, statistics
from dynajax.report.curves import Curve, Tasks
from dynajax.report.figures import Bars, Panel
from dynajax.report.statistics import ConfidenceInterval

#: The highest return of an episode in the tasks of dm_control: 1,000 rewards of at most 1.
DM_CONTROL_MOST = 1000.0
#: (method, task -> frames) -> normalised returns (seeds,) for each task.
_Scores = Callable[[str, Mapping[str, int]], list[np.ndarray]]


class Aggregate(NamedTuple):
    """A figure over several tasks, and its numbers."""

    panels: list[Panel | Bars]
    title: str
    rows: list[dict[str, Any]]  # one for each method and evaluation that all curves have


def aggregate(tasks: Tasks) -> tuple[Aggregate | None, list[str]]:
    """Aggregate the methods that have run on all tasks.

    Returns are divided by 1,000 if all tasks are from dm_control, else by the final IQM of the
    same agent without a model.

    Returns:
      None if there are too few tasks or no method qualifies; notes that say why.
    """
    if len(tasks) < 2:
        return None, []
    methods = [
        name
        for name in next(iter(tasks.values()))
        if all(name in curves for curves in tasks.values())
    ]
    if not methods:
        return None, ["No method has run on all tasks, so there is no figure over tasks."]
    ends = {task: method_table.common_frames(task, curves)[0] for task, curves in tasks.items()}
    units, unit = _units(tasks, ends, methods)
    methods = [name for name in methods if all(name in of_task for of_task in units.values())]
    if not methods:
        return None, ["Returns of these tasks have no common unit: no figure over tasks."]

    def scores(name: str, at: Mapping[str, int]) -> list[np.ndarray]:
        return [tasks[t][name].at(at[t]) / units[t][name] for t in tasks]

    panels: list[Panel | Bars] = []
    over_training, rows = _over_training(tasks, methods, scores)
    if over_training is not None:
        panels.append(over_training._replace(ylabel=f"IQM, {unit}"))
    final = {n: statistics.stratified_bootstrap(scores(n, ends)) for n in methods}
    panels.append(Bars("Final return", f"IQM, {unit}", final))
    improvements = _improvements(tasks, methods, ends)
    if improvements:
        title = "Improvement over model-free"
        panels.append(Bars(title, "probability", improvements, 0.5, 1.0))
    return Aggregate(panels, f"All {len(tasks)} tasks", rows), []


def _units(
    tasks: Tasks, ends: Mapping[str, int], methods: Sequence[str]
) -> tuple[dict[str, dict[str, float]], str]:
    """Return what to divide returns by, task -> method -> unit, and the unit's name."""
    if all(_is_dm_control(task) for task in tasks):
        return {task: dict.fromkeys(methods, DM_CONTROL_MOST) for task in tasks}, "return / 1,000"
    units = {t: method_table.baseline_iqms(t, curves, ends[t])[0] for t, curves in tasks.items()}
    return units, "return, same agent, model-free = 1"


def _over_training(
    tasks: Tasks, methods: Sequence[str], scores: _Scores
) -> tuple[Panel | None, list[dict[str, Any]]]:
    """Return the IQM at each evaluation that all curves have, as a panel and as rows."""
    curves = [of_task[name] for of_task in tasks.values() for name in methods]
    common = sorted(set.intersection(*map(_complete, curves)))
    if not common:
        return None, []
    rows: list[dict[str, Any]] = []
    lines, bands = {}, {}
    for name in methods:
        points = [
            statistics.stratified_bootstrap(scores(name, dict.fromkeys(tasks, f))) for f in common
        ]
        bands[name] = ConfidenceInterval(*map(np.array, zip(*points, strict=True)))
        lines[name] = np.array(common), bands[name].point[None]
        rows += [
            {"variant": name, "tasks": len(tasks), "frames": f}
            | {k: f"{v:.4f}" for k, v in zip(("iqm", "low", "high"), p, strict=True)}
            for f, p in zip(common, points, strict=True)
        ]
    x = method_table.x_label(curves)
    return Panel(lines, "IQM", "Over training", include=0.0, xlabel=x, bands=bands), rows


def _improvements(
    tasks: Tasks, names: Sequence[str], ends: Mapping[str, int]
) -> dict[str, ConfidenceInterval]:
    """Return the probability of improvement of each method whose baseline has run on all tasks."""
    improvements = {}
    for name in names:
        baselines = [curves.get(curves[name].baseline) for curves in tasks.values()]
        known = [b for b in baselines if b is not None and b.label != name]
        if len(known) == len(tasks):
            scores = [curves[name].at(ends[t]) for t, curves in tasks.items()]
            base = [b.at(ends[t]) for t, b in zip(tasks, known, strict=True)]
            improvements[name] = statistics.probability_of_improvement(scores, base)
    return improvements


def _complete(curve: Curve) -> set[int]:
    """Return the frames of the evaluations in which some seed has a finite return."""
    finite = np.isfinite(curve.returns).any(0)
    return {int(f) for f in curve.frames[finite]}


def _is_dm_control(task: str) -> bool:
    return ":" not in task and not re.search(r"-v\d+$", task)
