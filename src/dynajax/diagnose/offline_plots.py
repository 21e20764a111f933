"""Draw the figures of the diagnosis before training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dynajax.diagnose import measures
from dynajax.diagnose.offline import OfflineResult
from dynajax.report import dimensions, figures
from dynajax.report.dimensions import MANY, label_dims

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def errors(result: OfflineResult, best: str) -> "Figure":
    """Draw 1 - R² under every fix: of the reward, of the state, and of the worst dimensions."""
    state_r2 = result.held_out["state_r2"]
    columns = {
        "Reward": result.held_out["reward_r2"],
        "State, median dimension": measures.median(state_r2),
        "Five worst dimensions": measures.mean_of_lowest(state_r2),
    }
    colours = dict.fromkeys(result.fixes, figures.SKY)
    special = {"none": figures.VERMILLION, best: figures.GREEN}
    colours |= {name: colour for name, colour in special.items() if name in colours}
    return dimensions.draw_errors(
        {
            title: {name: values[:, f] for f, name in enumerate(result.fixes)}
            for title, values in columns.items()
        },
        colours,
    )


def target_variances(result: OfflineResult) -> "Figure":
    """Draw the variances of s' - s and of s' by dimension, and of the reward."""
    x = np.arange(len(result.dims))
    var_delta, var_next = (result.targets[n].mean(0) for n in ("var_delta", "var_next"))
    var_reward = float(result.targets["var_reward"].mean())
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, (9.6, 3.4))
        # A constant has no logarithm; it is drawn below everything that varies.
        drawn = np.concatenate([var_delta, var_next, [var_reward]])
        floor = min(1e-12, drawn[drawn > 0].min(initial=np.inf))
        a, b = np.maximum(var_delta, floor), np.maximum(var_next, floor)
        direct = var_delta > var_next
        axes.vlines(x, a, b, color=np.where(direct, figures.VERMILLION, "#c9c9c9"), linewidth=1.2)
        size = 16 if len(x) < MANY else 7
        axes.scatter(x, b, size, color=figures.SKY, marker="s", label="next state, s'")
        axes.scatter(x, a, size, color=figures.BLUE, label="change, s' - s", zorder=3)
        axes.axhline(
            max(var_reward, floor), color=figures.BLACK, linestyle=(0, (4, 3)), label="reward"
        )
        axes.set_yscale("log")
        axes.set_ylabel("variance")
        axes.set_title("Variance of the targets")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        label_dims(axes, result.dims)
    return figure


def r2_by_dim(result: OfflineResult, shown: Sequence[str]) -> "Figure":
    """Draw 1 - R² of each dimension under some fixes."""
    state_r2 = result.held_out["state_r2"]
    values = {name: state_r2[:, result.fixes.index(name)].mean(0) for name in shown}
    return dimensions.draw_r2(result.dims, values, (9.6, 3.2))
