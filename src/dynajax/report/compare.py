"""Runs beside each other, and beside published ones: the folder that experiments/plot.py writes."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynajax.report import aggregate, figures, method_table, published
from dynajax.report.curves import Tasks, gather
from dynajax.report.figures import Panel
from dynajax.runs.directory import write_atomically
from dynajax.types import UsageError


def plot(folders: Sequence[Path], out: Path, methods: str = "") -> str:
    """Writes the comparison of some runs into a folder; gives back the table.

    Args:
      folders: the runs'.
      out: where comparison.png, headline.png, table.csv, table.md and, of several tasks,
        aggregate.png and aggregate.csv go.
      methods: whose published curves are drawn behind, see `published.choose`.

    Raises:
      UsageError: a folder that is no run's, runs that cannot be compared, an unknown method, or an
        `out` that cannot be written.
    """
    keys = published.choose(methods)
    tasks = gather(folders)
    rows, bars, notes = method_table.compare(tasks)
    panels, remarks = curve_panels(tasks, keys)
    together, why = aggregate.aggregate(tasks)
    table = method_table.markdown(rows, [*notes, *remarks, *why])
    title = "Evaluation return: mean over seeds and 95 % t interval"
    title += "; published: mean and standard deviation" if any(p.published for p in panels) else ""
    files = {
        "table.csv": _csv(rows),
        "table.md": table.encode(),
        "comparison.png": figures.png(figures.curves(panels, title=title)),
        "headline.png": figures.png(
            figures.bars(
                bars,
                title="Final return: IQM over seeds, 95 % stratified bootstrap interval",
                note="\n".join(notes),
            )
        ),
    }
    if together is not None:
        picture = figures.mixed(
            together.panels,
            title=f"{together.title}: IQM over tasks and seeds, 95 % stratified bootstrap interval",
        )
        files["aggregate.png"] = figures.png(picture)
        if together.rows:
            files["aggregate.csv"] = _csv(together.rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomically(out / name, data)
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None
    return table


def curve_panels(tasks: Tasks, keys: Sequence[str]) -> tuple[list[Panel], list[str]]:
    """A panel of curves for each task, and what the reader has to know of the published ones."""
    panels, notes, behind = [], [], []
    for task, curves in tasks.items():
        frames, _ = method_table.compare_at(task, curves)
        every = list(curves.values())
        ends = {int(c.frames[-1]) for c in every}
        shown = published.beside(task, keys, max(ends))
        if keys and not shown:
            notes.append(f"{task}: nothing of {_names(keys)} is published here for it.")
        behind += shown
        panels.append(
            Panel(
                {name: (c.frames, c.returns) for name, c in curves.items()},
                figures.RETURN,
                f"{task}, {method_table.protocol(curves, max(ends))}",
                mark=frames if ends != {frames} else None,
                include=0.0,
                xlabel=figures.FRAMES if shown else method_table.unit(every),
                published=shown,
            )
        )
    if behind:
        notes.append(f"Published curves from {'; '.join(published.sources(behind))}.")
    return panels, notes


def _names(keys: Sequence[str]) -> str:
    names = list(dict.fromkeys(published.METHODS[key].name for key in keys))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
