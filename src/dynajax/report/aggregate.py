"""Aggregate returns over several tasks, as papers do.

The IQM of normalised returns with stratified bootstrap intervals, over training and at its end, and
probabilities of improvement (Agarwal et al., 2021).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynajax.report import method_table, statistics
from dynajax.report.curves import Tasks
from dynajax.report.figures import Bars, Panel
from dynajax.report.methods import method_changes
from dynajax.report.run import DM_CONTROL_RETURNS, is_dm_control
from dynajax.report.statistics import ConfidenceInterval

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
    methods, notes = _methods(tasks)
    if len(methods) < 2:
        text = "No two methods have run on all tasks, so there is no figure over tasks."
        return None, [*notes, text]
    ends = {task: method_table.common_frames(task, curves)[0] for task, curves in tasks.items()}
    units, unit = _units(tasks, ends, methods)
    methods = [name for name in methods if all(name in of_task for of_task in units.values())]
    if not methods:
        return None, [*notes, "Returns of these tasks have no common unit: no figure over tasks."]

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
    return Aggregate(panels, f"All {len(tasks)} tasks", rows), notes


def _methods(tasks: Tasks) -> tuple[list[str], list[str]]:
    """Return the methods that have run on all tasks, and notes on those with different settings."""
    first, *others = tasks.values()
    methods, notes = [], []
    for name in (n for n in first if all(n in curves for curves in others)):
        configs = [curves[name].run.config for curves in tasks.values()]
        changed = {c for config in configs for c in method_changes(configs[0], config)}
        if changed:
            different = ", ".join(sorted(changed))
            notes.append(f"{name} is left out of the figure over tasks: {different} on some tasks.")
        else:
            methods.append(name)
    return methods, notes


def _units(
    tasks: Tasks, ends: Mapping[str, int], methods: Sequence[str]
) -> tuple[dict[str, dict[str, float]], str]:
    """Return what to divide returns by, task -> method -> unit, and the unit's name."""
    if all(is_dm_control(task) for task in tasks):
        most = DM_CONTROL_RETURNS[1]
        return {task: dict.fromkeys(methods, most) for task in tasks}, "return / 1,000"
    units = {t: method_table.baseline_iqms(t, curves, ends[t])[0] for t, curves in tasks.items()}
    return units, "return, same agent, model-free = 1"


def _over_training(
    tasks: Tasks, methods: Sequence[str], scores: _Scores
) -> tuple[Panel | None, list[dict[str, Any]]]:
    """Return the IQM over the frames that all curves cover, as a panel and as rows."""
    curves = [of_task[name] for of_task in tasks.values() for name in methods]
    # More points than the curve with the fewest evaluations has would only be interpolated.
    fewest = min(curves, key=lambda c: len(c.frames))
    common = [int(f) for f in fewest.frames if all(c.at(int(f)).size for c in curves)]
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
