"""Sphinx: `sphinx-build -W docs build/docs` makes the site, from these pages and the docstrings."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

project = "dynajax"
author = "The dynajax authors"
release = version = importlib.metadata.version("dynajax")
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
highlight_language = "none"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# What the docstrings say of a tuple's fields stands beside the fields in the source.
napoleon_use_ivar = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "dynajax"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_math_renderer = "mathml"


def _formula(display: bool) -> Any:
    def visit(translator: Any, node: nodes.Element) -> None:
        formula = convert(node.astext(), display="block" if display else "inline")
        translator.body.append(f"<div>{formula}</div>" if display else formula)
        raise nodes.SkipNode

    return visit, None


def _tidied(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Bars in a docstring's formulas are no references, and a tuple's field says nothing itself."""
    alias = lines[:1] and lines[0].startswith("Alias for field number")
    lines[:] = [] if alias else [line.replace("|", r"\|") for line in lines]


def setup(app: Sphinx) -> None:
    """Formulas become MathML, which browsers draw themselves: a page needs no network."""
    app.connect("autodoc-process-docstring", _tidied)
    app.add_html_math_renderer("mathml", _formula(False), _formula(True))
