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
from collections.abc import Callable, Mapping, Sequence
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
    "dynajax": GREEN,
}
#: Of variants that are not in `_COLOURS`.
_OTHER_COLOURS = (ORANGE, GREEN)
_DASHES = ("-", "--", "-.")
#: Muted colours of published curves, which are drawn behind those of the runs.
_PUBLISHED_COLOURS = ("#a8842c", "#5b83ad", "#9a6aa0", "#5f9068", "#b86a6a", "#6f6f6f")
_MARKS = "os^DvP"
#: Curves of a figure that have colours; further published curves are grey.
_MOST_COLOURS = 6
_INK, _FAINT, _GREY = "#333333", "#8a8a8a", "#c4c4c4"
#: Number of seeds from which on an interval is shaded. With fewer it would fill most figures, so that
#: each seed is drawn as a thin line instead.
MIN_SEEDS = 5
#: Largest width of a figure in inches: its text can be read if it is shown 800 pixels wide.
WIDTH = 9.6
STEPS, FRAMES = "agent steps", "frames"
RETURN = "return (reward per episode)"


def lines_meaning(min_seeds: int = MIN_SEEDS) -> str:
    """Return what the lines of a figure of curves are, see `Panel.min_seeds`."""
    return f"Thick: mean over seeds. Thin: single seeds. Shaded, from {min_seeds} seeds on: 95 % t interval"


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

#: How labels are wrapped.
_WHOLE_WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}

Style = dict[str, str]
#: (steps (T,), values (seeds, T)) for each name; NaN where there is no value.
Series = Mapping[str, tuple[np.ndarray, np.ndarray]]

#: (name of a line, its steps (T,)) -> its frames (T,)
FramesAt = Callable[[str, np.ndarray], np.ndarray]


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
    bounds: statistics.Bounds = statistics.UNBOUNDED  # of the values: intervals are cut there
    #: Further seeds, or parts of them: (steps (T,), values (seeds, T)) drawn thin by name.
    single: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]] | None = None
    published: Sequence[Published] = ()  # drawn behind the lines, by frames
    min_seeds: int = MIN_SEEDS  # that a line needs for a shaded interval

    def in_frames(self, frames_at: FramesAt | None) -> "Panel":
        """Return the panel by frames (simulator steps), if an agent step can have several."""
        if frames_at is None:
            return self

        def scaled(lines: Series) -> Series:
            return {name: (frames_at(name, x), values) for name, (x, values) in lines.items()}

        return self._replace(
            lines=scaled(self.lines),
            dotted=None if self.dotted is None else scaled(self.dotted),
            xlabel=FRAMES,
        )


class Bars(NamedTuple):
    """One set of axes with a horizontal bar for each name."""

    title: str
    xlabel: str
    values: Mapping[str, statistics.ConfidenceInterval]
    reference: float | None = None  # a value to mark with a vertical line
    most: float | None = None  # the largest possible value
    #: A group for each name, whose bars look alike; by default each name is one.
    groups: Mapping[str, str] | None = None
    label_width: int = 24  # characters after which a name continues in the next line


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Return a colour and a dash for each name, the same in every figure that shows it.

    The variants of the paper have fixed colours; others take the remaining colours, then dashes. A
    label of a comparison has the colour of its variant ("MBPO + scale" that of "scale", "SimBa
    (model-free)" that of "model-free"); if several have the same variant, the first has the colour.
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
    """Return the variant, or the algorithm, that a label of `run.label` names."""
    if name.endswith("(model-free)"):
        return "model-free"
    base = name.partition(" (")[0]
    algorithm, _, fixes = base.partition(" + ")
    if algorithm != "MBPO":
        return base
    return fixes.replace(", ", ",") or "none"


def curves(
    panels: Sequence[Panel | Bars],
    *,
    title: str = "",
    note: str = "",
    alone: tuple[float, float] = (7.2, 4.3),
) -> "Figure":
    """Draw panels in at most three columns: curves are means over seeds, see `lines_meaning`.

    Args:
      panels: bars have the colours of the curves with the same names.
      note: text below the figure.
      alone: size in inches if there is only one panel.
    """
    names = dict.fromkeys(name for panel in panels for name in _names(panel))
    style = styles(list(names))
    coloured, grey = published_colours([p for p in panels if isinstance(p, Panel)])
    if coloured:
        note += "\nDotted, with names at their ends: published means over seeds."
    if grey:
        note += f"\nGrey: published means of {', '.join(grey)}."
    with house_style():
        figure, grid = canvas(len(panels), alone)
        for axes, panel in zip(grid, panels, strict=True):
            _draw_panel(axes, panel, style, coloured)
        handles = {str(h.get_label()): h for axes in grid for h in axes.get_lines()}
        handles = {n: handles[n] for n in names if n in handles}
        _legend(figure, handles, title)
        _note(figure, note)
        _finish(figure, grid)
    return figure


def _names(panel: Panel | Bars) -> Sequence[str]:
    """Return the names of the lines, or bars, of a panel."""
    return list(panel.lines if isinstance(panel, Panel) else panel.values)


def _legend(figure: "Figure", handles: Mapping[str, Any], title: str) -> None:
    """Write the title of a figure and below it the legend, in rows that are filled evenly."""
    if not handles:
        _title(figure, title)
        return
    # About twelve characters fit on an inch.
    fit = max(1, int(12 * figure.get_figwidth() / (max(map(len, handles)) + 8)))
    rows = -(-len(handles) // fit)
    columns = -(-len(handles) // rows)
    figure.set_figheight(figure.get_figheight() + 0.21 * (rows - 1))
    # The layout would draw a title of the figure over a legend outside of the axes.
    text = _wrap_title(figure, title)
    figure.set_figheight(figure.get_figheight() + 0.2 * text.count("\n"))
    look: Any = {"title_fontproperties": {"size": 11.5, "weight": "bold"}} if text else {}
    look |= {"loc": "outside upper left", "ncols": columns, "handlelength": 2.2}
    figure.legend(
        list(handles.values()), list(handles), title=text or None, alignment="left", **look
    )


def _finish(figure: "Figure", grid: Sequence["Axes"]) -> None:
    """Wrap titles and labels at the width of their axes, which is known once they are laid out."""
    matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    first = grid[0].get_ylabel()
    for axes in grid[1:]:
        if axes.get_ylabel() == first:
            axes.set_ylabel("")
    FigureCanvasAgg(figure)
    layout = figure.get_layout_engine()
    assert layout is not None
    layout.execute(figure)
    titles, labels = [0], [0]
    before = [(axes.get_title(loc="left"), axes.get_xlabel()) for axes in grid]
    for axes in grid:
        width = axes.get_window_extent().width / figure.dpi
        # About eleven characters of a title, and thirteen of a label, fit on an inch.
        title = [
            part
            for line in axes.get_title(loc="left").split("\n")
            for part in textwrap.wrap(line, max(12, int(11 * width)))
        ]
        label = textwrap.wrap(axes.get_xlabel(), max(12, int(13 * width)), **_WHOLE_WORDS)
        axes.set_title("\n".join(title))
        axes.set_xlabel("\n".join(label))
        titles.append(len(title) - 1)
        labels.append(len(label) - 1)
    if before == [(axes.get_title(loc="left"), axes.get_xlabel()) for axes in grid]:
        # The figure would be laid out once more when it is drawn.
        figure.set_layout_engine("none")
        return
    rows = -(-len(grid) // _columns(len(grid)))
    figure.set_figheight(figure.get_figheight() + 0.17 * rows * (max(titles) + max(labels)))


def published_colours(panels: Sequence[Panel]) -> tuple[dict[str, str], list[str]]:
    """Return the colours of published methods by key, and the names of those drawn in grey."""
    runs = len({name for panel in panels for name in panel.lines})
    keys = list(dict.fromkeys(c.key for panel in panels for c in panel.published))
    free = max(0, _MOST_COLOURS - runs)
    names = [published.METHODS[key].name for key in keys[free:]]
    return dict(zip(keys[:free], _PUBLISHED_COLOURS, strict=False)), names


def _title(figure: "Figure", title: str) -> None:
    text = _wrap_title(figure, title)
    figure.set_figheight(figure.get_figheight() + 0.2 * text.count("\n"))
    figure.suptitle(text, fontsize=11.5, fontweight="bold", x=0.02, ha="left")


def _wrap_title(figure: "Figure", title: str) -> str:
    # About ten characters of this size fit on an inch.
    return textwrap.fill(title, int(10 * figure.get_figwidth()))


def _note(figure: "Figure", note: str) -> None:
    """Write a text below a figure, and make the figure higher for it."""
    # About fifteen characters of this size fit on an inch.
    width = int(15 * figure.get_figwidth())
    lines = [part for line in note.strip().split("\n") for part in textwrap.wrap(line, width)]
    if lines:
        figure.set_figheight(figure.get_figheight() + 0.15 * len(lines))
        look: Any = {"fontsize": 8.5, "color": _FAINT, "x": 0.02, "ha": "left"}
        figure.supxlabel("\n".join(lines), **look)


def small(panel: Panel, style: Mapping[str, Style]) -> "Figure":
    """Draw one panel at half the width of a report, which has one legend for all of them."""
    with house_style():
        from matplotlib.figure import Figure

        # Fixed margins: to lay a figure out takes as long as to draw it.
        figure = Figure(figsize=(4.8, 2.9))
        axes = figure.add_axes((0.165, 0.16, 0.805, 0.74))
        _draw(axes, panel, style)
        if axes.get_yscale() == "linear":
            # Longer numbers would push the label out of the figure.
            axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    return figure


def bars(panels: Sequence[Bars], *, title: str, note: str = "") -> "Figure":
    """Draw horizontal bars with intervals; panels with the same names share their labels."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.values))
    groups = {name: group for panel in panels for name, group in (panel.groups or {}).items()}
    looks = styles([groups.get(name, name) for name in names])
    style = {name: looks[groups.get(name, name)] for name in names}
    shared = all(len(panel.values) == len(names) for panel in panels)
    height = 1.5 + 0.36 * max((len(panel.values) for panel in panels), default=1)
    with house_style():
        figure, grid = canvas(len(panels), (7.2, height), height)
        for i, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
            _draw_bars(axes, panel, style)
            if shared and i % _columns(len(panels)):
                axes.tick_params(labelleft=False)
        _title(figure, title)
        _note(figure, note)
        _finish(figure, grid)
    return figure


def mixed(panels: Sequence[Panel | Bars], *, title: str) -> "Figure":
    """Draw panels of curves and of bars with the same names next to each other."""
    style = styles([name for panel in panels for name in _names(panel)])
    most = max(len(p.values) for p in panels if isinstance(p, Bars))
    height = max(3.6, 1.6 + 0.34 * most)
    with house_style():
        figure, grid = canvas(len(panels), (7.2, height), height)
        for axes, panel in zip(grid, panels, strict=True):
            _draw_panel(axes, panel, style, {})
        _title(figure, title)
        _finish(figure, grid)
    return figure


def encode(figure: "Figure", kind: str = "png", dpi: int = 160) -> bytes:
    """Return a figure as a file of a kind, "png" or "pdf"; equal figures give equal bytes."""
    matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    canvas = FigureCanvasAgg(figure)
    if kind == "png":
        figure.set_dpi(dpi)
        # Not `savefig`, which draws a figure once more to lay it out.
        canvas.print_png(buffer, metadata={"Software": None}, pil_kwargs={"compress_level": 3})
    else:
        figure.savefig(buffer, format=kind, dpi=dpi, metadata={"CreationDate": None})
    return buffer.getvalue()


def png(figure: "Figure", dpi: int = 160) -> bytes:
    """Return a figure as a PNG file, see `encode`."""
    return encode(figure, "png", dpi)


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
    count: int, alone: tuple[float, float], height: float = 3.0
) -> tuple["Figure", list["Axes"]]:
    """Return a figure with `count` axes; call it inside `house_style`.

    Args:
      alone: size in inches if `count` is 1.
      height: of each of several axes, in inches.
    """
    columns = _columns(count)
    rows = -(-count // columns)
    figure = blank(*(alone if count == 1 else (WIDTH, height * rows)))
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _draw_panel(
    axes: "Axes", panel: Panel | Bars, style: Mapping[str, Style], coloured: Mapping[str, str]
) -> None:
    """Draw bars, or curves with published ones behind them."""
    if isinstance(panel, Bars):
        _draw_bars(axes, panel, style)
        return
    _draw_published(axes, panel.published, coloured)
    _draw(axes, panel, style)
    _label_published(axes, panel.published, coloured)


def _draw(axes: "Axes", panel: Panel, style: Mapping[str, Style]) -> None:
    values, bands = _draw_lines(axes, panel, style)
    values += [c.mean for c in panel.published]
    data = np.concatenate(values)
    data = data[data > 0] if panel.scale == "log" else data
    if data.size:
        axes.set_yscale(panel.scale)
        _limit(axes, panel, data, np.concatenate(bands))
    else:
        axes.text(0.5, 0.5, "no values yet", transform=axes.transAxes, ha="center", color=_FAINT)
    if panel.mark is not None:
        axes.axvline(panel.mark, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(panel.title)
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
            band = (panel.bands or {}).get(name)
            mean, low, high = band or statistics.interval(values, bounds=panel.bounds)
            axes.plot(steps, mean, **look)
            drawn.append(values[np.isfinite(values)])
            if dotted:
                continue
            if band is not None or len(values) >= panel.min_seeds:
                axes.fill_between(steps, low, high, color=look["color"], alpha=shade, linewidth=0)
                bounds += [low[np.isfinite(low)], high[np.isfinite(high)]]
            elif len(values) > 1:
                _draw_single(axes, steps, values, style[name])
    for name, parts in (panel.single or {}).items():
        for steps, values in parts:
            _draw_single(axes, steps, values, style[name])
            drawn.append(values[np.isfinite(values)])
    return drawn, bounds


def _draw_single(axes: "Axes", steps: np.ndarray, values: np.ndarray, style: Style) -> None:
    """Draw each of some seeds as a thin line."""
    look: dict[str, Any] = {**style, "linewidth": 0.8, "alpha": 0.5, "label": "_"}
    if len(steps) == 1:
        look |= {"marker": ".", "markersize": 4}
    axes.plot(steps, values.T, **look)


def _draw_published(axes: "Axes", curves: Sequence[Published], coloured: Mapping[str, str]) -> None:
    """Draw means over seeds, in grey without a colour."""
    marks = dict(zip(coloured, _MARKS, strict=False))
    for c in sorted(curves, key=lambda c: c.key in coloured):
        look: dict[str, Any] = {"color": _GREY, "linewidth": 1, "zorder": 0, "marker": "."}
        if c.key in coloured:
            look = {"color": coloured[c.key], "linewidth": 1.2, "linestyle": ":", "zorder": 1}
            look |= {"marker": marks[c.key], "markersize": 3.5}
        axes.plot(c.frames, c.mean, label=f"_{c.key}", **look)


def _label_published(
    axes: "Axes", curves: Sequence[Published], coloured: Mapping[str, str]
) -> None:
    """Write the names of published methods next to the ends of their curves."""
    shown = [c for c in curves if c.key in coloured]
    if not shown:
        return
    right = max(float(line.get_xdata()[-1]) for line in axes.get_lines())  # type: ignore[index,arg-type]
    axes.set_xlim(right=1.24 * right)
    low, high = axes.get_ylim()
    figure: Any = axes.figure
    rows = axes.get_subplotspec().get_gridspec().nrows  # type: ignore[union-attr]
    # The height of a line of text, as a share of the axes, which have two thirds of their place.
    line = 0.13 / (0.66 * figure.get_figheight() / rows) * (high - low)
    ends = sorted(shown, key=lambda c: float(c.mean[-1]))
    places = np.array([float(c.mean[-1]) for c in ends])
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + line)
    places = np.minimum(places, high - line * np.arange(len(places))[::-1])
    for c, y in zip(ends, places, strict=True):
        place = (float(c.frames[-1]), float(c.mean[-1]))
        axes.annotate(
            published.METHODS[c.key].name,
            place,
            (1.03 * right, y),
            color=coloured[c.key],
            fontsize=8.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": coloured[c.key], "linewidth": 0.5},
        )


def _limit(axes: "Axes", panel: Panel, data: np.ndarray, bands: np.ndarray) -> None:
    low, high = float(data.min()), float(data.max())
    if panel.scale == "linear" and bands.size:
        # The t interval of few seeds is huge, and must not flatten the curves.
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
    ends = [0.0, *(x for v in panel.values.values() for x in v if np.isfinite(x))]
    reach = (max(ends) - min(ends)) or 1.0
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
        digits = ",.0f" if abs(point) >= 10 else ".2f" if abs(point) >= 0.1 else ".3g"
        text = f"{point:{digits}}"
        axes.text(end + 0.03 * reach, place, text, va="center", fontsize=9)
    if panel.reference is not None:
        axes.axvline(panel.reference, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(
        range(len(names)),
        [textwrap.fill(name, panel.label_width, **_WHOLE_WORDS) for name in names],
    )
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(right=max(*ends, panel.most or 0.0) + 0.2 * reach)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.xlabel)


def _thousands(step: float, _: float | None = None) -> str:
    return f"{step / 1000:g}k" if abs(step) >= 1000 else f"{step:g}"
