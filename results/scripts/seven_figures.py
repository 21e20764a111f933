"""Draw the study on seven tasks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynajax.report import figures, published, statistics
from seven_claims import final, shared
from seven_runs import ARMS, TASKS, Curve, Learner, Metric, clipped_r2

#: Reference lines: tasks and published methods.
REFERENCES = {task: ["simba-utd8"] for task in TASKS[:4]} | {
    task: ["simba-utd8", "wimle"] for task in TASKS[4:]
}
#: Names of the arms in figures.
LABELS = {name: name for name in ARMS} | {"FTFL": "MBPO + scale, target (FTFL)"}


def draw(found: Sequence[Learner]) -> Any:
    """Draw returns by frames on each task, and their IQM over tasks."""
    end = max(int(x.frames[-1]) for x in found)
    panels: list[figures.Panel] = []
    references: list[published.Published] = []
    for task in TASKS:
        lines = {
            label: _stack([Curve(x.frames, x.returns) for x in side])
            for label, side in _by_arm(found, task).items()
        }
        if lines:
            curves = published.curves_until(task, REFERENCES[task], end)
            references += curves
            panels.append(
                figures.Panel(
                    lines,
                    figures.RETURN,
                    task,
                    xlabel=figures.FRAMES,
                    floor=0.0,
                    include=0.0,
                    bounds=(0.0, 1000.0),
                    published=curves,
                )
            )
    note = f"{figures.LINES} of the mean; of the IQM (interquartile mean): 95 % bootstrap interval."
    if better := [
        f"{LABELS[name]} {statistics.format_interval(x.improvement)}"
        for name, x in final(found).items()
        if x.improvement
    ]:
        note += f"\nProbability of improvement over model-free at the end: {'; '.join(better)}."
    if references:
        note += f"\nPublished: {'; '.join(published.labels(references).values())}."
    return figures.curves([*panels, *_aggregate(found)], note=note)


def _aggregate(found: Sequence[Learner]) -> list[figures.Panel]:
    """Return a panel with the IQM over the tasks that all arms share, if there are any."""
    names = [name for name in ARMS if any(x.arm == name for x in found)]
    tasks = shared(found, names)
    if not tasks:
        return []
    lines, bands = {}, {}
    for name in names:
        sides = [[x for x in found if (x.task, x.arm) == (t, name)] for t in tasks]
        returns = [np.array([x.returns for x in side]) / 1000 for side in sides]
        steps = range(returns[0].shape[1])
        points = [statistics.stratified_bootstrap([r[:, i] for r in returns]) for i in steps]
        band = statistics.ConfidenceInterval(*np.array(points).T)
        lines[LABELS[name]] = (sides[0][0].frames, np.asarray(band.point)[None])
        bands[LABELS[name]] = band
    title = f"All {len(tasks)} tasks" if len(tasks) == len(TASKS) else f"{len(tasks)} tasks"
    return [
        figures.Panel(
            lines,
            "IQM of return / 1000",
            title,
            xlabel=figures.FRAMES,
            floor=0.0,
            include=0.0,
            bands=bands,
        )
    ]


def draw_mechanism(found: Sequence[Learner], metric: Metric) -> Any:
    """Draw a metric by frames on each task."""
    is_r2 = metric.value is clipped_r2
    panels = []
    for task in TASKS:
        lines = {}
        for label, side in _by_arm(found, task).items():
            if curves := [x.mechanism[metric.name] for x in side if metric.name in x.mechanism]:
                lines[label] = _stack(curves)
        if lines:
            panels.append(
                figures.Panel(
                    lines,
                    metric.title,
                    task,
                    xlabel=figures.FRAMES,
                    include=0.0,
                    bounds=statistics.R2 if is_r2 else statistics.UNBOUNDED,
                )
            )
    return figures.curves(panels, note=figures.LINES + " of the mean.")


def _by_arm(found: Sequence[Learner], task: str) -> dict[str, list[Learner]]:
    """Return the learners of a task by the labels of their arms."""
    sides = {name: [x for x in found if (x.task, x.arm) == (task, name)] for name in ARMS}
    return {LABELS[name]: side for name, side in sides.items() if side}


def _stack(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Return all frames (T,) of some curves and their values (curves, T), NaN where one has none."""
    frames = np.unique(np.concatenate([curve.frames for curve in curves]))
    values = np.full((len(curves), len(frames)), np.nan)
    for row, curve in zip(values, curves, strict=True):
        row[np.searchsorted(frames, curve.frames)] = curve.values
    return frames, values
