"""The pages: what they must explain, and that what they name is there."""

import csv
import json
import re
from pathlib import Path

import pytest

import dynajax
from conftest import SMALL
from dynajax.config import GROUPS
from dynajax.config.presets import PRESETS
from dynajax.diagnose import online_report
from dynajax.models.targets import FIXES
from dynajax.report import charts, published
from dynajax.settings import all_settings, base
from dynajax.trust import TRUST

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "launch/README.md", *DOCS]


def named(page: str) -> set[str]:
    """The names that a page has in code."""
    return set(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / page).read_text()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with everything in it that a run logs."""
    settings = SMALL | {"rollout.horizon": 2, "replay.synthetic": 64, "eval.episodes": 2}
    config = dynajax.make_config(
        "Pendulum-v1", preset="paper", trust="m2ac", settings=settings, steps=70
    )
    return dynajax.train(config, tmp_path_factory.mktemp("run"), quiet=True).folder


def test_every_column_of_the_journal_is_explained(folder):
    explained = named("reading-a-run.md")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    kinds = {line["kind"]: set(line) for line in lines}
    assert set(kinds) == {"fit", "learn", "time"}
    names = set.union(*kinds.values())
    assert {"accepted_fraction_2", "penalty", "r2_state_dims", "start_value"} <= names
    assert names | {"weight"} <= explained, sorted(names - explained)
    [time] = [line for line in lines if line["kind"] == "time" and line["step"] == 70]
    assert set(time["seconds"]) <= explained
    header = next(csv.reader((folder / "eval.csv").open()))
    assert set(header) <= explained, set(header) - explained
    figures = {name for rule in TRUST.values() for name in rule.figures}
    assert figures <= explained
    files = {path.name for path in folder.iterdir()} - {"lock"}
    assert files <= {name.rstrip("/") for name in explained}, files - explained


def test_every_metric_that_a_page_draws_is_explained():
    explained = named("reading-a-run.md")
    drawn = [*charts.MODEL, *charts.SYNTHETIC, *charts.CRITIC]
    diagnosed = [*charts.DIAGNOSED, *online_report.CRITIC, *online_report.MODEL]
    for chart in drawn:
        assert {chart.metric, chart.dotted or chart.metric} <= explained
    for name in (n for c in diagnosed for n in (c.metric, c.dotted) if n):
        place, _, rest = name.partition("_")
        assert name in explained or {f"{place}_…", rest} <= explained, name


def test_every_choice_is_on_its_page():
    assert set(FIXES) <= named("method.md")
    for registry, page in ((TRUST, "trust.md"), (dynajax.AGENTS, "agents.md")):
        # Other tests register their own.
        shipped = {n for n, cls in registry.items() if cls.__module__.startswith("dynajax.")}
        assert shipped <= named(page)
    assert set(PRESETS) | set(published.METHODS) <= named("commands.md")
    groups = {name.partition(".")[0] for name in named("commands.md") if ".…" in name}
    assert groups == set(GROUPS)


def test_fields_that_the_pages_name_are_fields():
    known = {
        path
        for agent in dynajax.AGENTS
        for trust in TRUST
        for path in all_settings(base(agent, trust))
    }
    # In a class of a reader's own.
    known |= {"agent.FIELD", "trust.FIELD"}
    for page in PAGES:
        for name in re.findall(rf"`((?:{'|'.join(GROUPS)})\.\w+)", page.read_text()):
            assert name in known or name.endswith((".py", ".csv")), f"{page.name}: {name}"


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```", "", page.read_text())


def test_what_the_pages_link_to_is_there():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "results/README.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", prose(page)):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_scripts_and_files_that_the_pages_name_are_there():
    for page in PAGES:
        for name in re.findall(
            r"`((?:experiments|launch|results|src|tests)/[\w./-]+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
