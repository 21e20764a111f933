"""Draw errors of predictions: by dimension of the observation, and on a logarithmic axis."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dynajax.report import figures, statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Lower values of R² are drawn here, where the axis is linear.
FLOOR = -1.0
#: Smaller values of 1 - R² are drawn here.
LEAST = 1e-6
#: Label of an axis of 1 - R².
UNEXPLAINED = "unexplained variance, 1 - R²"
#: Number of dimensions from which on marks are small.
MANY = 120


class Part(NamedTuple):
    """Neighbouring dimensions of one part of the observation, such as "velocity"."""

    name: str
    first: int
    last: int


def split_parts(dims: Sequence[str]) -> list[Part]:
    """Return the parts of an observation with the names `dims`."""
    parts: list[Part] = []
    for i, dim in enumerate(dims):
        name = dim.split("[")[0]
        if parts and parts[-1].name == name:
            parts[-1] = parts[-1]._replace(last=i)
        else:
            parts.append(Part(name, i, i))
    return parts


def label_dims(axes: "Axes", dims: Sequence[str]) -> None:
    """Write the parts of an observation along the x axis, with lines between them."""
    parts = split_parts(dims)
    axes.set_xlim(-0.7, len(dims) - 0.3)
    axes.grid(axis="x", visible=False)
    if len(parts) == 1:
        axes.set_xlabel(f"dimension of {parts[0].name}")
        return
    for part in parts[1:]:
        axes.axvline(part.first - 0.5, color="#dddddd", linewidth=0.8)
    # The names of small parts would overlap in a long observation.
    smallest = len(dims) / 40
    named = [p for p in parts if p.last - p.first + 1 >= smallest] if len(parts) > 6 else parts
    turned = len(named) > 5
    axes.set_xticks(
        [(p.first + p.last) / 2 for p in named],
        [p.name for p in named],
        rotation=30 if turned else 0,
        ha="right" if turned else "center",
    )


def set_error_axis(axes: "Axes", values: np.ndarray, *, vertical: bool) -> None:
    """Make an axis logarithmic for values of 1 - R², and mark what predicting the mean gives.

    Args:
      values: all that is drawn.
      vertical: for the y axis, else the x axis.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    finite = values[np.isfinite(values)]
    low, high = min(finite.min(initial=1.0), 0.5), max(finite.max(initial=1.0), 2.0)
    limits = low / 1.4, high * 1.4
    if vertical:
        axes.set_yscale("log")
        axes.set_ylim(limits)
        axes.axhline(1, color="#8a8a8a", linewidth=1)
    else:
        axes.set_xscale("log")
        axes.set_xlim(limits)
        axes.axvline(1, color="#8a8a8a", linewidth=1)
    axis = axes.yaxis if vertical else axes.xaxis
    if high / low < 100:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def unexplained(r2: np.ndarray) -> Any:
    """Return 1 - R², at least `LEAST`, for a logarithmic axis."""
    return np.maximum(1 - r2, LEAST)


def draw_errors(
    columns: Mapping[str, Mapping[str, np.ndarray]],
    colours: Mapping[str, str],
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draw 1 - R² of several methods: the mean over seeds, and each seed as a small dot.

    Args:
      columns: R² (seeds,) by the title of the axes and the name of the method.
      colours: of the methods, which have the same order in all columns.
      size: inches of a figure with a single column.
    """
    names = list(colours)
    height = 1.2 + 0.32 * len(names)
    with figures.house_style():
        figure, grid = figures.canvas(len(columns), size or (figures.WIDTH, height), height)
        for i, (axes, (title, values)) in enumerate(zip(grid, columns.items(), strict=True)):
            drawn = []
            for place, name in enumerate(names):
                seeds = unexplained(values[name])
                mean = unexplained(statistics.interval(values[name]).point)
                drawn += [*seeds, float(mean)]
                axes.scatter(seeds, np.full(len(seeds), place), 9, color=colours[name], alpha=0.6)
                axes.scatter(mean, place, 52, color=colours[name], zorder=3)
            set_error_axis(axes, np.array(drawn), vertical=False)
            axes.set_yticks(range(len(names)), names if i == 0 else [""] * len(names))
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.set_title(title)
            axes.set_xlabel(UNEXPLAINED)
    return figure


def draw_r2(
    dims: Sequence[str],
    values: Mapping[str, np.ndarray],
    size: tuple[float, float],
    colours: Mapping[str, str] | None = None,
) -> "Figure":
    """Draw 1 - R² of each dimension for several methods.

    Args:
      dims: D names.
      values: R² (D,) by the name of the method; NaN where R² is not defined.
      size: inches.
      colours: of the methods, by default those of `figures.styles`.
    """
    x, style = np.arange(len(dims)), figures.styles(list(values))
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, size)
        for i, (name, r2) in enumerate(values.items()):
            offset = (i - (len(values) - 1) / 2) * 0.16
            axes.scatter(
                x + offset,
                unexplained(r2),
                11 if len(x) < MANY else 5,
                color=(colours or {}).get(name) or style[name]["color"],
                label=name,
                alpha=0.9,
            )
        set_error_axis(axes, unexplained(np.array(list(values.values()))), vertical=True)
        axes.set_ylabel(UNEXPLAINED)
        axes.set_title("Error of each state dimension")
        if len(values) > 1:
            place = {"loc": "outside lower center", "ncols": min(len(values), 4)}
            figure.legend(**place)  # type: ignore[arg-type]
        label_dims(axes, dims)
    return figure
