"""Published learning curves of other methods, to compare runs with.

Each line of `published.csv` names its source: a file of results in the repository of the method's
authors, or of the authors of another method. Curves are given by frames (simulator steps). Only
means and standard deviations over seeds are available, so no interval is computed from them.
"""

import csv
import functools
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np

from dynajax.types import UsageError


class Method(NamedTuple):
    """Known settings of a published method."""

    name: str
    updates: int | None  # gradient updates per agent step (UTD); None: not known
    widths: str | None  # of its networks, actor/critic where they differ; None: not known


#: By the name that `--published` takes; numbers from the papers and configurations of the methods. The
#: best known come first: a figure has colours for a few.
METHODS = {
    "sac": Method("SAC", None, None),
    "simba": Method("SimBa", 2, "128/512 wide"),
    "bro": Method("BRO", 10, "256/512 wide"),
    "td-mpc2": Method("TD-MPC2", 1, "512 wide"),
    "simbav2": Method("SimbaV2", 8, None),
    "mr.q": Method("MR.Q", 1, "512 wide"),
    "wimle": Method("WIMLE", 10, "model 512 wide"),
    "simba-utd4": Method("SimBa with UTD 4", 4, "128/512 wide"),
    "simba-utd8": Method("SimBa with UTD 8", 8, "128/512 wide"),
    "simba-utd8-resets": Method("SimBa with UTD 8 and resets", 8, "128/512 wide"),
    "simbav2-utd1": Method("SimbaV2 with UTD 1", 1, None),
    "simbav2-utd2": Method("SimbaV2 with UTD 2", 2, None),
    "simbav2-utd4": Method("SimbaV2 with UTD 4", 4, None),
    "simbav2-resets": Method("SimbaV2 with resets", 8, None),
    "bro-utd2": Method("BRO with UTD 2", 2, "256/512 wide"),
    "xqc": Method("XQC", 2, None),
    "dr.q": Method("DR.Q", 1, "512 wide"),
    "flashsac": Method("FlashSAC", None, None),
    "dhmbpo": Method("DHMBPO", None, None),
    "sac-dhmbpo": Method("SAC, run by DHMBPO's authors", None, None),
    "td-mpc2-dhmbpo": Method("TD-MPC2, run by DHMBPO's authors", None, None),
}


class Published(NamedTuple):
    """The curve of a method on one task."""

    key: str
    task: str
    frames: np.ndarray  # (T,)
    mean: np.ndarray  # (T,) over seeds
    std: np.ndarray  # (T,) over seeds, NaN where it was not published
    seeds: tuple[int, ...]  # (T,) number of seeds of each evaluation
    repeat: int  # frames per agent step
    source: str

    def until(self, frames: int) -> "Published":
        """Return the part up to so many frames."""
        kept = self.frames <= frames
        seeds = tuple(n for n, k in zip(self.seeds, kept, strict=True) if k)
        return self._replace(
            frames=self.frames[kept], mean=self.mean[kept], std=self.std[kept], seeds=seeds
        )


def parse_methods(text: str) -> tuple[str, ...]:
    """Return the keys of `METHODS` in a comma list; "all" alone gives all of them, "" none.

    Raises:
      UsageError: an unknown name, or "all" among others.
    """
    names = tuple(dict.fromkeys(n.strip().lower() for n in text.split(",") if n.strip()))
    if names == ("all",):
        return tuple(METHODS)
    if "all" in names:
        raise UsageError(f"--published={text}: all includes the others; choose all alone")
    for name in names:
        if name not in METHODS:
            raise UsageError(
                f"--published={text}: no curves of {name}; choose all, or from {', '.join(METHODS)}"
            )
    return names


@functools.cache
def _curves() -> dict[tuple[str, str], Published]:
    """Read all curves, by method and task."""
    lines: dict[tuple[str, str], list[dict[str, str]]] = {}
    with resources.files(__package__).joinpath("published.csv").open() as file:
        for line in csv.DictReader(file):
            lines.setdefault((line["method"], line["task"]), []).append(line)
    curves = {}
    for (key, task), evaluations in lines.items():
        evaluations.sort(key=lambda line: int(line["frames"]))
        mean, std = (
            np.array([float(line[name] or "nan") for line in evaluations])
            for name in ("return_mean", "return_std")
        )
        curves[key, task] = Published(
            key,
            task,
            np.array([int(line["frames"]) for line in evaluations]),
            mean,
            std,
            tuple(int(line["seeds"]) for line in evaluations),
            int(evaluations[0]["action_repeat"]),
            evaluations[0]["source"],
        )
    return curves


def curves_on(task: str, keys: Sequence[str]) -> list[Published]:
    """Return the curves of some methods on a task; methods that did not publish one are left out."""
    return [_curves()[key, task] for key in keys if (key, task) in _curves()]


def curves_until(task: str, keys: Sequence[str], frames: int) -> list[Published]:
    """Return the curves of some methods on a task, cut to compare them with a run of so many frames.

    They are cut there, or later if one of them has its first evaluation later, so that each
    curve has at least one point.
    """
    curves = curves_on(task, keys)
    end = max((int(c.frames[0]) for c in curves), default=0)
    return [c.until(max(frames, end)) for c in curves]


def labels(curves: Sequence[Published]) -> dict[str, str]:
    """Return a label for each method among some curves, by its key.

    A label names updates per agent step (UTD), frames per agent step (repeat), network widths and
    seeds, as far as they are known: "BRO (UTD 10, repeat 1, 256/512 wide, 5 to 10 seeds)".
    """
    texts = {}
    for key in dict.fromkeys(c.key for c in curves):
        method = METHODS[key]
        seeds = sorted({n for c in curves if c.key == key for n in c.seeds})
        repeats = sorted({c.repeat for c in curves if c.key == key})
        parts = [
            "" if method.updates is None or "UTD" in method.name else f"UTD {method.updates}",
            f"repeat {_range(repeats)}",
            method.widths or "",
            f"{_range(seeds)} seeds",
        ]
        texts[key] = f"{method.name} ({', '.join(filter(None, parts))})"
    return texts


def _range(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{first}" if first == last else f"{first} to {last}"


def sources(curves: Sequence[Published]) -> list[str]:
    """Return the source of the curves, one text for each file of results."""
    names: dict[str, list[str]] = {}
    for c in curves:
        names.setdefault(c.source, []).append(METHODS[c.key].name)
    return [f"{source} ({', '.join(dict.fromkeys(n))})" for source, n in sorted(names.items())]
