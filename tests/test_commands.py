"""Every other command that a page shows, its studies and its Python."""

import dataclasses
import functools
import glob
import shlex
import shutil

import jax
import numpy as np
import pytest

import dynajax
import scripts
from dynajax.diagnose import fits, offline
from dynajax.envs import mjx
from dynajax.launch import study
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
def desk(tmp_path_factory):
    """A folder where all of them run, with a task of one's own in it."""
    folder = tmp_path_factory.mktemp("desk")
    write_own_task(folder)
    diagnosed = "results/diagnosis/humanoid-stand"
    shutil.copytree(ROOT / diagnosed, folder / diagnosed)
    # What plot and diagnose are shown.
    config = dynajax.make_config("cheetah-run", preset="paper", settings=SIZES | OF_SAC, steps=70)
    dynajax.train(config, folder / "runs" / "cheetah-run-mbpo-sac", quiet=True)
    return folder


@pytest.fixture
def at_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.syspath_prepend(desk)
    small = dataclasses.replace(fits.MODEL, width=8, depth=2, batch=8, fit_steps=2)
    measured = functools.partial(offline.measure, config=small, rounds=1)
    monkeypatch.setattr(offline, "measure", measured)


def test_the_pages_show_commands():
    assert len(runs()) > 14
    for part in EXCEPTIONS:
        shown = any(part in line for _, line in commands())
        assert shown or any(part in (ROOT / page).read_text() for page in PAGES), part


@pytest.mark.parametrize(
    "path", sorted((ROOT / "launch/studies").glob("*.toml")), ids=lambda p: p.stem
)
def test_a_study_that_is_shipped_can_be_run(path):
    """Every run's configuration is checked, and none has another's name."""
    assert study.load(path).runs


@pytest.mark.parametrize("line", [line for line in runs() if "run.py" not in line])
def test_another_command_that_a_page_shows(line, at_desk, monkeypatch, capsys):
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


def test_what_a_user_writes_of_an_agent_a_rule_and_a_task(monkeypatch, tmp_path):
    """The blocks of the page, run as they stand."""
    for registry in (dynajax.AGENTS, dynajax.TRUST, dynajax.FIXES):
        for name in list(registry):
            monkeypatch.setitem(registry, name, registry[name])
    names: dict = {"dynajax": dynajax}
    for block in blocks(OWN, "python"):
        if any(word in block for word in ("AGENTS[", "TRUST[", "FIXES[", "register_mjx_task(")):
            exec(block, names)
    try:
        settings = SIZES | {"eval.every": 80}
        config = dynajax.make_config(
            "Pendulum-v1",
            agent="linear",
            trust="agreed",
            fixes=["slope"],
            preset="paper",
            settings=settings,
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
            agent="linear",
            algo="model-free",
            preset="paper",
            settings=settings,
            steps=80,
        )
        assert dynajax.train(config, tmp_path / "cart", quiet=True).finished
    finally:
        del dynajax.AGENTS["linear"], dynajax.TRUST["agreed"], dynajax.FIXES["slope"]
        del mjx.TASKS["Cart"]


@pytest.mark.parametrize("page", ["README.md", "docs/commands.md"])
def test_the_python_that_a_page_shows(page, at_desk, monkeypatch, capsys):
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
