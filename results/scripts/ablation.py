"""Compute the table of docs/ablation.md, and the index of results/levers, from the raw returns.

    python results/scripts/ablation.py

`results/levers/comparisons.csv` defines each row of the table: the arm and its base as folders of
results/levers, with an optional variant and range of seeds (`FOLDER:VARIANT#FIRST-LAST`), joined by
" + ". The script writes the table between the two markers in docs/ablation.md, and
results/levers/index.csv, which maps each folder to its arm, task, seeds, commit and machine, and to
the rows of the table that use it.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from dynajax import UsageError
from dynajax.cli import common
from dynajax.runs.directory import write_atomically

ROOT = Path(__file__).resolve().parents[2]
LEVERS = ROOT / "results" / "levers"
PAGE = ROOT / "docs" / "ablation.md"
BEGIN, END = "<!-- begin: table -->\n", "<!-- end: table -->\n"


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the lines of a CSV file by column."""
    with path.open() as file:
        return list(csv.DictReader(file))


def sources(text: str) -> Iterator[tuple[str, str, range | None]]:
    """Yield (folder, variant or "", seeds or None) for each part of an arm or base."""
    for part in text.split(" + "):
        rest, _, seeds = part.partition("#")
        folder, _, variant = rest.partition(":")
        first, _, last = seeds.partition("-")
        yield folder, variant, range(int(first), int(last) + 1) if seeds else None


def returns_of(text: str, steps: int) -> list[dict[int, float]]:
    """Return the mean return of each learner by agent step, up to `steps`."""
    learners: list[dict[int, float]] = []
    for folder, variant, seeds in sources(text):
        curves: dict[Any, dict[int, float]] = {}
        for line in read_csv(LEVERS / folder / "eval.csv"):
            learner, step = (line["variant"], int(line["seed"])), int(line["step"])
            chosen = variant in ("", learner[0]) and (seeds is None or learner[1] in seeds)
            if chosen and step <= steps:
                curves.setdefault(learner, {})[step] = float(line["return_mean"])
        learners += curves.values()
    return learners


def areas(arm: str, base: str, steps: int) -> list[np.ndarray]:
    """Return the areas of arm and base, (n,) each: means over the evaluations that all have."""
    curves = [returns_of(text, steps) for text in (arm, base)]
    common = sorted(set.intersection(*(set(c) for side in curves for c in side)))
    return [np.array([np.mean([c[t] for t in common]) for c in side]) for side in curves]


def ratio(arm: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Return the ratio of two arms' areas and its 95 % interval, by Welch's test of logarithms."""
    result = scipy.stats.ttest_ind(np.log(arm), np.log(base), equal_var=False)
    low, high = result.confidence_interval(0.95)
    difference = np.log(arm).mean() - np.log(base).mean()
    return float(np.exp(difference)), float(np.exp(low)), float(np.exp(high))


def table() -> str:
    """Return the table of all comparisons in Markdown."""
    lines = [
        "| arm | task, agent steps | n | ratio | interval | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for row in read_csv(LEVERS / "comparisons.csv"):
        steps = int(row["steps"])
        arm, base = areas(row["folders"], row["base"], steps)
        middle, low, high = ratio(arm, base)
        # Only held-out seeds support a claim.
        claim = row["seeds"] == "held-out" and not low <= 1 <= high
        name, shown = row["arm"], f"{middle:.2f}"
        if claim:
            name, shown = f"**{name}**", f"**{shown}**"
        task = f"{row['task']}, {steps:,}"
        n = f"{len(arm)}, {len(base)}"
        lines.append(
            f"| {name} | {task} | {n} | {shown} | {low:.2f} to {high:.2f} | {row['seeds']} |"
        )
    return "\n".join(lines) + "\n"


def index() -> list[list[str]]:
    """Return the lines of index.csv, one for each folder."""
    rows = read_csv(LEVERS / "comparisons.csv")
    lines = [["folder", "arm", "task", "seeds", "agent_steps", "commit", "machine", "claim"]]
    for path in sorted(LEVERS.glob("*/config.json")):
        info, folder = json.loads(path.read_text()), path.parent.name
        evaluations = read_csv(path.parent / "eval.csv")
        seeds = sorted({int(line["seed"]) for line in evaluations})
        claims = [
            f"{row['arm']} ({row['task']}, {int(row['steps']):,})"
            for row in rows
            if folder in {f for key in ("folders", "base") for f, _, _ in sources(row[key])}
        ]
        agent = info["config"]["agent_name"]
        # A folder is named TASK-METHOD-ARM, and its method ends with the agent or the trust rule.
        _, _, arm = folder.removeprefix(info["config"]["env"] + "-").partition(f"{agent}-")
        for rule in ("infoprop-", "m2ac-", "macura-", "penalty-", "weight-"):
            arm = arm.removeprefix(rule)
        lines.append(
            [
                folder,
                arm,
                info["config"]["env"],
                f"{seeds[0]}-{seeds[-1]}",
                evaluations[-1]["step"],
                info.get("git_commit") or "",
                (info.get("machine") or "").partition(";")[0],
                "; ".join(claims),
            ]
        )
    return lines


def main(arguments: Sequence[str]) -> int:
    """Write the table into the page, and the index."""
    common.refuse_arguments(arguments)
    head, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    for marker, found in ((BEGIN, begin), (END, end)):
        if not found:
            raise UsageError(
                f"{PAGE}: the line {marker.strip()} is missing; write {BEGIN.strip()} and "
                f"{END.strip()} where the table belongs"
            )
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(index())
    # Both are computed before the first is written, so that an error leaves both as they were.
    page = head + BEGIN + table() + END + tail
    write_atomically(PAGE, page.encode())
    write_atomically(LEVERS / "index.csv", lines.getvalue().encode())
    return 0


if __name__ == "__main__":
    common.run(main)
