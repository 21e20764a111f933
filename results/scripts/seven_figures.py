"""Draw the study on seven tasks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynajax.report import figures, published, statistics
from seven_claims import BOOTSTRAP, final, shared
from seven_runs import ARMS, TASKS, Curve, Learner, Metric, clipped_r2

#: Published methods drawn as reference lines, where they have evaluations within the study's frames.
REFERENCES = ("simba", "simba-utd8", "wimle")
#: Number of seeds from which on the interval of a task is shaded: that of the arms of MBPO.
MIN_SEEDS = 3
#: Names of the arms in figures.
LABELS = {name: name for name in ARMS} | {"FTFL": "MBPO + scale, target (FTFL)"}


def draw(found: Sequence[Learner]) -> Any:
    """Draw returns by frames on each task, and their IQM over tasks."""
    end = max(int(x.frames[-1]) for x in found)
    panels: list[figures.Panel] = []
    references: list[published.Published] = []
    for task in TASKS:
        lines = {
            label: (side[0].frames, np.stack([x.returns for x in side]))
            for label, side in _by_arm(found, task).items()
        }
        if lines:
            curves = published.curves_until(task, REFERENCES, end)
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
                    min_seeds=MIN_SEEDS,
                )
            )
    note = (
        f"{figures.lines_meaning(MIN_SEEDS)} of the mean. Over tasks: the interquartile mean (IQM), and "
        f"the probability that a seed ends above one of its model-free baseline, with 95 % {BOOTSTRAP}."
    )
    if references:
        note += f"\nPublished: {'; '.join(published.labels(references).values())}."
    return figures.curves([*panels, *_aggregate(found), *_improvement(found)], note=note)


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


def _improvement(found: Sequence[Learner]) -> list[figures.Bars]:
    """Return a panel with the probability of improvement over the baseline, if there is any."""
    values = {LABELS[name]: x.improvement for name, x in final(found).items() if x.improvement}
    if not values:
        return []
    title, label = "Improvement", "probability"
    return [figures.Bars(title, label, values, reference=0.5, most=1.0, label_width=16)]


def draw_mechanism(found: Sequence[Learner], metric: Metric) -> Any:
    """Draw a metric by frames on each task, the median of each learner between two evaluations."""
    is_r2 = metric.value is clipped_r2
    panels = []
    for task in TASKS:
        lines = {}
        for label, side in _by_arm(found, task).items():
            if curves := [x.mechanism[metric.name] for x in side if metric.name in x.mechanism]:
                evaluated = side[0].frames
                lines[label] = evaluated, np.stack([_medians(c, evaluated) for c in curves])
        if lines:
            panels.append(
                figures.Panel(
                    lines,
                    metric.title,
                    task,
                    xlabel=figures.FRAMES,
                    include=0.0,
                    bounds=statistics.R2 if is_r2 else statistics.UNBOUNDED,
                    min_seeds=MIN_SEEDS,
                )
            )
    note = f"{figures.lines_meaning(MIN_SEEDS)} of the mean."
    if is_r2:
        note += " R² below -1 counts as -1."
    return figures.curves(panels, note=note)


def _medians(curve: Curve, evaluated: np.ndarray) -> np.ndarray:
    """Return the median (T,) of a curve after one evaluation's frames (T,) and up to the next one's.

    NaN where it has no value.
    """
    interval = np.searchsorted(evaluated, curve.frames)
    parts = [curve.values[interval == i] for i in range(len(evaluated))]
    return np.array([np.median(part) if part.size else np.nan for part in parts])


def _by_arm(found: Sequence[Learner], task: str) -> dict[str, list[Learner]]:
    """Return the learners of a task by the labels of their arms."""
    sides = {name: [x for x in found if (x.task, x.arm) == (task, name)] for name in ARMS}
    return {LABELS[name]: side for name, side in sides.items() if side}
