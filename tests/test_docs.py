"""Documentation: what it must explain, and whether what it names exists."""

import ast
import csv
import io
import json
import re
import shlex
from pathlib import Path

import pytest

import dynajax
import scripts
from conftest import SMALL
from dynajax.algorithms import ALGORITHMS
from dynajax.config import GROUPS
from dynajax.config.presets import PRESETS
from dynajax.diagnose import online_report
from dynajax.models.targets import FIXES
from dynajax.report import charts, published
from dynajax.settings import all_settings, base
from dynajax.synthetic import SOURCES
from dynajax.trust import TRUST
from dynajax.types import UsageError

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "BUILD_NOTES.md", ROOT / "launch/README.md", *DOCS]
README = (ROOT / "README.md").read_text()
OTHER_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "results/README.md"]


def code_spans(page: str) -> set[str]:
    """Return the text of all code spans of a page."""
    return set(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / page).read_text()))


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """Return the directory of a run that logs every kind of metric."""
    settings = SMALL | {"rollout.horizon": 2, "replay.synthetic": 64, "eval.episodes": 2}
    config = dynajax.make_config(
        "Pendulum-v1", preset="paper", trust="m2ac", settings=settings, steps=70
    )
    return dynajax.train(config, tmp_path_factory.mktemp("run"), quiet=True).folder


def test_every_metric_and_file_of_a_run_is_explained(run_directory):
    explained = code_spans("reading-a-run.md")
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").open()]
    kinds = {line["kind"]: set(line) for line in lines}
    assert set(kinds) == {"fit", "learn", "time"}
    names = set.union(*kinds.values())
    assert {"accepted_fraction_2", "penalty", "r2_state_dims", "start_value"} <= names
    assert names | {"weight"} <= explained, sorted(names - explained)
    [time] = [line for line in lines if line["kind"] == "time" and line["step"] == 70]
    assert set(time["seconds"]) <= explained
    header = next(csv.reader((run_directory / "eval.csv").open()))
    assert set(header) <= explained, set(header) - explained
    assert {name for rule in TRUST.values() for name in rule.metrics} <= explained
    files = {path.name for path in run_directory.iterdir()} - {"lock"}
    assert files <= {name.rstrip("/") for name in explained}, files - explained


def test_every_metric_in_a_report_is_explained():
    explained = code_spans("reading-a-run.md")
    drawn = [*charts.MODEL, *charts.SYNTHETIC, *charts.CRITIC]
    diagnosed = [*charts.DIAGNOSED, *online_report.CRITIC, *online_report.MODEL]
    for chart in drawn:
        assert {chart.metric, chart.dotted or chart.metric} <= explained
    for name in (n for c in diagnosed for n in (c.metric, c.dotted) if n):
        place, _, rest = name.partition("_")
        assert name in explained or {f"{place}_…", rest} <= explained, name


def test_every_registered_name_is_on_its_page():
    assert set(FIXES) <= code_spans("method.md")
    for registry, page in ((TRUST, "trust.md"), (dynajax.AGENTS, "agents.md")):
        # Other tests register names of their own.
        shipped = {n for n, cls in registry.items() if cls.__module__.startswith("dynajax.")}
        assert shipped <= code_spans(page)
    assert set(PRESETS) | set(published.METHODS) <= code_spans("commands.md")
    shipped = {n for n, cls in SOURCES.items() if cls.__module__.startswith("dynajax.")}
    assert shipped <= code_spans("method.md")
    groups = {name.partition(".")[0] for name in code_spans("commands.md") if ".…" in name}
    assert groups == set(GROUPS)


def test_settings_that_the_pages_name_exist():
    known = {
        path
        for agent in dynajax.AGENTS
        for trust in TRUST
        for path in all_settings(base(agent, trust))
    }
    # Settings of a reader's own class.
    known |= {"agent.FIELD", "trust.FIELD", "source.FIELD"}
    for page in PAGES:
        for name in re.findall(rf"`((?:{'|'.join(GROUPS)})\.\w+)", page.read_text()):
            assert name in known or name.endswith((".py", ".csv", ".toml")), f"{page.name}: {name}"


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"(?ms)^```.*?^```", "", page.read_text())


def test_link_targets_exist():
    for page in [*PAGES, *OTHER_PAGES]:
        for target in re.findall(r"\]\(([^)#\s]+)", prose(page)):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_the_pages_name_exist():
    for page in PAGES:
        for name in re.findall(
            r"`((?:experiments|launch|results|src|tests)/[\w./-]+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def training_commands() -> list[str]:
    """Return every documented command that trains, except with a module of the reader's own."""
    blocks = [b for page in PAGES for b in re.findall(r"(?ms)^ *```sh\n(.*?)```", page.read_text())]
    lines = [line for b in blocks for line in b.replace("\\\n", " ").splitlines()]
    trains = re.compile(r"dynajax train|experiments/run\.py")
    own = re.compile(r"own_\w+:|\$|--process|--config|\.\.\.|#")
    return sorted({line.strip() for line in lines if trains.search(line) and not own.search(line)})


@pytest.mark.parametrize("command", training_commands())
def test_documented_training_commands_are_accepted(command):
    words = shlex.split(re.sub(r"--(set|vary) ", r"--\1=", command))
    flags = [word[2:].partition("=") for word in words if word.startswith("--")]
    arguments = {name: value for name, _, value in flags if name not in ("fix", "set", "vary")}
    for name in ("out", "video", "wandb", "fields"):
        arguments.pop(name, None)
    for name in {"seed", "seeds", "steps"} & set(arguments):
        arguments[name] = int(arguments[name])
    values = {kind: [v for n, _, v in flags if n == kind] for kind in ("fix", "set", "vary")}
    dynajax.make_config(
        **arguments,
        fixes=values["fix"],
        settings=dict(item.split("=", 1) for item in values["set"]),
        vary={k: v.split(",") for k, v in (item.split("=", 1) for item in values["vary"])},
    )


def test_table_of_algorithms_agrees_with_their_settings():
    text = (ROOT / "docs/algorithms.md").read_text()
    rows = re.findall(r"(?m)^\| `([\w-]+)`.*$", text)
    assert rows == list(ALGORITHMS)
    for line in re.findall(r"(?m)^\| `[\w-]+`.*$", text):
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        name, source, share, mixing, horizon, trust, reward = cells
        name = name.partition("`")[0]
        config = dynajax.make_config("cheetah-run", algo=name)
        assert source == config.rollout.source
        if config.separate:
            assert share == "half of the updates"
        else:
            expected = config.rollout.real_fraction if config.has_rollouts else 1.0
            assert float(share) == expected
        if config.has_rollouts:
            assert mixing == config.rollout.mixing
            assert (int(horizon),) == config.rollout.horizon
        else:
            assert mixing == horizon == ""
        if config.has_model:
            assert trust == config.trust_name
            assert (reward == "joint") == (config.model.reward_from == "inputs")
        assert f"## {name}\n" in text


def test_api_page_has_every_public_name():
    text = (ROOT / "docs/api.md").read_text()
    missing = [n for n in dynajax.__all__ if not re.search(rf"(::|`)\s*{n}\b", text)]
    assert not missing


def test_pages_are_wrapped_and_the_index_of_decisions_is_short():
    for page in [*PAGES, *OTHER_PAGES]:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            assert len(line) <= 120, f"{page.name}:{number}"
    assert len((ROOT / "BUILD_NOTES.md").read_text().splitlines()) <= 200


def test_how_to_pages_include_the_examples_and_their_commands():
    for path in sorted((ROOT / "examples").glob("*.py")):
        page = (ROOT / "docs" / f"{path.stem.replace('_', '-')}.md").read_text()
        assert f"```{{literalinclude}} ../examples/{path.name}\n" in page
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        commands = re.findall(r"(?m)^    (dynajax .*)$", docstring)
        assert commands == re.findall(r"(?m)^(dynajax train .*)$", page), path.name


def test_table_of_the_ablation_and_index_agree_with_the_returns():
    with scripts.loaded(ROOT / "results/scripts/ablation.py") as ablation:
        assert ablation.BEGIN + ablation.table() + ablation.END in ablation.PAGE.read_text()
        index = io.StringIO()
        csv.writer(index, lineterminator="\n").writerows(ablation.index())
    assert (ROOT / "results/levers/index.csv").read_text() == index.getvalue()
    folders = {path.parent.name for path in (ROOT / "results/levers").glob("*/eval.csv")}
    assert {line.partition(",")[0] for line in index.getvalue().splitlines()[1:]} == folders


def test_table_of_the_ablation_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    with scripts.loaded(ROOT / "results/scripts/ablation.py") as ablation:
        page, index = tmp_path / "ablation.md", tmp_path / "index.csv"
        monkeypatch.setattr(ablation, "PAGE", page)
        monkeypatch.setattr(ablation, "LEVERS", tmp_path)
        monkeypatch.setattr(ablation, "table", lambda: "new\n")
        monkeypatch.setattr(ablation, "index", lambda: [["folder"]])
        for text in (f"a\n{ablation.BEGIN}old\n", f"a\nold\n{ablation.END}"):
            page.write_text(text)
            with pytest.raises(
                UsageError, match=r"ablation.md: the line <!-- .* is missing; write"
            ):
                ablation.main([])
            assert page.read_text() == text and not index.exists()
        page.write_text(text := f"a\n{ablation.BEGIN}old\n{ablation.END}b\n")
        with monkeypatch.context() as patch:
            patch.setattr(ablation, "index", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ablation.main([])
        assert page.read_text() == text and not index.exists()
        assert ablation.main([]) == 0
        assert page.read_text() == text.replace("old", "new") and index.read_text() == "folder\n"


def test_commands_of_installation_name_the_clone():
    """Check that nothing installs dynajax from PyPI, where it is not published."""
    shown = [*PAGES, *OTHER_PAGES, *ROOT.glob("src/**/*.py"), *ROOT.glob("launch/*.*")]
    for path in shown:
        assert not re.search(r"pip install [^`\n]*['\"\s]dynajax\b(?! @)", path.read_text()), path


def test_vendored_formulas_are_small_and_licensed():
    folder = ROOT / "docs/static/katex"
    assert "MIT" in (folder / "LICENSE").read_text()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2**20
    fonts = re.findall(r"url\((fonts/[\w-]+\.\w+)\)", (folder / "katex.min.css").read_text())
    assert fonts and all((folder / name).exists() for name in fonts)


def test_animations_are_small():
    files = [ROOT / f"docs/pictures/{name}" for name in re.findall(r"[\w-]+\.webp", README)]
    assert len(files) == 3 and sum(path.stat().st_size for path in files) < 2_000_000


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.stem)
def test_page_opens_with_its_purpose(page):
    """Check the first paragraph after the title."""
    title, first, *_ = page.read_text().split("\n\n")
    assert title.startswith("# ")
    if page.name != "index.md":
        assert first.startswith("This page "), first
