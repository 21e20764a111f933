"""Draw figures whose x axis has a place for each dimension of the observation."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dynajax.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Lower values of R² are drawn here.
FLOOR = -1.0
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


def draw_r2(
    dims: Sequence[str], values: Mapping[str, np.ndarray], size: tuple[float, float]
) -> "Figure":
    """Draw R² of each dimension for several methods.

    Args:
      dims: D names.
      values: (D,) by the name of the method; NaN where R² is not defined.
      size: inches.
    """
    x, style = np.arange(len(dims)), figures.styles(list(values))
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, size, size)
        for i, (name, r2) in enumerate(values.items()):
            offset = (i - (len(values) - 1) / 2) * 0.16
            axes.scatter(
                x + offset,
                np.maximum(r2, FLOOR),
                11 if len(x) < MANY else 5,
                color=style[name]["color"],
                label=name,
                alpha=0.9,
            )
        axes.axhline(0, color="#8a8a8a", linewidth=1)
        axes.set_ylim(FLOOR - 0.05, 1.05)
        axes.set_ylabel("R²")
        axes.set_title("R² of each state dimension")
        if len(values) > 1:
            place = {"loc": "outside lower center", "ncols": min(len(values), 4)}
            figure.legend(**place)  # type: ignore[arg-type]
        label_dims(axes, dims)
    return figure
