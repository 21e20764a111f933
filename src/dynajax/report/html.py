"""Render reports from the Jinja2 templates of this package, as HTML files without external parts."""

import base64
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from dynajax.report.figures import Panel, Style, lines_meaning, png, small


class Image(NamedTuple):
    """A figure with its heading and caption, both plain text."""

    heading: str  # "" for none
    source: str  # a data URI
    caption: str
    wide: bool = False  # as wide as the report


class Video(NamedTuple):
    """A video with its heading."""

    heading: str
    source: str  # a data URI


class Grid(NamedTuple):
    """Small figures that share one legend."""

    legend: Mapping[str, Style]
    images: Sequence[Image]


class Table(NamedTuple):
    """A table of plain text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def image(heading: str, data: bytes, caption: str, *, wide: bool = False) -> Image:
    """Return an image that contains the PNG `data`."""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return Image(heading, source, caption, wide)


def video(heading: str, data: bytes) -> Video:
    """Return a video that contains the MP4 `data`."""
    return Video(heading, f"data:video/mp4;base64,{base64.b64encode(data).decode()}")


def figure_grid(panels: Sequence[tuple[Panel, str]], style: Mapping[str, Style]) -> Grid:
    """Draw panels as small figures with their captions; panels without lines are left out."""
    images = [
        image(panel.title, png(small(panel._replace(title=""), style)), caption)
        for panel, caption in panels
        if panel.lines
    ]
    return Grid(style, images)


def plain_text(sentence: str) -> str:
    """Return a sentence without its marks of bold text, for a terminal."""
    return sentence.replace("**", "")


def render(template: str, **context: Any) -> bytes:
    """Render a template with everything that it refers to; plain text in `context` is escaped."""
    return _environment().get_template(f"{template}.html.jinja").render(context).encode()


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dynajax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["emphasis"] = _emphasis
    environment.globals["lines"] = lines_meaning()
    return environment


def _emphasis(sentence: str) -> Markup:
    """Escape a sentence, and mark what stands between ** as bold and between ` as code."""
    bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(sentence)))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", bold))
