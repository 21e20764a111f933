"""How figures and the report's page look: one style, and one colour for each variant.

Colours are Okabe and Ito's (2008), which people with any colour vision can tell apart. Only
matplotlib's object interface is used, so nothing here needs a display or touches global state.
"""

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dynajax.report import statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLACK, BLUE, SKY, GREEN = "#333333", "#0072B2", "#56B4E9", "#009E73"
VERMILLION, PURPLE, ORANGE = "#D55E00", "#CC79A7", "#E69F00"
_HOME = {"SAC": BLACK, "none": VERMILLION, "scale,target": BLUE, "scale": SKY, "target": PURPLE}
_GUESTS = (GREEN, ORANGE)
_DASHES = ("-", "--", "-.")
_INK, _FAINT = "#333333", "#8a8a8a"
STEPS = "environment steps"
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
    floor: float | None = None  # what lies lower is cut off
    include: float | None = None  # a value that the axis must reach
    mark: float | None = None  # a step to mark with a vertical line
    xlabel: str = STEPS


class Bars(NamedTuple):
    """One set of axes with a horizontal bar for each name."""

    title: str
    xlabel: str
    values: Mapping[str, statistics.Interval]
    reference: float | None = None  # a value to mark with a vertical line


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A colour and a dash for each name, the same in every figure that shows it.

    The paper's variants have colours of their own; others take what is left, then dashes. A name
    may carry its algorithm ("MBPO scale" is "scale"), as labels of comparisons do.
    """
    found: dict[str, Style] = {}
    free = [
        {"color": colour, "linestyle": dash}
        for dash in _DASHES
        for colour in (_GUESTS if dash == "-" else (*_HOME.values(), *_GUESTS))
    ]
    guests = 0
    for name in dict.fromkeys(names):
        bare = "none" if name == "MBPO" else name.removeprefix("MBPO ")
        if bare in _HOME:
            found[name] = {"color": _HOME[bare], "linestyle": "-"}
        else:
            found[name] = free[guests % len(free)]
            guests += 1
    return found


def curves(panels: Sequence[Panel], *, title: str = "") -> "Figure":
    """Panels of curves in at most three columns: mean over seeds, 95 % t interval shaded."""
    names = dict.fromkeys(name for panel in panels for name in panel.lines)
    style = styles(list(names))
    with house_style():
        figure, grid = canvas(len(panels), (7.2, 4.3), (4.6, 3.4))
        for axes, panel in zip(grid, panels, strict=True):
            _draw(axes, panel, style)
        handles = {str(h.get_label()): h for axes in grid for h in axes.get_lines()}
        handles = {n: h for n, h in handles.items() if not n.startswith("_")}
        if handles:
            # About twelve characters fit on an inch; rows are filled evenly.
            fit = max(1, int(12 * figure.get_figwidth() / (max(map(len, handles)) + 8)))
            rows = -(-len(handles) // fit)
            columns = -(-len(handles) // rows)
            figure.set_figheight(figure.get_figheight() + 0.21 * (rows - 1))
            place: Any = {"loc": "outside lower center", "ncols": columns, "handlelength": 2.2}
            figure.legend(list(handles.values()), list(handles), **place)
        if title:
            figure.suptitle(title, fontsize=11.5, fontweight="bold", x=0.02, ha="left")
    return figure


def small(panel: Panel, style: Mapping[str, Style]) -> "Figure":
    """One panel at half a page's width, without a legend: the page has one for all."""
    with house_style():
        figure, (axes,) = canvas(1, (4.8, 2.9), (4.8, 2.9))
        _draw(axes, panel, style)
    return figure


def bars(panels: Sequence[Bars], *, title: str, note: str = "") -> "Figure":
    """Horizontal bars with intervals; panels with the same names share their labels."""
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
        figure.suptitle(title, fontsize=11.5, fontweight="bold", x=0.02, ha="left")
        if note:
            figure.supxlabel(note, fontsize=8.5, color=_FAINT, x=0.02, ha="left")
    return figure


def png(figure: "Figure", dpi: int = 160) -> bytes:
    """The figure as a PNG file's bytes; the same figure always gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def house_style() -> AbstractContextManager[None]:
    """Inside it, whatever matplotlib draws looks like the other figures."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _columns(count: int) -> int:
    return 2 if count == 4 else min(count, 3)


def canvas(
    count: int, alone: tuple[float, float], each: tuple[float, float]
) -> tuple["Figure", list["Axes"]]:
    """A figure with `count` axes, made inside `house_style`.

    Sizes in inches, for one that stands alone and for each of several.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = _columns(count)
    rows = -(-count // columns)
    width, height = (alone[0], alone[1]) if count == 1 else (each[0] * columns, each[1] * rows)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width, height), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _draw(axes: "Axes", panel: Panel, style: Mapping[str, Style]) -> None:
    shown, bands = [np.empty(0)], [np.empty(0)]
    shade = 0.15 if len(panel.lines) < 6 else 0.07
    for series, dotted in ((panel.lines, False), (panel.dotted or {}, True)):
        for name, (steps, values) in series.items():
            look: dict[str, Any] = {**style[name], "label": "_" if dotted else name}
            if dotted:
                look |= {"linestyle": ":", "linewidth": 1.5}
            elif len(steps) < 4:
                look |= {"marker": "o", "markersize": 4}
            mean, low, high = statistics.interval(values)
            axes.plot(steps, mean, **look)
            if not dotted:
                axes.fill_between(steps, low, high, color=look["color"], alpha=shade, linewidth=0)
            shown.append(values[np.isfinite(values)])
            bands += [low[np.isfinite(low)], high[np.isfinite(high)]]
    data = np.concatenate(shown)
    data = data[data > 0] if panel.scale == "log" else data
    if data.size:
        axes.set_yscale(panel.scale)
        _limit(axes, panel, data, np.concatenate(bands))
    else:
        axes.text(0.5, 0.5, "no values yet", transform=axes.transAxes, ha="center", color=_FAINT)
    if panel.mark is not None:
        axes.axvline(panel.mark, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(textwrap.fill(panel.title, 44))
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_thousands)


def _limit(axes: "Axes", panel: Panel, data: np.ndarray, bands: np.ndarray) -> None:
    low, high = float(data.min()), float(data.max())
    if panel.scale == "linear" and bands.size:
        # The t interval of two seeds is huge: show intervals, but not at the curves' expense.
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
    axes.set_xlim(right=1.2 * reach)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(textwrap.fill(panel.title, 44))
    axes.set_xlabel(panel.xlabel)


def _thousands(step: float, _: float | None = None) -> str:
    return f"{step / 1000:g}k" if abs(step) >= 1000 else f"{step:g}"


_CSS = """
:root { color-scheme: light }
body { margin: 0 auto; padding: 1.2rem 1.2rem 4rem; max-width: 1000px; background: #fff;
  color: #222; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .6rem 0 }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; padding-top: 1rem; border-top: 1px solid #ddd }
h3 { font-size: 1rem; margin: 0 0 .3rem }
ul { padding-left: 1.2rem; margin: .4rem 0 1rem } li { margin: .2rem 0 }
.lead { font-size: 1.1rem; margin: .4rem 0 }
figure { margin: 0 } img { max-width: 100%; height: auto; display: block; margin: 0 auto }
figcaption { color: #555; font-size: .88rem; line-height: 1.45; margin: .2rem 0 0 }
.grid { display: grid; gap: 2rem 2.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)) }
.legend { color: #555; font-size: .88rem; margin: 0 0 1.2rem }
.legend span { margin-right: 1.1rem; white-space: nowrap }
.legend svg, td svg { vertical-align: middle; margin-right: .4rem }
.scroll { overflow-x: auto; margin: 1rem 0 } td:first-child { white-space: nowrap }
table { border-collapse: collapse; font-size: .92rem }
th, td { text-align: left; padding: .3rem 1.3rem .3rem 0; border-bottom: 1px solid #eee }
th { color: #666; font-weight: 600 } td { font-variant-numeric: tabular-nums }
.bar { height: .7rem; min-width: 1px; background: #0072B2; border-radius: 2px }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .7rem;
  font-size: .85rem }
"""


def page(
    *,
    title: str,
    sentences: Sequence[str],
    table: Sequence[Mapping[str, str]],
    curves: bytes,
    style: Mapping[str, Style],
    stories: Mapping[str, Sequence[tuple[Panel, str]]],
    appendix: str,
) -> str:
    """The report as one HTML text that refers to nothing outside itself.

    Args:
      sentences: the headline in HTML; the first leads, the others become a list.
      table: a line for each variant, under "variant" its name; curves: the main figure, PNG.
      style: of each name, see `styles`.
      stories: heading -> panels with their captions; a panel without values is left out.
      appendix: HTML that comes last.
    """
    parts = [f'<p class="lead">{sentences[0]}</p>']
    if sentences[1:]:
        parts.append(f"<ul>{''.join(f'<li>{sentence}</li>' for sentence in sentences[1:])}</ul>")
    parts.append(
        picture(
            "",
            curves,
            "Evaluation with the deterministic policy: mean over seeds, with the 95 % t "
            "interval over seeds shaded. Higher is better.",
        )
    )
    if table:
        cells = [list(map(escape, row.values())) for row in table]
        for cell, row in zip(cells, table, strict=True):
            cell[0] = swatch(style.get(row["variant"])) + cell[0]
        parts.append(html_table(list(table[0]), cells))
    for heading, panels in stories.items():
        body = story(panels, style) or "<p>Nothing has been logged yet.</p>"
        parts.append(f"<h2>{escape(heading)}</h2>{body}")
    return document(title, "".join(parts) + appendix)


def story(panels: Sequence[tuple[Panel, str]], style: Mapping[str, Style]) -> str:
    """Small pictures with their captions under one legend, as HTML; "" if none has values."""
    pictures = [
        picture(panel.title, png(small(panel._replace(title=""), style)), caption)
        for panel, caption in panels
        if panel.lines
    ]
    if not pictures:
        return ""
    legend = "".join(f"<span>{swatch(style[n])}{escape(n)}</span>" for n in style)
    return (
        f'<p class="legend">{legend} shaded: 95 % t interval over seeds</p>'
        f'<div class="grid">{"".join(pictures)}</div>'
    )


def document(title: str, body: str) -> str:
    """A whole HTML text that refers to nothing outside itself; `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def picture(heading: str, data: bytes, caption: str) -> str:
    """A PNG with a heading and a caption, as HTML."""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    top = f"<h3>{escape(heading)}</h3>" if heading else ""
    image = f'<img alt="{escape(heading or "Learning curves")}" src="{source}">'
    return f"<figure>{top}{image}<figcaption>{escape(caption)}</figcaption></figure>"


def swatch(style: Style | None) -> str:
    """A short piece of a curve, as HTML."""
    if style is None:
        return ""
    dash = {"-": "", "--": "6 3", "-.": "6 2 2 2"}[style["linestyle"]]
    return (
        '<svg width="22" height="6"><line x1="0" y1="3" x2="22" y2="3" stroke-width="3" '
        f'stroke="{style["color"]}" stroke-dasharray="{dash}"/></svg>'
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table from the header's texts and the rows' HTML."""
    top = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'
