"""Compare runs with each other and with published results: what `dynajax plot` writes."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dynajax.report import aggregate, figures, method_table, published
from dynajax.report.curves import Tasks, gather
from dynajax.report.figures import Panel
from dynajax.report.run import return_bounds
from dynajax.runs.directory import write_atomically
from dynajax.types import UsageError


class Comparison(NamedTuple):
    """The table of a comparison, and notes on its runs."""

    table: str  # Markdown
    notes: list[str]  # on seeds that are left out, or that end early


#: Below the figure of the curves.
_LINES = (
    f"{figures.lines_meaning()}, cut at the lowest and the highest possible return where these are "
    "known."
)
#: Files that a comparison may write, depending on its tasks and on the kinds of figures.
_OPTIONAL = (
    *(
        f"{name}.{kind}"
        for name in ("comparison", "headline", "aggregate")
        for kind in ("png", "pdf")
    ),
    "aggregate.csv",
)


def plot(
    folders: Sequence[Path], out: Path, methods: str = "", kinds: Sequence[str] = ("png",)
) -> Comparison:
    """Write the comparison of some runs into a folder.

    Args:
      folders: run directories.
      out: where comparison.png, headline.png, table.csv, table.md and, for several tasks,
        aggregate.png and aggregate.csv go.
      methods: whose published curves are drawn too, see `published.parse_methods`.
      kinds: of the figures' files, see `figures.encode`.

    Raises:
      UsageError: a folder is not a run directory, the runs cannot be compared, a method is
        unknown, or `out` cannot be written.
    """
    keys = published.parse_methods(methods)
    tasks = gather(folders)
    rows, bars, notes = method_table.compare(tasks)
    panels, published_notes = curve_panels(tasks, keys)
    over_tasks, aggregate_notes = aggregate.aggregate(tasks)
    table = method_table.markdown(rows, [*notes, *published_notes, *aggregate_notes])
    seed_notes = [note for of_task in tasks.values() for c in of_task.values() for note in c.notes]
    drawn = {
        "comparison": figures.curves(
            panels,
            title="Evaluation return",
            note="\n".join([_LINES, *seed_notes]),
        ),
        "headline": figures.bars(
            bars,
            title="Final return: IQM over seeds, 95 % stratified bootstrap interval",
            note="\n".join(notes),
        ),
    }
    files = {"table.csv": _csv(rows), "table.md": table.encode()}
    if over_tasks is not None:
        drawn["aggregate"] = figures.mixed(
            over_tasks.panels,
            title=f"{over_tasks.title}: IQM over tasks and seeds, 95 % stratified bootstrap interval",
        )
        if over_tasks.rows:
            files["aggregate.csv"] = _csv(over_tasks.rows)
    files |= {
        f"{name}.{kind}": figures.encode(figure, kind)
        for name, figure in drawn.items()
        for kind in kinds
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomically(out / name, data)
        for name in _OPTIONAL:
            if name not in files:  # of an earlier comparison of other runs
                (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None
    return Comparison(table, seed_notes)


def curve_panels(tasks: Tasks, keys: Sequence[str]) -> tuple[list[Panel], list[str]]:
    """Return a panel of learning curves for each task, and notes on the published curves."""
    panels, notes, all_published = [], [], []
    for task, curves in tasks.items():
        frames, _ = method_table.common_frames(task, curves)
        ends = {int(c.frames[-1]) for c in curves.values()}
        last = max(int(at[-1]) for c in curves.values() for at, _ in [(c.frames, 0), *c.single])
        shown = published.curves_until(task, keys, last)
        if keys and not shown:
            notes.append(f"{task}: there are no published curves of {_names(keys)}.")
        all_published += shown
        panels.append(
            Panel(
                {name: (c.frames, c.returns) for name, c in curves.items()},
                figures.RETURN,
                task,
                single={name: c.single for name, c in curves.items()},
                bounds=return_bounds(task),
                mark=frames if ends != {frames} else None,
                include=0.0,
                xlabel=figures.FRAMES if shown else method_table.x_label(list(curves.values())),
                published=shown,
            )
        )
    if all_published:
        notes.append(f"Published curves: {'; '.join(published.labels(all_published).values())}.")
        notes.append(f"They are from {'; '.join(published.sources(all_published))}.")
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
