"""Configuration of Sphinx: `sphinx-build -W docs build/docs` builds the site."""

import html
import importlib.metadata
import operator
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from dynajax import settings
from dynajax.agents import AGENTS
from dynajax.config.presets import PRESETS
from dynajax.synthetic import SOURCES
from dynajax.trust import TRUST

project = "dynajax"
author = "The dynajax authors"
release = version = importlib.metadata.version("dynajax")
copyright = author

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# `docs/execute_notebooks.py` has stored the notebooks with their outputs.
nb_execution_mode = "off"
highlight_language = "none"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# Fields of a tuple are documented by comments in the source.
napoleon_use_ivar = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "dynajax"
html_static_path = ["static"]
# KaTeX is part of the site, so that formulas need no network; `static/katex/LICENSE` is its license.
html_css_files = ["katex/katex.min.css", "site.css"]
html_js_files = ["katex/katex.min.js", "katex/auto-render.min.js", "formulas.js"]
html_show_sourcelink = False
html_math_renderer = "katex"


#: Groups of settings that do not depend on the agent, trust rule or source.
SETTING_GROUPS = {
    "": "The run",
    "learn": "All agents",
    "model": "The model",
    "rollout": "Synthetic data",
    "replay": "Replay buffers",
    "eval": "Evaluation",
    "host": "The host engine",
    "task": "The task",
}


def _table(title: str, group: str, config: Any) -> list[str]:
    """Return a section with the settings of one group as a Markdown table, or nothing."""
    rows = []
    for path, setting in settings.all_settings(config).items():
        if path.rpartition(".")[0] == group:
            value = operator.attrgetter(path)(config)
            vary = "yes" if setting.traced else ""
            shown = settings.format_value(value) or "none"
            rows.append(f"| `{path}` | {shown} | {setting.about} | {setting.values} | {vary} |")
    head = ["| field | default | meaning | values | vary |", "|---|---|---|---|---|"]
    return ["", f"## {title}", "", *head, *rows] if rows else []


def _preset_tables() -> list[str]:
    """Return a section with every value in which presets differ, one column for each preset."""
    lines = ["", "## The presets", ""]
    for agent in (None, *dict.fromkeys(name for p in PRESETS.values() for name in p.agents)):
        if agent is None:
            paths = ["steps", *dict.fromkeys(path for p in PRESETS.values() for path in p.settings)]
        else:
            fields = (name for p in PRESETS.values() for name in p.agents.get(agent, {}))
            paths = [f"agent.{name}" for name in dict.fromkeys(fields)]
            lines += ["", f"With `--agent={agent}`:", ""]
        configs = [settings.make("cheetah-run", preset=name, agent=agent) for name in PRESETS]
        lines += ["| field | " + " | ".join(f"`{name}`" for name in PRESETS) + " |"]
        lines += ["|---" * (1 + len(PRESETS)) + "|"]
        if agent is None:
            lines.append("| `--agent` | " + " | ".join(p.agent for p in PRESETS.values()) + " |")
        for path in dict.fromkeys(paths):
            found = (operator.attrgetter(path)(config) for config in configs)
            values = (settings.format_value(value) or "none" for value in found)
            lines.append(f"| `{path}` | " + " | ".join(values) + " |")
    return lines


def _add_settings(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the tables of the presets and of all settings to the page `settings`."""
    if docname != "settings":
        return
    lines = _preset_tables()
    for group, title in SETTING_GROUPS.items():
        lines += _table(title, group, settings.base())
    for name in AGENTS:
        lines += _table(f"The agent `{name}`", "agent", settings.base(agent=name))
    for name in TRUST:
        lines += _table(f"The trust rule `{name}`", "trust", settings.base(trust=name))
    for name in SOURCES:
        lines += _table(f"The source `{name}`", "source", settings.base(source=name))
    source[0] += "\n".join(lines) + "\n"


def _formula(tag: str, left: str, right: str) -> Any:
    """Return the visitor that writes a formula's source in the delimiters that KaTeX looks for."""

    def visit(translator: Any, node: nodes.Element) -> None:
        formula = html.escape(node.astext())
        translator.body.append(f'<{tag} class="math">{left}{formula}{right}</{tag}>')
        raise nodes.SkipNode

    return visit, None


def _clean_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Escape bars, which are no references in formulas, and drop the aliases of tuple fields."""
    alias = lines[:1] and lines[0].startswith("Alias for field number")
    lines[:] = [] if alias else [line.replace("|", r"\|") for line in lines]


def setup(app: Sphinx) -> None:
    """Connect the hooks, and let KaTeX draw the formulas."""
    app.connect("source-read", _add_settings)
    app.connect("autodoc-process-docstring", _clean_docstring)
    inline, display = _formula("span", r"\(", r"\)"), _formula("div", r"\[", r"\]")
    app.add_html_math_renderer("katex", inline, display)
