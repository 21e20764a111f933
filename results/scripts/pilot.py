"""Evaluate the pilot of the study on seven tasks: compare its arms, and name the selected one.

  python results/scripts/pilot.py results/seven-pilot

Reads every run directory in the folder, and writes pilot.csv (a line for each arm) beside them.
results/seven-pilot/README.md registers the statistic and the selection.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import seven_runs
from dynajax import UsageError
from dynajax.cli import common
from dynajax.report import statistics
from dynajax.report.run import read_run
from dynajax.runs.directory import write_csv
from seven_claims import FLOOR

SEEDS = [2000, 2001, 2002]
#: Arms from the simplest to the least simple.
ARMS = (
    "model-free",
    "tenth",
    "separate",
    "separate-two-steps",
    "half",
    "held-noise",
    "resnet",
    "faded",
    "recent-starts",
    "mve",
    "value-weight",
)
#: Of two arms with a smaller difference the simpler one is selected.
MARGIN = 0.05


class Learner(NamedTuple):
    """One seed of an arm on a task."""

    task: str
    arm: str
    seed: int
    mean_return: float

    @property
    def log_return(self) -> float:
        """The registered statistic."""
        return float(np.log1p(self.mean_return))


class Comparison(NamedTuple):
    """An arm against model-free."""

    arm: str
    effects: dict[str, statistics.ConfidenceInterval]  # by task, those at the floor left out
    learners: int
    complete: bool  # it and model-free have all registered seeds on both tasks

    @property
    def pooled(self) -> float:
        """The mean of the effects, NaN if every task is at the floor or runs are missing."""
        points = [effect.point for effect in self.effects.values()]
        return float(np.mean(points)) if points and self.complete else float("nan")


def arm(folder: Path) -> str:
    """Return the arm that a study's folder is named after.

    Raises:
      UsageError: it is not an arm of the pilot.
    """
    name = re.search(r"-seed-\d+-(.+)$", folder.name)
    if name is None or name[1] not in ARMS:
        raise UsageError(f"{folder}: its name ends with no arm of the pilot")
    return name[1]


def read(folder: Path) -> list[Learner]:
    """Return the learners of all runs in a folder.

    Raises:
      UsageError: there is none; one is damaged, not finished or not an arm of the pilot; or they are
        not alike, see `check_alike`.
    """
    paths = sorted(path.parent for path in folder.glob("*/config.json"))
    if not paths:
        raise UsageError(f"{folder}: it contains no run directory")
    runs = [(arm(path), read_run(path)) for path in paths]
    for name, run in runs:
        seven_runs.check_finished(run)
        if (name == "model-free") != (run.config["algo"] == "model-free"):
            raise UsageError(f"{run.folder}: it is called {name}, but has {run.config['algo']}")
    seven_runs.check_alike(runs)
    return [
        Learner(run.config["env"], name, seed, float(returns.mean()))
        for name, run in runs
        for rows in run.evals.values()
        for seed, returns in zip(run.seeds, rows, strict=True)
    ]


def compare(found: Sequence[Learner]) -> list[Comparison]:
    """Return every arm against model-free, in the order of `ARMS`."""
    tasks = sorted({x.task for x in found})
    sides = {
        (task, name): [x for x in found if (x.task, x.arm) == (task, name)]
        for task in tasks
        for name in ARMS
    }
    means = {
        key: float(np.mean([x.mean_return for x in side])) for key, side in sides.items() if side
    }
    # The same tasks count for all arms, or their pooled effects could not be compared.
    counted = [
        task
        for task in tasks
        if any(mean >= FLOOR for key, mean in means.items() if key[0] == task)
    ]
    result = []
    for name in ARMS[1:]:
        seeds = {t: [sorted(x.seed for x in sides[t, a]) for a in (ARMS[0], name)] for t in tasks}
        learners = sum(len(of_arm) for _, of_arm in seeds.values())
        if learners:
            effects = {
                task: statistics.difference(
                    [x.log_return for x in sides[task, ARMS[0]]],
                    [x.log_return for x in sides[task, name]],
                )
                for task in counted
                if all(seeds[task])
            }
            complete = len(tasks) == 2 and all(x == SEEDS for both in seeds.values() for x in both)
            result.append(Comparison(name, effects, learners, complete))
    return result


def select(arms: Sequence[Comparison]) -> str:
    """Return the simplest arm whose pooled effect is within `MARGIN` of the highest.

    Raises:
      UsageError: no arm has a pooled effect.
    """
    known = [x for x in arms if np.isfinite(x.pooled)]
    if not known:
        raise UsageError(
            "both tasks are at the floor"
            if any(x.complete for x in arms)
            else f"no arm has all seeds, {SEEDS}, on both tasks, as model-free must have too"
        )
    best = max(x.pooled for x in known)
    return next(x.arm for x in known if x.pooled >= best - MARGIN)


def main(arguments: Sequence[str]) -> int:
    """Write the table of the folder that is given, and print it with the selected arm."""
    if len(arguments) != 1:
        raise UsageError("give one folder, such as results/seven-pilot")
    folder = Path(arguments[0])
    found = read(folder)
    arms, tasks = compare(found), sorted({x.task for x in found})
    rows = [
        {"arm": x.arm, "learners": x.learners, "pooled": f"{x.pooled:.3f}"}
        | {
            task: f"{e.point:.3f} ({e.low:.3f} to {e.high:.3f})" if e else "not counted"
            for task in tasks
            for e in [x.effects.get(task)]
        }
        for x in arms
    ]
    for row in rows:
        print("  ".join(f"{value!s:<28}" for value in row.values()))
    selected = select(arms)
    write_csv(folder / "pilot.csv", rows)
    print(f"selected: {selected}")
    return 0


if __name__ == "__main__":
    common.run(main)
