"""Draws what the two causes are, and what the fixes do to them, on tasks that were diagnosed.

  python experiments/method_picture.py results/diagnosis/humanoid-stand --out=docs/pictures

The folder is one that `experiments/diagnose.py --env=TASK --out=FOLDER` has written: random
transitions of three seeds, and small ensembles fitted to them under every fix. Writes
targets.png, channels.png and reward.png.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags

from dynajax import UsageError
from dynajax.cli import common
from dynajax.report import dimensions, figures, statistics
from dynajax.runs.directory import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OUT = flags.DEFINE_string("out", "docs/pictures", "Folder for the pictures.")

#: Codes with their colours.
_CODES = {
    "none": figures.VERMILLION,
    "scale": figures.SKY,
    "target": figures.PURPLE,
    "scale,target": figures.BLUE,
    "scale,auto": figures.ORANGE,
    "scale,auto,beta": figures.GREEN,
}


def _table(path: Path) -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(path.open()))
    except OSError as error:
        raise UsageError(
            f"{path}: it cannot be read ({error.strerror}); give a folder that diagnose.py has written"
        ) from None


#: Inches.
_SIZE = (5.6, 3.5)


class Diagnosed(NamedTuple):
    """What diagnose.py has written of a task."""

    channels: list[dict[str, str]]  # a line for each channel of the observation
    codes: list[dict[str, str]]  # a line for each code and seed

    @property
    def names(self) -> list[str]:
        return [row["dim"] for row in self.channels]

    def select_dims(self, name: str) -> np.ndarray:
        """A column of the channels, (D,)."""
        return np.array([float(row[name]) for row in self.channels])

    def of_seeds(self, name: str, code: str) -> np.ndarray:
        """A column of the seeds of a code, (seeds,)."""
        return np.array([float(row[name]) for row in self.codes if row["fix"] == code])


def targets(task: Diagnosed) -> "Figure":
    """The variance of every target, as published and without the residual."""
    x = np.arange(len(task.channels))
    delta, following = (np.maximum(task.select_dims(f"var_{n}"), 1e-12) for n in ("delta", "next"))
    reward = task.of_seeds("var_reward", "none").mean()
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, _SIZE, _SIZE)
        axes.vlines(x, delta, following, color="#c9c9c9", linewidth=1)
        axes.scatter(x, delta, 12, color=figures.VERMILLION, label="s' - s, as published")
        axes.scatter(x, following, 12, color=figures.PURPLE, marker="s", label="s' itself: target")
        axes.axhline(1, color=figures.SKY, linewidth=1.6, label="every target: scale")
        axes.axhline(reward, color=figures.BLACK, linestyle="--", label="the reward, as published")
        axes.set_yscale("log")
        axes.set_ylabel("variance of a target")
        axes.set_title("How large the targets are")
        _finish(figure, axes, task.names)
    return figure


def learned(task: Diagnosed) -> "Figure":
    """What is predicted of every channel under three codes."""
    x = np.arange(len(task.channels))
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, _SIZE, _SIZE)
        for i, code in enumerate(("none", "scale,target", "scale,auto,beta")):
            skill = np.maximum(task.select_dims(f"r2 {code}"), dimensions.FLOOR)
            axes.scatter(x + 0.2 * (i - 1), skill, 12, color=_CODES[code], label=code)
        axes.axhline(0, color="#8a8a8a", linewidth=1)
        axes.set_ylim(dimensions.FLOOR - 0.05, 1.05)
        axes.set_ylabel("share of the change predicted")
        axes.set_title("What is learned of each channel")
        _finish(figure, axes, task.names)
    return figure


def _finish(figure: "Figure", axes: "Axes", names: Sequence[str]) -> None:
    place: Any = {"loc": "outside lower center", "ncols": 2, "fontsize": 8.5}
    figure.legend(**place)
    dimensions.label_dims(axes, names)


def reward(task: Diagnosed) -> "Figure":
    """What is predicted of the reward under every code."""
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, (5.6, 2.9), (5.6, 2.9))
        for place, (code, colour) in enumerate(_CODES.items()):
            point, low, high = map(float, statistics.interval(task.of_seeds("reward_r2", code)))
            axes.barh(place, max(point, -1), 0.66, color=colour, alpha=0.85)
            axes.plot(np.clip([low, high], -1, 1), [place] * 2, color=figures.BLACK, linewidth=1.4)
            axes.text(1.06, place, statistics.format_number(point), va="center", fontsize=9)
        axes.axvline(0, color=figures.BLACK, linewidth=0.8)
        axes.set_yticks(range(len(_CODES)), list(_CODES))
        axes.set_ylim(len(_CODES) - 0.4, -0.6)
        axes.set_xlim(-1, 1.3)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.grid(axis="y", visible=False)
        axes.set_title("What is learned of the reward")
        axes.set_xlabel("R² on transitions that no fit saw")
    return figure


def main(folders: Sequence[str]) -> None:
    if len(folders) != 1:
        raise UsageError("name one folder that diagnose.py --env has written")
    out = common.folder(_OUT.value)
    folder = common.folder(folders[0])
    rows = [row for row in _table(folder / "dims.csv") if row["kind"] != "reward"]
    task = Diagnosed(rows, _table(folder / "fixes.csv"))
    pictures = {"targets": targets(task), "channels": learned(task), "reward": reward(task)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            write_atomically(out / f"{name}.png", figures.png(figure))
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None
    print(f"{', '.join(pictures)}: {out}")


if __name__ == "__main__":
    common.run(main)
