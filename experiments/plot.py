"""Lays runs side by side: learning curves, final returns relative to SAC, and a table.

    python experiments/plot.py runs/cheetah-run-* --out=comparison

Runs of one task share a panel, and are compared at the largest step that all of them have. Runs
that differ in their seeds only are joined. A task's SAC run, where there is one, is the measure
(100), as in Barkley and Fridovich-Keil (2025). Writes comparison.png, headline.png, table.csv and
table.md into --out, and prints the table.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from dynajax import cli, config, report
from dynajax.record.folder import write_atomically
from dynajax.report import figures, statistics
from dynajax.report.figures import Bars, Panel
from dynajax.types import UsageError

_OUT = flags.DEFINE_string("out", "comparison", "Folder for the pictures and the table.")

#: Differences between runs that do not make them different methods.
_SEEDS = ("seed", "seeds", "variants", "steps", "env", "host")


class Curve(NamedTuple):
    """All seeds of one variant on one task."""

    task: str
    label: str
    run: report.Run  # the first, if several were joined
    steps: np.ndarray  # (T,)
    returns: np.ndarray  # (seeds, T)
    seeds: tuple[int, ...]

    def at(self, step: int) -> np.ndarray:
        """Finite returns (seeds,) of the evaluation at `step`."""
        values = self.returns[:, self.steps.tolist().index(step)]
        return values[np.isfinite(values)]


def gather(folders: Sequence[str]) -> dict[str, dict[str, Curve]]:
    """Task -> label -> curve.

    Raises:
      UsageError: a folder that is no run's, or that has no evaluation yet.
    """
    tasks: dict[str, dict[str, Curve]] = {}
    for folder in dict.fromkeys(Path(f).resolve() for f in folders):
        run = report.read_run(folder)
        if not run.steps.size:
            raise UsageError(f"{folder}: the run has no evaluation yet")
        curves = tasks.setdefault(run.config["env"], {})
        for variant, returns in run.evals.items():
            name = report.label(run, variant)
            new = Curve(run.config["env"], name, run, run.steps, returns, run.seeds)
            _place(curves, new)
    # SAC, the measure, comes first; the others stay in the order of the folders.
    return {
        task: dict(sorted(tasks[task].items(), key=lambda item: not item[0].startswith("SAC")))
        for task in sorted(tasks)
    }


def _place(curves: dict[str, Curve], new: Curve) -> None:
    """Adds a curve: joined with one of the same method, else under a name that tells it apart."""
    old = curves.get(new.label)
    if old is None:
        curves[new.label] = new
        return
    changed = _changes(old.run.config, new.run.config)
    common = np.intersect1d(old.steps, new.steps)
    if not changed and common.size and not set(old.seeds) & set(new.seeds):
        parts = [c.returns[:, np.isin(c.steps, common)] for c in (old, new)]
        joined = old._replace(
            steps=common, returns=np.concatenate(parts), seeds=old.seeds + new.seeds
        )
        curves[new.label] = joined
        return
    suffix = ", ".join(changed)
    if not changed or len(changed) > 2 or new.label.endswith(")"):
        suffix = new.run.folder.name
    _place(curves, new._replace(label=f"{new.label} ({suffix})"))


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings of `new` that differ from `old`'s, as "sac.utd=1"."""
    parts = (line.split(": ", 1) for line in config.difference(old, new))
    return [
        f"{path}={change.rsplit(' -> ', 1)[1]}"
        for path, change in parts
        if path.split(".")[0] not in _SEEDS
    ]


def compare_at(task: str, curves: dict[str, Curve]) -> tuple[int, list[str]]:
    """The largest step that all curves of a task have, and what the reader has to know of it.

    Raises:
      UsageError: there is no such step.
    """
    common = set.intersection(*(set(c.steps.tolist()) for c in curves.values()))
    if not common:
        raise UsageError(f"{task}: its runs have no evaluation step in common")
    step = max(common)
    notes = []
    ends = sorted({int(c.steps[-1]) for c in curves.values()})
    presets = sorted({c.run.config["preset"] for c in curves.values()})
    if len(ends) > 1:
        notes.append(
            f"{task}: compared at {step:,} steps, the largest that all runs have "
            f"(they end at {' and '.join(f'{e:,}' for e in ends)})."
        )
    if len(presets) > 1:
        notes.append(
            f"{task}: presets {' and '.join(presets)} are mixed, compared at {step:,} steps."
        )
    for name, curve in curves.items():
        lost = len(curve.returns) - len(curve.at(step))
        if lost == len(curve.returns):
            raise UsageError(f"{task}: {name} has no finite return at {step:,} steps")
        if lost:
            notes.append(f"{task}: {name} has {lost} seeds without a finite return, left out.")
    return step, notes


def compare(tasks: dict[str, dict[str, Curve]]) -> tuple[list[dict[str, Any]], list[Bars], str]:
    """The table's lines, the headline figure's panels, and the notes under both."""
    rows: list[dict[str, Any]] = []
    panels, notes = [], []
    relative: dict[str, dict[str, np.ndarray]] = {}
    for task, curves in tasks.items():
        step, said = compare_at(task, curves)
        notes += said
        final = {name: curve.at(step) for name, curve in curves.items()}
        sac = float(statistics.iqm(final["SAC"])) if "SAC" in final else None
        if sac is None:
            notes.append(f"{task}: no SAC run, so raw returns are shown.")
        elif sac <= 0:
            notes.append(f"{task}: SAC's return is not positive, so raw returns are shown.")
            sac = None
        unit = 1.0 if sac is None else sac / 100
        if sac is not None:
            relative[task] = {name: values / unit for name, values in final.items()}
        shown = {n: statistics.stratified_bootstrap([v / unit]) for n, v in final.items()}
        panels.append(
            Bars(
                f"{task}\n{_protocol(curves, step)}",
                "final return" if sac is None else "final return, SAC = 100",
                shown,
                None if sac is None else 100.0,
            )
        )
        for name, values in final.items():
            raw = statistics.stratified_bootstrap([values])
            rows.append(
                {
                    "task": task,
                    "variant": name,
                    "preset": curves[name].run.config["preset"],
                    "steps": step,
                    "seeds": len(values),
                    "final_iqm": f"{raw.point:.2f}",
                    "low": _number(raw.low),
                    "high": _number(raw.high),
                    "sac_100": "" if sac is None else f"{raw.point / unit:.1f}",
                }
            )
    if any(row["seeds"] == 1 for row in rows):
        notes.append("One seed has no interval.")
    if any(1 < row["seeds"] < 5 for row in rows):
        notes.append("With fewer than 5 seeds bootstrap intervals come out too narrow.")
    if len(relative) > 1:
        everywhere = [
            n
            for n in next(iter(relative.values()))
            if all(n in scores for scores in relative.values())
        ]
        overall = {
            n: statistics.stratified_bootstrap([scores[n] for scores in relative.values()])
            for n in everywhere
        }
        if len(overall) > 1:
            panels.append(
                Bars(
                    f"all {len(relative)} tasks with SAC\nIQM over tasks and seeds",
                    "final return, SAC = 100",
                    overall,
                    100.0,
                )
            )
    return rows, panels, "\n".join(notes)


def _protocol(curves: dict[str, Curve], step: int) -> str:
    """What a title has to say beside the task: "preset quick, 10k steps"."""
    presets = "+".join(sorted({c.run.config["preset"] for c in curves.values()}))
    return f"preset {presets}, {f'{step / 1000:g}k' if step >= 1000 else step} steps"


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else ""


def markdown(rows: Sequence[dict[str, Any]], notes: str) -> str:
    """The table as people read it, in columns that line up in a terminal too."""
    header = [
        "task",
        "variant",
        "preset",
        "steps",
        "seeds",
        "final IQM",
        "95 % interval",
        "SAC = 100",
    ]
    cells = [
        [
            r["task"],
            r["variant"],
            r["preset"],
            f"{r['steps']:,}",
            str(r["seeds"]),
            f"{float(r['final_iqm']):,.1f}",
            f"{float(r['low']):,.1f} to {float(r['high']):,.1f}" if r["low"] else "-",
            r["sac_100"] or "-",
        ]
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [False] * 3 + [True] * 5
    lines = [
        "| "
        + " | ".join(
            text.rjust(w) if r else text.ljust(w)
            for text, w, r in zip(row, widths, right, strict=True)
        )
        + " |"
        for row in [header, *cells]
    ]
    rule = (
        "|"
        + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
        + "|"
    )
    table = "\n".join([lines[0], rule, *lines[1:]])
    return f"{table}\n" + (f"\n{notes}\n" if notes else "")


def plot(folders: Sequence[str], out: Path) -> str:
    """Writes the comparison of some runs into `out`; gives back the table."""
    tasks = gather(folders)
    rows, bars, notes = compare(tasks)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table = markdown(rows, notes)
    panels = []
    for task, curves in tasks.items():
        step, _ = compare_at(task, curves)
        lines = {name: (c.steps, c.returns) for name, c in curves.items()}
        uneven = any(c.steps[-1] != step for c in curves.values())
        end = max(int(c.steps[-1]) for c in curves.values())
        title = f"{task}, {_protocol(curves, end)}"
        mark = step if uneven else None
        panels.append(Panel(lines, figures.RETURN, title, mark=mark, include=0.0))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in {
            "table.csv": text.getvalue().encode(),
            "table.md": table.encode(),
            "comparison.png": figures.png(
                figures.curves(
                    panels, title="Evaluation return: mean over seeds and 95 % t interval"
                )
            ),
            "headline.png": figures.png(
                figures.bars(
                    bars,
                    title="Final return: IQM over seeds, 95 % stratified bootstrap interval",
                    note=notes,
                )
            ),
        }.items():
            write_atomically(out / name, data)
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None
    return table


def main(folders: Sequence[str]) -> int:
    if not folders:
        raise UsageError("name at least one run's folder, such as runs/cheetah-run-*")
    print(plot(folders, Path(_OUT.value)), end="")
    return 0


if __name__ == "__main__":
    cli.run(main)
