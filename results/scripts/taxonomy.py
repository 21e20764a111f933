"""Find the measured properties of a task that separate failure from success, over many diagnoses.

    python results/scripts/taxonomy.py results/diagnosis/outcomes.csv

The CSV has the outcome of published MBPO on each task (`task,outcome,mbpo`: fails or works, and the
final return with SAC = 100, if it is known). The folder TASK next to it holds the files that
`diagnose.py --env=TASK` wrote. Writes table.csv, table.md, taxonomy.csv, taxonomy.md and taxonomy.png
next to it.
"""

import csv
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from dynajax.cli import common
from dynajax.report import figures
from dynajax.report.statistics import POSITIVE, R2, Bounds, format_mean
from dynajax.runs.directory import write_atomically, write_csv
from dynajax.types import UsageError

Lines = Sequence[dict[str, str]]


def _of(fixes: str, name: str) -> Callable[[Lines], np.ndarray]:
    return lambda lines: np.array([float(x[name]) for x in lines if x["fix"] == fixes])


def _best(name: str) -> Callable[[Lines], np.ndarray]:
    def best(lines: Lines) -> np.ndarray:
        sets = list(dict.fromkeys(x["fix"] for x in lines))
        return np.max([_of(fixes, name)(lines) for fixes in sets], axis=0)

    return best


def _direct(folder: Path) -> float:
    with open(folder / "dims.csv") as file:
        kinds = [line["kind"] for line in csv.DictReader(file)]
    return sum(kind.startswith("direct") for kind in kinds) / len(kinds)


#: By name: the function that reads the property of every seed from fixes.csv, and whether lower or
#: higher values should go with failure.
PROPERTIES: dict[str, tuple[Callable[[Lines], np.ndarray], str]] = {
    "state R², published targets": (_of("none", "state_r2"), "lower"),
    "state R², best fix": (_best("state_r2"), "lower"),
    "reward R², published targets": (_of("none", "reward_r2"), "lower"),
    "reward R², scale": (_of("scale", "reward_r2"), "lower"),
    "reward R², best fix": (_best("reward_r2"), "lower"),
    "Σ Var(s' - s) / Var(r)": (_of("none", "ratio_delta"), "higher"),
    "Σ Var(s') / Var(r)": (_of("none", "ratio_next"), "higher"),
    "reward aleatoric std, published targets": (_of("none", "reward_aleatoric_std"), "higher"),
    "|reward bias|, published targets": (
        lambda lines: np.abs(_of("none", "reward_bias")(lines)),
        "higher",
    ),
    "state R² after 20 steps, published targets": (_of("none", "open_loop_state_r2_20"), "lower"),
    "coverage at 80 %, new episodes, published": (_of("none", "new_coverage_80"), "lower"),
    "reward's share in 1 % of the steps": (_of("none", "reward_top_share"), "higher"),
}


def separation(failing: np.ndarray, working: np.ndarray, direction: str) -> float:
    """Return how often a failing task has the worse value of a pair; ties count half, 0.5 is chance."""
    a, b = (x[np.isfinite(x)] for x in (failing, working))
    if not a.size or not b.size:
        return float("nan")
    sign = -1 if direction == "lower" else 1
    gap = sign * (a[:, None] - b)
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


def read(path: Path) -> tuple[list[dict[str, str]], dict[str, Lines]]:
    """Return the outcomes, and the lines of every task's fixes.csv.

    Raises:
      UsageError: a file is missing.
    """
    try:
        outcomes: list[dict[str, str]] = list(csv.DictReader(path.open()))
        lines: dict[str, Lines] = {
            x["task"]: list(csv.DictReader((path.parent / x["task"] / "fixes.csv").open()))
            for x in outcomes
        }
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from None
    except KeyError:
        raise UsageError(f"{path}: its columns must be task, outcome, mbpo") from None
    return outcomes, lines


def _bounds(name: str) -> Bounds:
    """Return the lowest and the highest value that a property can have."""
    return R2 if "R²" in name else POSITIVE


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "".join(
        "| " + " | ".join(row) + " |\n" + ("|" + "---|" * len(row) + "\n" if i == 0 else "")
        for i, row in enumerate(rows)
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1:
        raise UsageError("name one file, such as results/diagnosis/outcomes.csv")
    path = Path(argv[0])
    outcomes, lines = read(path)
    fails = np.array([x["outcome"] == "fails" for x in outcomes])
    mbpo = np.array([float(x["mbpo"] or "nan") for x in outcomes])

    table: list[dict[str, Any]] = []
    text: list[list[str]] = []
    for x in outcomes:
        measured = {name: get(lines[x["task"]]) for name, (get, _) in PROPERTIES.items()}
        line: dict[str, Any] = dict(x)
        for name, seeds in measured.items():
            line[name] = float(np.mean(seeds))
        line["share of direct dimensions"] = _direct(path.parent / x["task"])
        table.append(line)
        short = list(PROPERTIES)[:7]
        text.append(
            [
                x["task"],
                x["outcome"],
                x["mbpo"] or "-",
                *(format_mean(measured[n], _bounds(n)) for n in short),
            ]
        )
    write_csv(path.parent / "table.csv", table)
    header = ["task", "published MBPO", "SAC = 100", *list(PROPERTIES)[:7]]
    note = "\nMean of three seeds and 95 % t interval, cut at impossible values (R² above 1).\n"
    write_atomically(path.parent / "table.md", (_markdown([header, *text]) + note).encode())

    judged: list[dict[str, Any]] = []
    names = [*PROPERTIES, "share of direct dimensions"]
    for name in names:
        values = np.array([line[name] for line in table])
        direction = PROPERTIES[name][1] if name in PROPERTIES else "higher"
        known = np.isfinite(values) & np.isfinite(mbpo)
        a, b = values[fails], values[~fails]
        judged.append(
            {
                "property": name,
                "fails if": direction,
                "separation": separation(a, b, direction),
                "failing": f"{np.nanmin(a):.3g} to {np.nanmax(a):.3g}",
                "working": f"{np.nanmin(b):.3g} to {np.nanmax(b):.3g}",
                "rank correlation with return": float(
                    scipy.stats.spearmanr(values[known], mbpo[known]).statistic
                ),
                "tasks": int(known.sum()),
            }
        )
    judged.sort(key=lambda x: -x["separation"])
    write_csv(path.parent / "taxonomy.csv", judged)
    rows = [list(judged[0])] + [
        [f"{v:.2f}" if isinstance(v, float) else str(v) for v in x.values()] for x in judged
    ]
    write_atomically(path.parent / "taxonomy.md", _markdown(rows).encode())
    figure = figures.png(_figure(table, fails))
    write_atomically(path.parent / "taxonomy.png", figure)
    print(_markdown(rows), end="")


#: The property that separates best, with what it is in words.
_SHOWN = "state R², published targets"
_X_LABEL = "R² of the state's change, published targets (mean of 3 seeds, offline)"


def _figure(table: Sequence[dict[str, Any]], fails: np.ndarray) -> Any:
    """Return a scatter of the published return of every task against the R² of its state."""
    r2 = np.array([line[_SHOWN] for line in table])
    returns = np.array([float(line["mbpo"] or "nan") for line in table])
    known = np.isfinite(returns)
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, (8.4, 5.0))
        for group, colour, mark, name in (
            (fails, figures.ORANGE, "s", "published MBPO fails"),
            (~fails, figures.BLUE, "o", "published MBPO works"),
        ):
            axes.scatter(
                r2[known & group], returns[known & group], 46, colour, marker=mark, label=name
            )
        axes.set_yscale("symlog", linthresh=10)
        axes.set_ylim(-1.5, 2500)
        axes.set_yticks([0, 10, 100, 1000], ["0", "10", "100", "1,000"])
        axes.axhline(100, color="#8a8a8a", linewidth=1)
        axes.set_xlim(-0.25, 1.05)
        axes.set_xlabel(_X_LABEL)
        axes.set_ylabel("published return of MBPO (SAC = 100)")
        axes.set_title("How well a model predicts a task, and how well MBPO learns it")
        axes.legend(loc="lower right")
        _label_tasks(axes, [line["task"] for line in table], r2, returns)
        unknown = [
            f"{line['task']} ({value:.2f})"
            for line, value, k in zip(table, r2, known, strict=True)
            if not k
        ]
        if unknown:
            note = f"Not shown, as no return was published (R² in brackets): {', '.join(unknown)}."
            figure.supxlabel(
                textwrap.fill(note, 110), fontsize=8.5, color="#8a8a8a", x=0.02, ha="left"
            )
    return figure


def _label_tasks(axes: Any, names: Sequence[str], x: np.ndarray, y: np.ndarray) -> None:
    """Write the names of tasks right of their marks, or left where another mark is on the right."""
    axes.figure.draw_without_rendering()
    points = axes.transData.transform(np.stack([x, y], 1)) * 72 / axes.figure.dpi
    for i, name in enumerate(names):
        if not np.isfinite(y[i]):
            continue
        across, up = (points - points[i]).T
        taken = ((across > 0) & (across < 90) & (np.abs(up) < 12)).any()
        offset, side = ((-6, 0), "right") if taken else ((6, 0), "left")
        axes.annotate(
            name, (x[i], y[i]), offset, textcoords="offset points", ha=side, va="center", fontsize=9
        )


if __name__ == "__main__":
    common.run(main)
