"""The pictures of the diagnosis before training, and what those of a run share with them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dynajax.diagnose import measures
from dynajax.diagnose.offline import Offline
from dynajax.report import dimensions, figures, statistics
from dynajax.report.dimensions import FLOOR, MANY, by_channel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bars(offline: Offline, best: str) -> "Figure":
    """How much every code predicts: three sets of bars that share their labels."""
    skill = offline.scores["skill"]
    columns = {
        "The reward": offline.scores["reward_r2"],
        "The state (median channel)": measures.median(skill),
        "The five worst channels": measures.worst(skill),
    }
    names = list(offline.codes)
    colours = {best: figures.GREEN, "none": figures.VERMILLION}
    height = 1.2 + 0.32 * len(names)
    with figures.house_style():
        figure, grid = figures.canvas(3, (3.5, height), (3.5, height))
        for i, (axes, (title, values)) in enumerate(zip(grid, columns.items(), strict=True)):
            for place, name in enumerate(names):
                point, low, high = (float(x) for x in statistics.interval(values[:, place]))
                if not np.isfinite(point):
                    continue
                bar = max(point, FLOOR)
                axes.barh(place, bar, 0.66, color=colours.get(name, figures.SKY), alpha=0.85)
                if np.isfinite(low):
                    axes.plot(np.clip([low, high], FLOOR, 1), [place] * 2, color=figures.BLACK)
                axes.text(1.06, place, statistics.number(point), va="center", fontsize=9)
            axes.set_yticks(range(len(names)), names if i == 0 else [""] * len(names))
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_xlim(FLOOR, 1.35)
            axes.set_xticks([-1, -0.5, 0, 0.5, 1])
            axes.axvline(0, color=figures.BLACK, linewidth=0.8)
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.set_title(title)
            axes.set_xlabel("share predicted")
    return figure


def scales(offline: Offline) -> "Figure":
    """Variances of s' - s and of s' by channel, and of the reward."""
    x = np.arange(len(offline.channels))
    delta, there = (offline.scales[n].mean(0) for n in ("var_delta", "var_next"))
    reward = float(offline.scales["var_reward"].mean())
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, (9.6, 3.4), (9.6, 3.4))
        floor = measures.CONSTANT**2
        a, b = np.maximum(delta, floor), np.maximum(there, floor)
        direct = delta > there
        axes.vlines(x, a, b, color=np.where(direct, figures.VERMILLION, "#c9c9c9"), linewidth=1.2)
        size = 16 if len(x) < MANY else 7
        axes.scatter(x, b, size, color=figures.SKY, marker="s", label="s' itself")
        axes.scatter(x, a, size, color=figures.BLUE, label="change in a step, s' - s", zorder=3)
        axes.axhline(
            max(reward, floor), color=figures.BLACK, linestyle=(0, (4, 3)), label="the reward"
        )
        axes.set_yscale("log")
        axes.set_ylabel("variance")
        axes.set_title("How large the targets are")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        by_channel(axes, offline.channels)
    return figure


def skills(offline: Offline, shown: Sequence[str]) -> "Figure":
    """Skill by channel of a few codes."""
    values = {code: offline.scores["skill"][:, offline.codes.index(code)].mean(0) for code in shown}
    return dimensions.skills(offline.channels, values, (9.6, 3.2))
