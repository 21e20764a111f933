"""Draw the times of other implementations, relative to dynajax, from the tables in results/bench.

python results/scripts/beside_figure.py --out=docs/static/beside.png
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dynajax.cli import common
from dynajax.report import figures
from dynajax.report.statistics import ConfidenceInterval

FLAGS = flags.FLAGS
flags.DEFINE_string("bench", "results/bench", "Folder of the tables.")
flags.DEFINE_string("out", "docs/static/beside.png", "The figure.")


def measured(folder: Path) -> dict[str, ConfidenceInterval]:
    """Return the median ratio and its quartiles for each piece of work.

    Of several learners and of compiled networks only the whole environment step is shown.
    """
    found = {}
    for path in sorted(folder.glob("beside-*/beside_*.csv")):
        for row in csv.DictReader(path.open()):
            several, compiled = row["learners"] != "1", "torch.compile" in row["side"]
            if (several or compiled) and row["work"] != "environment step":
                continue
            of = row["side"].split(" ")[0]
            name = f"{of}, {row['work']}"
            if row.get("updates", "1") != "1":
                name += f", {row['updates']} updates"
            if "cache" in row:
                name += f", {row['cache']} cache"
            if several:
                name += f", {row['learners']} learners"
            if compiled:
                name += ", torch.compile"
            bounds = (float(row[k]) for k in ("theirs_over_ours", "low", "high"))
            found[name] = ConfidenceInterval(*bounds)
    return found


def main(argv: Sequence[str]) -> None:
    """Draw the figure."""
    panel = figures.Bars(
        "", "their time / the time of dynajax", measured(Path(FLAGS.bench)), reference=1.0
    )
    figure = figures.bars(
        [panel],
        title="Time of the same work, relative to dynajax",
        note="One core of an AMD EPYC, cheetah-run. Medians; lines are quartiles. 1: equally fast.",
    )
    Path(FLAGS.out).write_bytes(figures.png(figure))


if __name__ == "__main__":
    common.run(main)
