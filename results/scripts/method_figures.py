"""Draw the two causes of failure and the effect of the fixes, for a task that was diagnosed.

  python results/scripts/method_figures.py results/diagnosis/humanoid-stand --out=docs/pictures

`experiments/diagnose.py --env=TASK --out=FOLDER` writes the folder: random transitions of three seeds,
and small ensembles fitted to them with every fix. Writes targets.png, channels.png and reward.png.
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

_OUT = flags.DEFINE_string("out", "docs/pictures", "Folder for the figures.")

#: The combinations of fixes with their colours.
_COLOURS = {
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


#: Size of a panel in inches.
_SIZE = (5.6, 3.5)


class Diagnosed(NamedTuple):
    """The tables that diagnose.py has written about a task."""

    dims: list[dict[str, str]]  # a line for each dimension of the observation
    fits: list[dict[str, str]]  # a line for each combination of fixes and seed

    @property
    def names(self) -> list[str]:
        return [line["dim"] for line in self.dims]

    def by_dim(self, name: str) -> np.ndarray:
        """Return a column of the dimensions, (D,)."""
        return np.array([float(line[name]) for line in self.dims])

    def by_seed(self, name: str, fixes: str) -> np.ndarray:
        """Return a column of the seeds of a combination of fixes, (seeds,)."""
        return np.array([float(line[name]) for line in self.fits if line["fix"] == fixes])


def targets(task: Diagnosed) -> "Figure":
    """Draw the variance of every target, as published and without the residual."""
    x = np.arange(len(task.dims))
    delta, following = (np.maximum(task.by_dim(f"var_{n}"), 1e-12) for n in ("delta", "next"))
    reward = task.by_seed("var_reward", "none").mean()
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
    """Draw the R² of every dimension with three combinations of fixes."""
    x = np.arange(len(task.dims))
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, _SIZE, _SIZE)
        for i, fixes in enumerate(("none", "scale,target", "scale,auto,beta")):
            r2 = np.maximum(task.by_dim(f"r2 {fixes}"), dimensions.FLOOR)
            axes.scatter(x + 0.2 * (i - 1), r2, 12, color=_COLOURS[fixes], label=fixes)
        axes.axhline(0, color="#8a8a8a", linewidth=1)
        axes.set_ylim(dimensions.FLOOR - 0.05, 1.05)
        axes.set_ylabel("explained variance of the change")
        axes.set_title("What the model learns of each dimension")
        _finish(figure, axes, task.names)
    return figure


def _finish(figure: "Figure", axes: "Axes", names: Sequence[str]) -> None:
    place: Any = {"loc": "outside lower center", "ncols": 2, "fontsize": 8.5}
    figure.legend(**place)
    dimensions.label_dims(axes, names)


def reward(task: Diagnosed) -> "Figure":
    """Draw the R² of the reward with every combination of fixes."""
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, (5.6, 2.9), (5.6, 2.9))
        for place, (fixes, colour) in enumerate(_COLOURS.items()):
            point, low, high = map(float, statistics.interval(task.by_seed("reward_r2", fixes)))
            axes.barh(place, max(point, -1), 0.66, color=colour, alpha=0.85)
            axes.plot(np.clip([low, high], -1, 1), [place] * 2, color=figures.BLACK, linewidth=1.4)
            axes.text(1.06, place, statistics.format_number(point), va="center", fontsize=9)
        axes.axvline(0, color=figures.BLACK, linewidth=0.8)
        axes.set_yticks(range(len(_COLOURS)), list(_COLOURS))
        axes.set_ylim(len(_COLOURS) - 0.4, -0.6)
        axes.set_xlim(-1, 1.3)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.grid(axis="y", visible=False)
        axes.set_title("What the model learns of the reward")
        axes.set_xlabel("R² on held-out transitions")
    return figure


def main(folders: Sequence[str]) -> None:
    """Draw the figures of one task."""
    if len(folders) != 1:
        raise UsageError("name one folder that diagnose.py --env has written")
    out = common.expand_path(_OUT.value)
    folder = common.expand_path(folders[0])
    dims = [line for line in _table(folder / "dims.csv") if line["kind"] != "reward"]
    task = Diagnosed(dims, _table(folder / "fixes.csv"))
    drawn = {"targets": targets(task), "channels": learned(task), "reward": reward(task)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            write_atomically(out / f"{name}.png", figures.png(figure))
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None
    print(f"{', '.join(drawn)}: {out}")


if __name__ == "__main__":
    common.run(main)
