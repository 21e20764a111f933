"""The commands in the documentation that do not train, its studies and its Python code."""

import dataclasses
import functools
import glob
import shlex
import shutil
import types

import pytest

import dynajax
import scripts
from dynajax.diagnose import fits, offline
from dynajax.launch import study
from pages import (
    EXCEPTIONS,
    OF_SAC,
    PAGES,
    ROOT,
    SIZES,
    WIDE,
    blocks,
    commands,
    runs,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return a folder in which the commands run, with a run."""
    folder = tmp_path_factory.mktemp("workspace")
    diagnosed = "results/diagnosis/humanoid-stand"
    shutil.copytree(ROOT / diagnosed, folder / diagnosed)
    # The run that plot, diagnose and play read.
    config = dynajax.make_config("cheetah-run", preset="paper", settings=SIZES | OF_SAC, steps=70)
    dynajax.train(config, folder / "runs" / "mine", quiet=True)
    shutil.copytree(folder / "runs" / "mine", folder / "runs" / "cheetah-run-mbpo-sac")
    return folder


@pytest.fixture
def in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.syspath_prepend(ROOT / "results" / "scripts")
    monkeypatch.syspath_prepend(workspace)
    small = dataclasses.replace(fits.MODEL, width=8, depth=2, batch=8, fit_steps=2)
    measured = functools.partial(offline.measure, config=small, rounds=1)
    monkeypatch.setattr(offline, "measure", measured)


def test_documentation_contains_commands():
    assert len(runs()) > 14
    for part in EXCEPTIONS:
        shown = any(part in line for _, line in commands())
        assert shown or any(part in (ROOT / page).read_text() for page in PAGES), part


@pytest.mark.parametrize(
    "path", sorted((ROOT / "launch/studies").glob("*.toml")), ids=lambda p: p.stem
)
def test_shipped_study_has_valid_runs(path):
    """Check every run's configuration, and that no two have the same name."""
    assert study.load(path).runs


@pytest.mark.parametrize("line", [line for line in runs() if "run.py" not in line])
def test_documented_command_runs(line, in_workspace, monkeypatch, capsys):
    words = shlex.split(line.replace("...", "*"))
    path, words = words[1], words[2:]
    expanded = []
    for word in words:
        flag, equals, pattern = word.rpartition("=") if word.startswith("--") else ("", "", word)
        matches = sorted(glob.glob(pattern)) if "*" in pattern else []
        expanded += [flag + equals + m for m in (matches[:1] if flag else matches)] or [word]
    if "--env=" in line:
        expanded += ["--transitions=600", "--seeds=1"]
    with scripts.loaded(ROOT / path) as script:
        assert scripts.run(script, monkeypatch, *expanded) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", ["README.md", "docs/commands.md"])
def test_documented_python_runs(page, in_workspace, monkeypatch, capsys):
    (block,) = [b for b in blocks(page, "python") if "make_config(" in b]
    # In a new process the package has no attribute for a module that nothing has imported yet.
    for name, value in list(vars(dynajax).items()):
        if isinstance(value, types.ModuleType) and value.__name__.startswith("dynajax."):
            monkeypatch.delattr(dynajax, name)
    assert len([line for line in block.splitlines() if line]) <= 10
    make = dynajax.make_config

    def small(*arguments, **named):
        return make(*arguments, **named | {"steps": 70, "settings": SIZES | WIDE})

    monkeypatch.setattr(dynajax, "make_config", small)
    names: dict = {}
    exec(block, names)
    assert names["run"].evals["scale,target"].shape == (2, 2)
    assert (names["result"].folder / "report.html").exists()
    capsys.readouterr()
