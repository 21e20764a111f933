"""Pictures with a place for every channel of an observation."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dynajax.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What lies lower is cut off.
FLOOR = -1.0
#: Channels from which on their marks are small.
MANY = 120


def groups(channels: Sequence[str]) -> list[tuple[str, int, int]]:
    """(name, first, last) of neighbouring channels of one part of the observation."""
    parts: list[tuple[str, int, int]] = []
    for i, channel in enumerate(channels):
        name = channel.split("[")[0]
        if parts and parts[-1][0] == name:
            parts[-1] = (name, parts[-1][1], i)
        else:
            parts.append((name, i, i))
    return parts


def by_channel(axes: "Axes", channels: Sequence[str]) -> None:
    """Names the parts of an observation along the x axis, with lines between them."""
    parts = groups(channels)
    axes.set_xlim(-0.7, len(channels) - 0.3)
    axes.grid(axis="x", visible=False)
    if len(parts) == 1:
        axes.set_xlabel(f"entry of {parts[0][0]}")
        return
    for _, first, _ in parts[1:]:
        axes.axvline(first - 0.5, color="#dddddd", linewidth=0.8)
    # Names of small parts would overlap in a long observation.
    least = len(channels) / 40
    named = [p for p in parts if p[2] - p[1] + 1 >= least] if len(parts) > 6 else parts
    turned = len(named) > 5
    axes.set_xticks(
        [(a + b) / 2 for _, a, b in named],
        [n for n, _, _ in named],
        rotation=30 if turned else 0,
        ha="right" if turned else "center",
    )


def skills(
    channels: Sequence[str], values: Mapping[str, np.ndarray], size: tuple[float, float]
) -> "Figure":
    """How much is predicted of every channel, by methods beside each other.

    Args:
      channels: D names.
      values: skills (D,) by the method's name; NaN where there is none.
      size: inches.
    """
    x, style = np.arange(len(channels)), figures.styles(list(values))
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, size, size)
        for i, (name, skill) in enumerate(values.items()):
            shift = (i - (len(values) - 1) / 2) * 0.16
            axes.scatter(
                x + shift,
                np.maximum(skill, FLOOR),
                11 if len(x) < MANY else 5,
                color=style[name]["color"],
                label=name,
                alpha=0.9,
            )
        axes.axhline(0, color="#8a8a8a", linewidth=1)
        axes.set_ylim(FLOOR - 0.05, 1.05)
        axes.set_ylabel("share predicted")
        axes.set_title("Which channels are learned")
        if len(values) > 1:
            place = {"loc": "outside lower center", "ncols": min(len(values), 4)}
            figure.legend(**place)  # type: ignore[arg-type]
        by_channel(axes, channels)
    return figure
