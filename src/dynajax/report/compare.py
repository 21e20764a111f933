"""Compare runs with each other and with published results: what `dynajax plot` writes."""

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
    """Write the comparison of some runs into a folder and return its table as Markdown.

    Args:
      folders: run directories.
      out: where comparison.png, headline.png, table.csv, table.md and, for several tasks,
        aggregate.png and aggregate.csv go.
      methods: whose published curves are drawn too, see `published.parse_methods`.

    Raises:
      UsageError: a folder is not a run directory, the runs cannot be compared, a method is
        unknown, or `out` cannot be written.
    """
    keys = published.parse_methods(methods)
    tasks = gather(folders)
    rows, bars, notes = method_table.compare(tasks)
    panels, curve_notes = curve_panels(tasks, keys)
    over_tasks, aggregate_notes = aggregate.aggregate(tasks)
    table = method_table.markdown(rows, [*notes, *curve_notes, *aggregate_notes])
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
    if over_tasks is not None:
        figure = figures.mixed(
            over_tasks.panels,
            title=f"{over_tasks.title}: IQM over tasks and seeds, 95 % stratified bootstrap interval",
        )
        files["aggregate.png"] = figures.png(figure)
        if over_tasks.rows:
            files["aggregate.csv"] = _csv(over_tasks.rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomically(out / name, data)
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None
    return table


def curve_panels(tasks: Tasks, keys: Sequence[str]) -> tuple[list[Panel], list[str]]:
    """Return a panel of learning curves for each task, and notes on the published curves."""
    panels, notes, all_published = [], [], []
    for task, curves in tasks.items():
        frames, _ = method_table.common_frames(task, curves)
        ends = {int(c.frames[-1]) for c in curves.values()}
        shown = published.curves_until(task, keys, max(ends))
        if keys and not shown:
            notes.append(f"{task}: there are no published curves of {_names(keys)}.")
        all_published += shown
        panels.append(
            Panel(
                {name: (c.frames, c.returns) for name, c in curves.items()},
                figures.RETURN,
                f"{task}, {method_table.protocol(curves, max(ends))}",
                mark=frames if ends != {frames} else None,
                include=0.0,
                xlabel=figures.FRAMES if shown else method_table.x_label(list(curves.values())),
                published=shown,
            )
        )
    if all_published:
        notes.append(f"Published curves from {'; '.join(published.sources(all_published))}.")
    return panels, notes


def _names(keys: Sequence[str]) -> str:
    names = list(dict.fromkeys(published.METHODS[key].name for key in keys))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
