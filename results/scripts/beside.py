"""Compute the times of other packages, relative to dynajax, from the tables in results/bench.

  python results/scripts/beside.py --out=docs/static/beside.png

Prints a table in Markdown, and draws a figure of it.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from dynajax import UsageError
from dynajax.cli import common
from dynajax.report import figures
from dynajax.report.statistics import ConfidenceInterval

FLAGS = flags.FLAGS
flags.DEFINE_string("bench", "results/bench", "Folder of the tables.")
flags.DEFINE_string("out", "docs/static/beside.png", "The figure.")

#: Names of the packages, in the order of the table.
NAMES = {"mbrl": "mbrl-lib", "sbx-rl": "SBX", "cleanrl": "CleanRL"}


class Comparison(NamedTuple):
    """A piece of work, and their time of it over ours."""

    package: str
    work: str
    ratio: ConfidenceInterval  # median and quartiles
    measurements: int  # pairs of runs, or rounds
    conditions: tuple[str, str]  # task, and processor with its number of cores

    @property
    def name(self) -> str:
        """The package and the work."""
        return f"{NAMES[self.package]}: {self.work}"


def comparisons(folder: Path) -> list[Comparison]:
    """Return all comparisons whose tables are in the folders `beside-*` of a folder."""
    found = [*_steps(folder), *_runs(folder)]
    return sorted(found, key=lambda x: list(NAMES).index(x.package))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UsageError(f"{path}: the table has no lines")
    return rows


def _conditions(rows: Sequence[dict[str, str]]) -> tuple[str, str]:
    return rows[0]["env"], rows[0]["machine"].partition(";")[0]


def _ratio(rows: Sequence[dict[str, str]], theirs: str, ours: str) -> ConfidenceInterval:
    ratios = [float(row[theirs]) / float(row[ours]) for row in rows]
    low, point, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return ConfidenceInterval(point, low, high)


def _steps(folder: Path) -> Iterator[Comparison]:
    """Yield the comparisons of functions."""
    for path in sorted(folder.glob("beside-mbrl/learners_*.csv")):
        rows = _rows(path)
        several = rows[0]["learners"] != "1"
        for work in dict.fromkeys(row["work"] for row in rows):
            of_work = [row for row in rows if row["work"] == work]
            # Of several learners and of compiled networks only the whole environment step is shown.
            for side, note in (("ms_theirs", ""), ("ms_compiled", ", torch.compile")):
                if (several or note) and work != "environment step":
                    continue
                text = work + (f", {rows[0]['learners']} learners" if several else "") + note
                ratio = _ratio(of_work, side, "ms_ours")
                yield Comparison("mbrl", text, ratio, len(of_work), _conditions(of_work))


def _runs(folder: Path) -> Iterator[Comparison]:
    """Yield the comparisons of whole runs."""
    for package in ("sbx", "cleanrl"):
        for path in sorted(folder.glob(f"beside-{package}/*.csv")):
            rows = _rows(path)
            first = rows[0]
            text = f"run of {int(first['steps']):,} steps"
            if first["updates"] != "1":
                text += f" with {first['updates']} updates each"
            text += f", {first['cache']} cache"
            ratio = _ratio(rows, "seconds_theirs", "seconds_ours")
            yield Comparison(first["package"], text, ratio, len(rows), _conditions(rows))


def table(found: Sequence[Comparison]) -> str:
    """Return the comparisons as a table in Markdown."""
    lines = ["| package | work | their time / ours (quartiles) |", "|---|---|---|"]
    for x in found:
        point, low, high = (f"{value:.2f}" for value in x.ratio)
        lines.append(f"| {NAMES[x.package]} | {x.work} | {point} ({low} to {high}) |")
    return "\n".join(lines) + "\n"


def figure(found: Sequence[Comparison]) -> Any:
    """Draw the comparisons as horizontal bars."""
    panel = figures.Bars(
        "",
        "their time / the time of dynajax",
        {x.name: x.ratio for x in found},
        reference=1.0,
        groups={x.name: x.package for x in found},
        label_width=34,
    )
    conditions = "; ".join(dict.fromkeys(", ".join(x.conditions) for x in found))
    return figures.bars(
        [panel],
        title="Time of the same work, relative to dynajax",
        note=f"Medians; lines are quartiles. 1: equally fast. Measured on {conditions}.",
    )


def main(argv: Sequence[str]) -> None:
    """Print the table, and draw the figure."""
    common.refuse_arguments(argv)
    found = comparisons(Path(FLAGS.bench))
    if not found:
        raise UsageError(f"--bench={FLAGS.bench}: it contains no table of beside_*.py")
    print(table(found), end="")
    out = Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(figures.png(figure(found)))


if __name__ == "__main__":
    common.run(main)
