"""The pieces that the pages are made of: HTML that refers to nothing outside itself."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

from dynajax.report.figures import Panel, Style, png, small

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
.wide { margin: 1.4rem 0 } .wide img { width: 100%; max-width: 700px; margin: 0 }
figcaption { color: #555; font-size: .88rem; line-height: 1.45; margin: .2rem 0 0 }
.facts td:first-child { color: #666 } .facts td { white-space: normal; overflow-wrap: anywhere }
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


def story(panels: Sequence[tuple[Panel, str]], style: Mapping[str, Style]) -> str:
    """Small pictures with their captions under one legend, as HTML; "" if there is none."""
    pictures = [
        picture(panel.title, png(small(panel._replace(title=""), style)), caption)
        for panel, caption in panels
        if panel.lines
    ]
    if not pictures:
        return ""
    legend = "".join(f"<span>{swatch(look)}{escape(name)}</span>" for name, look in style.items())
    return (
        f'<p class="legend">{legend} shaded: 95 % t interval over seeds</p>'
        f'<div class="grid">{"".join(pictures)}</div>'
    )


def bullets(sentences: Sequence[str]) -> str:
    """A list from the HTML of its items; "" if there is none."""
    return f"<ul>{''.join(f'<li>{x}</li>' for x in sentences)}</ul>" if sentences else ""


def document(title: str, body: str) -> str:
    """A whole HTML text that refers to nothing outside itself; `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def picture(heading: str, data: bytes, caption: str, *, wide: bool = False) -> str:
    """A PNG with a heading and a caption, as HTML; `wide`: as large as its text can be read."""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    top = f"<h3>{escape(heading)}</h3>" if heading else ""
    image = f'<img alt="{escape(heading or "Learning curves")}" src="{source}">'
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>{top}{image}<figcaption>{escape(caption)}</figcaption></figure>"


def swatch(style: Style | None) -> str:
    """A short piece of a curve, as HTML."""
    if style is None:
        return ""
    dash = {"-": "", "--": "6 3", "-.": "6 2 2 2"}[style["linestyle"]]
    return (
        '<svg width="22" height="6"><line x1="0" y1="3" x2="22" y2="3" stroke-width="3" '
        f'stroke="{style["color"]}" stroke-dasharray="{dash}"/></svg>'
    )


def facts(rows: Mapping[str, str]) -> str:
    """Names and their values, both text, as a table that fits a phone."""
    lines = "".join(f"<tr><td>{escape(n)}</td><td>{escape(v)}</td></tr>" for n, v in rows.items())
    return f'<table class="facts">{lines}</table>'


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table from the header's texts and the rows' HTML."""
    top = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'
