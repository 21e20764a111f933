"""Draw the two causes of failure and the effect of the fixes, for a task that was diagnosed.

  python results/scripts/method_figures.py results/diagnosis/humanoid-stand --out=docs/pictures

`experiments/diagnose.py --env=TASK --out=FOLDER` writes the folder: random transitions of three seeds,
and small ensembles fitted to them with every fix. Writes targets.png, dimensions.png, reward.png and
fixes.png.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags

from dynajax import UsageError
from dynajax.cli import common
from dynajax.report import dimensions, figures
from dynajax.runs.directory import expand_user, write_atomically

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
_SIZE = (7.2, 3.9)


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
        figure, (axes,) = figures.canvas(1, _SIZE)
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
    """Draw the error of every dimension with three combinations of fixes."""
    values = {
        name: task.by_dim(f"r2 {name}") for name in ("none", "scale,target", "scale,auto,beta")
    }
    return dimensions.draw_r2(task.names, values, _SIZE, _COLOURS)


def _finish(figure: "Figure", axes: "Axes", names: Sequence[str]) -> None:
    place: Any = {"loc": "outside lower center", "ncols": 2, "fontsize": 8.5}
    figure.legend(**place)
    dimensions.label_dims(axes, names)


def reward(task: Diagnosed) -> "Figure":
    """Draw the error of the reward with every combination of fixes."""
    values = {name: task.by_seed("reward_r2", name) for name in _COLOURS}
    return dimensions.draw_errors({"Error of the reward": values}, _COLOURS, (7.2, 3.1))


def fixes(task: Diagnosed) -> "Figure":
    """Draw the first figure of a report: the errors with every combination of fixes."""
    names = list(dict.fromkeys(line["fix"] for line in task.fits))
    columns = {
        "Reward": "reward_r2",
        "State, median dimension": "state_r2",
        "Five worst dimensions": "state_r2_worst5",
    }
    return dimensions.draw_errors(
        {
            title: {name: task.by_seed(column, name) for name in names}
            for title, column in columns.items()
        },
        {name: _COLOURS.get(name, figures.SKY) for name in names},
    )


def main(folders: Sequence[str]) -> None:
    """Draw the figures of one task."""
    if len(folders) != 1:
        raise UsageError("name one folder that diagnose.py --env has written")
    out = expand_user(_OUT.value)
    folder = expand_user(folders[0])
    dims = [line for line in _table(folder / "dims.csv") if line["kind"] != "reward"]
    task = Diagnosed(dims, _table(folder / "fixes.csv"))
    drawn = {
        "targets": targets(task),
        "dimensions": learned(task),
        "reward": reward(task),
        "fixes": fixes(task),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            write_atomically(out / f"{name}.png", figures.png(figure))
    except OSError as error:
        raise UsageError(f"--out={out}: it cannot be written ({error.strerror})") from None
    print(f"{', '.join(drawn)}: {out}")


if __name__ == "__main__":
    common.run(main)
