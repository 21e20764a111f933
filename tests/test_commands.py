"""The commands in the documentation that do not train, its studies and its Python code."""

import dataclasses
import functools
import glob
import re
import shlex
import shutil
from collections.abc import Iterator

import jax
import numpy as np
import pytest

import dynajax
import scripts
from dynajax.diagnose import fits, offline
from dynajax.envs import mjx
from dynajax.launch import study
from dynajax.models import MODELS
from dynajax.synthetic import SOURCES
from pages import (
    EXCEPTIONS,
    OF_SAC,
    OWN,
    PAGES,
    ROOT,
    SIZES,
    WIDE,
    blocks,
    commands,
    runs,
    write_own_task,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return a folder in which the commands run, with a user's task and a run."""
    folder = tmp_path_factory.mktemp("workspace")
    write_own_task(folder)
    diagnosed = "results/diagnosis/humanoid-stand"
    shutil.copytree(ROOT / diagnosed, folder / diagnosed)
    # The run that plot and diagnose read.
    config = dynajax.make_config("cheetah-run", preset="paper", settings=SIZES | OF_SAC, steps=70)
    dynajax.train(config, folder / "runs" / "cheetah-run-mbpo-sac", quiet=True)
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


#: Registries that a block of the page may add to.
REGISTRIES = {
    "AGENTS": dynajax.AGENTS,
    "TRUST": dynajax.TRUST,
    "FIXES": dynajax.FIXES,
    "MODELS": MODELS,
    "SOURCES": SOURCES,
}


@pytest.fixture
def documented() -> Iterator[dict[str, str]]:
    """Run the page's blocks that register plug-ins; return the plug-ins' names by registry."""
    registries = [*REGISTRIES.values(), mjx.TASKS]
    before = [dict(registry) for registry in registries]
    names: dict = {"dynajax": dynajax}
    registered = {}
    for block in blocks(OWN, "python"):
        found = dict(re.findall(r'(?m)^(?:dynajax\.)?(\w+)\["(\w+)"\] = ', block))
        if found or "register_mjx_task(" in block:
            exec(block, names)
        registered |= found
    yield registered
    for registry, old in zip(registries, before, strict=True):
        registry.clear()
        registry.update(old)


def test_documented_plug_ins_and_task_work(documented, tmp_path):
    """Train with everything that the page's code registers."""
    assert {"AGENTS", "TRUST", "FIXES"} <= set(documented) <= set(REGISTRIES)
    settings = SIZES | {"eval.every": 80}
    fields = {"MODELS": "model.network", "SOURCES": "rollout.source"}
    plug_ins = {path: documented[name] for name, path in fields.items() if name in documented}
    config = dynajax.make_config(
        "Pendulum-v1",
        agent=documented["AGENTS"],
        trust=documented["TRUST"],
        fixes=[documented["FIXES"]],
        preset="paper",
        settings=settings | plug_ins,
        steps=80,
    )
    own = dynajax.train(config, tmp_path / "own", quiet=True)
    assert own.finished
    policy, model = dynajax.load_policy(own.folder), dynajax.load_model(own.folder)
    obs = np.array([[1.0, 0.0, -2.0], [0.0, 1.0, 3.0]])
    agent = jax.tree.map(lambda x: x[0], own.state.learners.agent)
    np.testing.assert_allclose(
        policy.normalized_action(obs), policy.agent.deterministic_action(agent, obs), atol=1e-6
    )
    assert np.abs(policy(obs)).max() <= policy.high == 2
    assert model(obs, policy(obs)).next_obs.mean.shape == (2, 3)
    config = dynajax.make_config(
        "Cart",
        engine="mjx",
        agent=documented["AGENTS"],
        algo="model-free",
        preset="paper",
        settings=settings,
        steps=80,
    )
    assert dynajax.train(config, tmp_path / "cart", quiet=True).finished


@pytest.mark.parametrize("page", ["README.md", "docs/commands.md"])
def test_documented_python_runs(page, in_workspace, monkeypatch, capsys):
    (block,) = [b for b in blocks(page, "python") if "make_config(" in b]
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
