"""Lays runs side by side: learning curves, final returns relative to a base, and a table.

    dynajax plot runs/cheetah-run-* --out=comparison

Runs of one task share a panel, and are compared at the largest number of frames (the simulator's
steps) that all of them have. Runs that differ in their seeds only are joined. The same agent without
a model, where there is a run of it, is a curve's measure (100), as SAC is in Barkley and
Fridovich-Keil (2025). Writes comparison.png, headline.png, table.csv and table.md into --out, and
prints the table.
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
#: What a curve's base is, in words.
_BASE = "same agent without a model = 100"


class Curve(NamedTuple):
    """All seeds of one variant on one task."""

    task: str
    label: str
    run: report.Run  # the first, if several were joined
    steps: np.ndarray  # (T,)
    returns: np.ndarray  # (seeds, T)
    seeds: tuple[int, ...]

    @property
    def frames(self) -> np.ndarray:
        """(T,) frames of the evaluations."""
        return self.steps * self.run.repeat

    @property
    def base(self) -> str:
        """The label of the curve that this one is measured by."""
        return report.model_free(self.run)

    def at(self, frames: int) -> np.ndarray:
        """Finite returns (seeds,) of the evaluation at `frames`."""
        values = self.returns[:, self.frames.tolist().index(frames)]
        return values[np.isfinite(values)]


def gather(folders: Sequence[str]) -> dict[str, dict[str, Curve]]:
    """Task -> label -> curve.

    Raises:
      UsageError: a folder that is no run's, or that has no evaluation yet.
    """
    tasks: dict[str, dict[str, Curve]] = {}
    for folder in dict.fromkeys(cli.folder(f).resolve() for f in folders):
        run = report.read_run(folder)
        if not run.steps.size:
            raise UsageError(f"{folder}: the run has no evaluation yet")
        curves = tasks.setdefault(run.config["env"], {})
        for variant, returns in run.evals.items():
            name = report.label(run, variant)
            _place(curves, Curve(run.config["env"], name, run, run.steps, returns, run.seeds))
    # Agents without a model, the measure, come first; the others stay in the order of the folders.
    return {
        task: dict(sorted(tasks[task].items(), key=lambda item: _has_model(item[1])))
        for task in sorted(tasks)
    }


def _has_model(curve: Curve) -> bool:
    return bool(curve.run.config["algo"] != "sac")


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
    """Settings of `new` that differ from `old`'s, as "learn.utd=1"."""
    parts = (line.split(": ", 1) for line in config.difference(old, new))
    return [
        f"{path}={change.rsplit(' -> ', 1)[1]}"
        for path, change in parts
        if path.split(".")[0] not in _SEEDS
    ]


def unit(curves: Sequence[Curve]) -> str:
    """What the x axis of some curves counts."""
    return figures.FRAMES if any(c.run.repeat > 1 for c in curves) else figures.STEPS


def compare_at(task: str, curves: dict[str, Curve]) -> tuple[int, list[str]]:
    """The most frames at which all curves of a task have an evaluation, and what the reader has to
    know of the comparison.

    Raises:
      UsageError: there is no such evaluation.
    """
    count = unit(list(curves.values())).removeprefix("environment ")
    common = set.intersection(*(set(c.frames.tolist()) for c in curves.values()))
    if not common:
        raise UsageError(f"{task}: its runs have no evaluation step in common")
    frames = max(common)
    notes = []
    ends = sorted({int(c.frames[-1]) for c in curves.values()})
    presets = sorted({c.run.config["preset"] for c in curves.values()})
    if len(ends) > 1:
        notes.append(
            f"{task}: compared at {frames:,} {count}, the largest that all runs have "
            f"(they end at {' and '.join(f'{e:,}' for e in ends)})."
        )
    if len(presets) > 1:
        notes.append(
            f"{task}: presets {' and '.join(presets)} are mixed, compared at {frames:,} {count}."
        )
    for name, curve in curves.items():
        lost = len(curve.returns) - len(curve.at(frames))
        if lost == len(curve.returns):
            raise UsageError(f"{task}: {name} has no finite return at {frames:,} {count}")
        if lost:
            notes.append(f"{task}: {name} has {lost} seeds without a finite return, left out.")
    return frames, notes


def bases(task: str, curves: dict[str, Curve], frames: int) -> tuple[dict[str, float], list[str]]:
    """The IQM of every curve's base, by the curve's label, where there is a positive one; and what
    the reader has to know of those that are missing."""
    values, notes = {}, []
    for name, curve in curves.items():
        base = curves.get(curve.base)
        iqm = float(statistics.iqm(base.at(frames))) if base is not None else 0.0
        if base is None:
            notes.append(
                f"{task}: no run of {curve.base} without a model, so raw returns are shown."
            )
        elif iqm <= 0:
            notes.append(
                f"{task}: {curve.base}'s return is not positive, so raw returns are shown."
            )
        else:
            values[name] = iqm
    return values, list(dict.fromkeys(notes))


def compare(tasks: dict[str, dict[str, Curve]]) -> tuple[list[dict[str, Any]], list[Bars], str]:
    """The table's lines, the headline figure's panels, and the notes under both."""
    rows: list[dict[str, Any]] = []
    panels, notes = [], []
    relative: dict[str, dict[str, np.ndarray]] = {}
    for task, curves in tasks.items():
        frames, remarks = compare_at(task, curves)
        base, missing = bases(task, curves, frames)
        notes += [*remarks, *missing]
        final = {name: curve.at(frames) for name, curve in curves.items()}
        if base:
            relative[task] = {name: 100 * final[name] / base[name] for name in base}
        # Bars of one panel have one unit.
        whole = len(base) == len(curves)
        shown = relative[task] if whole else final
        panels.append(
            Bars(
                f"{task}\n{_protocol(curves, frames)}",
                f"final return, {_BASE}" if whole else "final return",
                {n: statistics.stratified_bootstrap([v]) for n, v in shown.items()},
                100.0 if whole else None,
            )
        )
        for name, values in final.items():
            raw, run = statistics.stratified_bootstrap([values]), curves[name].run
            rows.append(
                {
                    "task": task,
                    "variant": name,
                    "preset": run.config["preset"],
                    "steps": frames // run.repeat,
                    "frames": frames,
                    "seeds": len(values),
                    "final_iqm": f"{raw.point:.2f}",
                    "low": _number(raw.low),
                    "high": _number(raw.high),
                    "model_free_100": f"{100 * raw.point / base[name]:.1f}" if name in base else "",
                }
            )
    if any(row["seeds"] == 1 for row in rows):
        notes.append("One seed has no interval.")
    if any(1 < row["seeds"] < 5 for row in rows):
        notes.append("With fewer than 5 seeds bootstrap intervals come out too narrow.")
    return rows, [*panels, *_overall(relative)], "\n".join(notes)


def _overall(relative: dict[str, dict[str, np.ndarray]]) -> list[Bars]:
    """A panel over all tasks that have a base, of the curves that all of these have."""
    if len(relative) < 2:
        return []
    first = next(iter(relative.values()))
    everywhere = [n for n in first if all(n in scores for scores in relative.values())]
    if len(everywhere) < 2:
        return []
    overall = {
        n: statistics.stratified_bootstrap([scores[n] for scores in relative.values()])
        for n in everywhere
    }
    title = f"all {len(relative)} tasks with a base\nIQM over tasks and seeds"
    return [Bars(title, f"final return, {_BASE}", overall, 100.0)]


def _protocol(curves: dict[str, Curve], frames: int) -> str:
    """What a title has to say beside the task: "preset quick, 10k steps"."""
    presets = "+".join(sorted({c.run.config["preset"] for c in curves.values()}))
    count = unit(list(curves.values())).removeprefix("environment ")
    return f"preset {presets}, {f'{frames / 1000:g}k' if frames >= 1000 else frames} {count}"


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else ""


def markdown(rows: Sequence[dict[str, Any]], notes: str) -> str:
    """The table as people read it, in columns that line up in a terminal too."""
    header = [
        "task",
        "variant",
        "preset",
        "steps",
        "frames",
        "seeds",
        "final IQM",
        "95 % interval",
        "model-free = 100",
    ]
    cells = [
        [
            r["task"],
            r["variant"],
            r["preset"],
            f"{r['steps']:,}",
            f"{r['frames']:,}",
            str(r["seeds"]),
            f"{float(r['final_iqm']):,.1f}",
            f"{float(r['low']):,.1f} to {float(r['high']):,.1f}" if r["low"] else "-",
            r["model_free_100"] or "-",
        ]
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [False] * 3 + [True] * 6
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
        frames, _ = compare_at(task, curves)
        every = list(curves.values())
        ends = [int(c.frames[-1]) for c in every]
        panels.append(
            Panel(
                {name: (c.frames, c.returns) for name, c in curves.items()},
                figures.RETURN,
                f"{task}, {_protocol(curves, max(ends))}",
                mark=frames if set(ends) != {frames} else None,
                include=0.0,
                xlabel=unit(every),
            )
        )
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
    print(plot(folders, cli.folder(_OUT.value)), end="")
    return 0
