"""Draw figures in one style, with one colour for each variant.

The colours are those of Okabe and Ito (2008), which people with any colour vision can distinguish.
Only matplotlib's object interface is used, so nothing here needs a display or changes global state.
"""

import contextlib
import importlib
import io
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dynajax.report import published, statistics
from dynajax.report.published import Published

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLACK, BLUE, SKY, GREEN = "#333333", "#0072B2", "#56B4E9", "#009E73"
VERMILLION, PURPLE, ORANGE = "#D55E00", "#CC79A7", "#E69F00"
_COLOURS = {
    "model-free": BLACK,
    "none": VERMILLION,
    "scale,target": BLUE,
    "scale": SKY,
    "target": PURPLE,
}
#: Of variants that are not in `_COLOURS`.
_OTHER_COLOURS = (GREEN, ORANGE)
_DASHES = ("-", "--", "-.")
#: Muted colours of published curves; each method of `published.METHODS` has a different mark.
_PUBLISHED_COLOURS = ("#8c8c8c", "#c2a15e", "#7d9fc4", "#b58bb9", "#86b08c", "#cd8d8d")
_MARKS = "os^DvPX<>*hp"
_INK, _FAINT = "#333333", "#8a8a8a"
STEPS, FRAMES = "environment steps", "frames"
RETURN = "return (reward per episode)"

_STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "text.color": _INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "figure.facecolor": "white",
}

Style = dict[str, str]
#: (steps (T,), values (seeds, T)) for each name; NaN where there is no value.
Series = Mapping[str, tuple[np.ndarray, np.ndarray]]


class Panel(NamedTuple):
    """One set of axes with curves."""

    lines: Series
    ylabel: str
    title: str = ""
    dotted: Series | None = None  # drawn dotted, in the colour of the same name
    scale: str = "linear"  # or "log", "symlog"
    floor: float | None = None  # the axis begins here or higher
    include: float | None = None  # a value that the axis must contain
    mark: float | None = None  # an x to mark with a vertical line
    xlabel: str = STEPS
    bands: Mapping[str, statistics.ConfidenceInterval] | None = None  # (T,) instead of t intervals
    published: Sequence[Published] = ()  # drawn behind the lines, by frames

    def in_frames(self, repeat: int) -> "Panel":
        """Return the panel by frames (simulator steps), if an agent step has several."""
        if repeat == 1:
            return self

        def scaled(lines: Series) -> Series:
            return {name: (repeat * steps, values) for name, (steps, values) in lines.items()}

        return self._replace(
            lines=scaled(self.lines),
            dotted=None if self.dotted is None else scaled(self.dotted),
            mark=None if self.mark is None else repeat * self.mark,
            xlabel=FRAMES,
        )


class Bars(NamedTuple):
    """One set of axes with a horizontal bar for each name."""

    title: str
    xlabel: str
    values: Mapping[str, statistics.ConfidenceInterval]
    reference: float | None = None  # a value to mark with a vertical line
    most: float | None = None  # the largest possible value


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Return a colour and a dash for each name, the same in every figure that shows it.

    The variants of the paper have fixed colours; others take the remaining colours, then dashes. A
    label of a comparison has the colour of its variant ("MBPO scale" and "MBPO SimBa scale" that
    of "scale", "SimBa (model-free)" that of "model-free"); if several have the same variant, the
    first has the colour.
    """
    looks: dict[str, Style] = {}
    free = [
        {"color": colour, "linestyle": dash}
        for dash in _DASHES
        for colour in (_OTHER_COLOURS if dash == "-" else (*_COLOURS.values(), *_OTHER_COLOURS))
    ]
    used = 0
    for name in dict.fromkeys(names):
        look = {"color": _COLOURS.get(_variant(name), ""), "linestyle": "-"}
        if not look["color"] or look in looks.values():
            look = free[used % len(free)]
            used += 1
        looks[name] = look
    return looks


def _variant(name: str) -> str:
    """Return the variant that a label names."""
    if name.endswith(" (model-free)"):
        return "model-free"
    algorithm, *rest = name.split(" ")
    if algorithm != "MBPO":
        return name
    return rest[-1] if rest else "none"


def curves(
    panels: Sequence[Panel], *, title: str = "", alone: tuple[float, float] = (7.2, 4.3)
) -> "Figure":
    """Draw panels of curves in at most three columns: mean over seeds, 95 % t interval shaded.

    Args:
      alone: size in inches if there is only one panel.
    """
    names = dict.fromkeys(name for panel in panels for name in panel.lines)
    style = styles(list(names))
    published_labels = published.labels([c for panel in panels for c in panel.published])
    with house_style():
        figure, grid = canvas(len(panels), alone, (4.6, 3.4))
        for axes, panel in zip(grid, panels, strict=True):
            _draw_published(axes, panel.published, published_labels)
            _draw(axes, panel, style)
        handles = {str(h.get_label()): h for axes in grid for h in axes.get_lines()}
        # The runs come before the published curves.
        order = [*names, *published_labels.values()]
        handles = {n: handles[n] for n in order if n in handles}
        if handles:
            # About twelve characters fit on an inch. The rows are filled evenly.
            fit = max(1, int(12 * figure.get_figwidth() / (max(map(len, handles)) + 8)))
            rows = -(-len(handles) // fit)
            columns = -(-len(handles) // rows)
            figure.set_figheight(figure.get_figheight() + 0.21 * (rows - 1))
            place: Any = {"loc": "outside lower center", "ncols": columns, "handlelength": 2.2}
            figure.legend(list(handles.values()), list(handles), **place)
        if title:
            _title(figure, title)
    return figure


def _title(figure: "Figure", title: str) -> None:
    # About ten characters of this size fit on an inch.
    text = textwrap.fill(title, int(10 * figure.get_figwidth()))
    figure.suptitle(text, fontsize=11.5, fontweight="bold", x=0.02, ha="left")


def small(panel: Panel, style: Mapping[str, Style]) -> "Figure":
    """Draw one panel at half the width of a report, which has one legend for all of them."""
    with house_style():
        figure, (axes,) = canvas(1, (4.8, 2.9), (4.8, 2.9))
        _draw(axes, panel, style)
    return figure


def bars(panels: Sequence[Bars], *, title: str, note: str = "") -> "Figure":
    """Draw horizontal bars with intervals; panels with the same names share their labels."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.values))
    style = styles(names)
    shared = all(len(panel.values) == len(names) for panel in panels)
    height = 1.5 + 0.34 * max((len(panel.values) for panel in panels), default=1)
    with house_style():
        figure, grid = canvas(len(panels), (7.2, height), (3.9 if shared else 4.9, height))
        for i, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
            _draw_bars(axes, panel, style)
            if shared and i % _columns(len(panels)):
                axes.tick_params(labelleft=False)
        _title(figure, title)
        if note:
            # About sixteen characters of this size fit on an inch.
            width = int(16 * figure.get_figwidth())
            lines = [part for line in note.split("\n") for part in textwrap.wrap(line, width)]
            figure.set_figheight(figure.get_figheight() + 0.14 * (len(lines) - 1))
            look: Any = {"fontsize": 8.5, "color": _FAINT, "x": 0.02, "ha": "left"}
            figure.supxlabel("\n".join(lines), **look)
    return figure


def mixed(panels: Sequence[Panel | Bars], *, title: str) -> "Figure":
    """Draw panels of curves and of bars with the same names next to each other."""
    names = dict.fromkeys(
        n for p in panels for n in (p.lines if isinstance(p, Panel) else p.values)
    )
    style = styles(list(names))
    most = max(len(p.values) for p in panels if isinstance(p, Bars))
    height = max(3.6, 1.6 + 0.34 * most)
    with house_style():
        figure, grid = canvas(len(panels), (7.2, height), (4.9, height))
        for axes, panel in zip(grid, panels, strict=True):
            if isinstance(panel, Bars):
                _draw_bars(axes, panel, style)
            else:
                _draw(axes, panel, style)
        _title(figure, title)
    return figure


def png(figure: "Figure", dpi: int = 160) -> bytes:
    """Return a figure as a PNG file; the same figure always gives the same bytes."""
    matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    figure.set_dpi(dpi)
    # Not `savefig`, which draws a figure once more to lay it out.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def matplotlib() -> ModuleType:
    """Import matplotlib without the backend that MPLBACKEND names.

    Writing files needs no interactive backend, and the import fails if that backend is not
    installed. If matplotlib knows the name, pyplot still uses that backend later.
    """
    if "matplotlib" in sys.modules:
        return sys.modules["matplotlib"]
    backend = os.environ.pop("MPLBACKEND", "")
    try:
        module = importlib.import_module("matplotlib")
    finally:
        if backend:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            module.rcParams["backend"] = backend
    return module


def house_style() -> contextlib.AbstractContextManager[None]:
    """Return a context in which matplotlib draws in the style of all figures."""
    return matplotlib().rc_context(_STYLE)


def _columns(count: int) -> int:
    return 2 if count == 4 else min(count, 3)


def blank(width: float, height: float) -> "Figure":
    """Return an empty figure with a size in inches; call it inside `house_style`."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def canvas(
    count: int, alone: tuple[float, float], each: tuple[float, float]
) -> tuple["Figure", list["Axes"]]:
    """Return a figure with `count` axes; call it inside `house_style`.

    Args:
      alone: size in inches if `count` is 1.
      each: size in inches of each of several axes.
    """
    columns = _columns(count)
    rows = -(-count // columns)
    figure = blank(*(alone if count == 1 else (each[0] * columns, each[1] * rows)))
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _draw(axes: "Axes", panel: Panel, style: Mapping[str, Style]) -> None:
    values, bands = _draw_lines(axes, panel, style)
    values += [c.mean for c in panel.published]
    bands += [c.mean + side * np.nan_to_num(c.std) for c in panel.published for side in (-1, 1)]
    data = np.concatenate(values)
    data = data[data > 0] if panel.scale == "log" else data
    if data.size:
        axes.set_yscale(panel.scale)
        _limit(axes, panel, data, np.concatenate(bands))
    else:
        axes.text(0.5, 0.5, "no values yet", transform=axes.transAxes, ha="center", color=_FAINT)
    if panel.mark is not None:
        axes.axvline(panel.mark, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title("\n".join(textwrap.fill(line, 44) for line in panel.title.split("\n")))
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_thousands)


def _draw_lines(
    axes: "Axes", panel: Panel, style: Mapping[str, Style]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Draw the lines of a panel; return their finite values, and the finite bounds of intervals."""
    drawn, bounds = [np.empty(0)], [np.empty(0)]
    shade = 0.15 if len(panel.lines) < 6 else 0.07
    for series, dotted in ((panel.lines, False), (panel.dotted or {}, True)):
        for name, (steps, values) in series.items():
            look: dict[str, Any] = {**style[name], "label": "_" if dotted else name}
            if dotted:
                look |= {"linestyle": ":", "linewidth": 1.5}
            elif len(steps) < 4:
                look |= {"marker": "o", "markersize": 4}
            mean, low, high = (panel.bands or {}).get(name) or statistics.interval(values)
            axes.plot(steps, mean, **look)
            if not dotted:
                axes.fill_between(steps, low, high, color=look["color"], alpha=shade, linewidth=0)
            drawn.append(values[np.isfinite(values)])
            bounds += [low[np.isfinite(low)], high[np.isfinite(high)]]
    return drawn, bounds


def _draw_published(axes: "Axes", curves: Sequence[Published], labels: Mapping[str, str]) -> None:
    """Draw means over seeds, with the standard deviation shaded."""
    order = list(published.METHODS)
    for c in curves:
        i = order.index(c.key)
        colour = _PUBLISHED_COLOURS[i % len(_PUBLISHED_COLOURS)]
        look: dict[str, Any] = {"color": colour, "marker": _MARKS[i], "markersize": 4, "zorder": 1}
        axes.plot(c.frames, c.mean, linewidth=1.2, linestyle=":", label=labels[c.key], **look)
        if len(c.frames) > 1:
            low, high = c.mean - c.std, c.mean + c.std
            axes.fill_between(c.frames, low, high, color=colour, alpha=0.1, linewidth=0, zorder=0)
        else:
            axes.errorbar(c.frames, c.mean, np.nan_to_num(c.std), color=colour, capsize=2, zorder=0)


def _limit(axes: "Axes", panel: Panel, data: np.ndarray, bands: np.ndarray) -> None:
    low, high = float(data.min()), float(data.max())
    if panel.scale == "linear" and bands.size:
        # The t interval of two seeds is huge, and must not flatten the curves.
        room = 0.3 * (high - low)
        low = max(min(low, float(bands.min())), low - room)
        high = min(max(high, float(bands.max())), high + room)
    if panel.include is not None:
        low, high = min(low, panel.include), max(high, panel.include)
    if panel.floor is not None:
        low, high = max(low, panel.floor), max(high, panel.floor)
    if panel.scale == "log":
        axes.set_ylim(low / 1.3, high * 1.3)
        if high / low < 100:
            from matplotlib.ticker import LogLocator, NullLocator

            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
    elif panel.scale == "linear":
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)


def _draw_bars(axes: "Axes", panel: Bars, style: Mapping[str, Style]) -> None:
    names = list(panel.values)
    reach = max((np.nanmax([*v, 0.0]) for v in panel.values.values()), default=1.0) or 1.0
    for place, name in enumerate(names):
        point, low, high = panel.values[name]
        hatch = None if style[name]["linestyle"] == "-" else "///"
        axes.barh(
            place,
            point,
            0.66,
            color=style[name]["color"],
            alpha=0.85,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
        )
        if np.isfinite(low):
            axes.plot([low, high], [place, place], color=_INK, linewidth=1.4)
        end = np.nanmax([point, high, 0.0])
        text = f"{point:,.0f}" if abs(point) >= 10 else f"{point:.3g}"
        axes.text(end + 0.03 * reach, place, text, va="center", fontsize=9)
    if panel.reference is not None:
        axes.axvline(panel.reference, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(right=1.2 * max(reach, panel.most or 0.0))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_title("\n".join(textwrap.fill(line, 44) for line in panel.title.split("\n")))
    axes.set_xlabel(panel.xlabel)


def _thousands(step: float, _: float | None = None) -> str:
    return f"{step / 1000:g}k" if abs(step) >= 1000 else f"{step:g}"
