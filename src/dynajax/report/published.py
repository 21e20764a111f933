"""Published learning curves of other methods, to be drawn behind our own.

`published.csv` has them by frames, the simulator's steps, each line with its source: a file of
results in its authors', or in another method's authors', repository. Means and standard deviations
over seeds are theirs; curves of single seeds are not at hand, so nothing is computed from these.
"""

import csv
import functools
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np

from dynajax.types import UsageError


class Method(NamedTuple):
    """What is known of how a method was run."""

    name: str
    updates: int | None  # gradient updates a decision; None: not known
    widths: str | None  # of its networks, actor/critic where they differ; None: not known


#: By the name that `--published` takes; numbers from the methods' papers and configurations.
METHODS = {
    "sac": Method("SAC", None, None),
    "simba": Method("SimBa", 2, "128/512 wide"),
    "simbav2-utd2": Method("SimbaV2", 2, None),
    "simbav2": Method("SimbaV2", 8, None),
    "bro": Method("BRO", 10, "256/512 wide"),
    "mr.q": Method("MR.Q", 1, "512 wide"),
    "td-mpc2": Method("TD-MPC2", 1, "512 wide"),
    "wimle": Method("WIMLE", 10, "model 512 wide"),
    "xqc": Method("XQC", 2, None),
    "dr.q": Method("DR.Q", 1, "512 wide"),
    "flashsac": Method("FlashSAC", None, None),
    "dhmbpo": Method("DHMBPO", None, None),
}


class Published(NamedTuple):
    """A method's curve on one task."""

    key: str
    task: str
    frames: np.ndarray  # (T,)
    mean: np.ndarray  # (T,) over seeds
    std: np.ndarray  # (T,) over seeds, NaN where it was not published
    seeds: tuple[int, ...]  # (T,) of each evaluation
    repeat: int  # frames of a decision
    source: str

    def until(self, frames: int) -> "Published":
        """The part up to so many frames."""
        kept = self.frames <= frames
        seeds = tuple(n for n, k in zip(self.seeds, kept, strict=True) if k)
        return self._replace(
            frames=self.frames[kept], mean=self.mean[kept], std=self.std[kept], seeds=seeds
        )


def choose(text: str) -> tuple[str, ...]:
    """The keys of a comma list, or of "all" or "".

    Raises:
      UsageError: an unknown name.
    """
    names = tuple(dict.fromkeys(n.strip().lower() for n in text.split(",") if n.strip()))
    if names == ("all",):
        return tuple(METHODS)
    for name in names:
        if name not in METHODS:
            raise UsageError(
                f"--published={text}: no curves of {name}; choose all, or from {', '.join(METHODS)}"
            )
    return names


@functools.cache
def _curves() -> dict[tuple[str, str], Published]:
    """Every curve by method and task."""
    lines: dict[tuple[str, str], list[dict[str, str]]] = {}
    with resources.files(__package__).joinpath("published.csv").open() as file:
        for line in csv.DictReader(file):
            lines.setdefault((line["method"], line["task"]), []).append(line)
    curves = {}
    for (key, task), rows in lines.items():
        rows.sort(key=lambda row: int(row["frames"]))
        mean, std = (
            np.array([float(row[name] or "nan") for row in rows])
            for name in ("return_mean", "return_std")
        )
        curves[key, task] = Published(
            key,
            task,
            np.array([int(row["frames"]) for row in rows]),
            mean,
            std,
            tuple(int(row["seeds"]) for row in rows),
            int(rows[0]["action_repeat"]),
            rows[0]["source"],
        )
    return curves


def of(task: str, keys: Sequence[str]) -> list[Published]:
    """The whole curves of a task, by the methods' keys; what is not published is left out."""
    return [_curves()[key, task] for key in keys if (key, task) in _curves()]


def beside(task: str, keys: Sequence[str], frames: int) -> list[Published]:
    """The part of a task's curves that goes beside one of our own of so many frames.

    They are cut at its end, or where that is before the first evaluation of one of them, at the
    last of these first ones: so each has a point.
    """
    curves = of(task, keys)
    end = max((int(c.frames[0]) for c in curves), default=0)
    return [c.until(max(frames, end)) for c in curves]


def labels(curves: Sequence[Published]) -> dict[str, str]:
    """What each method's curves are called in a figure that shows some of its tasks, by key:
    "BRO (UTD 10, repeat 1, 256/512 wide, 5 to 10 seeds)"; UTD, updates a decision, and widths
    where they are known."""
    texts = {}
    for key in dict.fromkeys(c.key for c in curves):
        method = METHODS[key]
        seeds = sorted({n for c in curves if c.key == key for n in c.seeds})
        repeats = sorted({c.repeat for c in curves if c.key == key})
        parts = [
            "" if method.updates is None else f"UTD {method.updates}",
            f"repeat {_to(repeats)}",
            method.widths or "",
            f"{_to(seeds)} seeds",
        ]
        texts[key] = f"{method.name} ({', '.join(filter(None, parts))})"
    return texts


def _to(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{first}" if first == last else f"{first} to {last}"


def sources(curves: Sequence[Published]) -> list[str]:
    """Where the curves are from, one text for each file of results."""
    names: dict[str, list[str]] = {}
    for c in curves:
        names.setdefault(c.source, []).append(METHODS[c.key].name)
    return [f"{source} ({', '.join(dict.fromkeys(n))})" for source, n in sorted(names.items())]
