"""Every command that a page shows, by its own words, with sizes appended that keep it short."""

import dataclasses
import glob
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

import dynajax
import scripts
from conftest import SMALL, SMALL_OF_ANY
from dynajax import cli
from dynajax.diagnose import fits
from dynajax.envs import mjx
from dynajax.launch import study
from dynajax.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "launch/README.md",
    *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md"))),
)
#: The page of what a user writes.
OWN = "docs/own.md"
#: Commands that are not run here, by a part of them, with the reason.
EXCEPTIONS = {
    "-m venv": "it installs; continuous integration begins with it",
    "--engine=mjx --seeds=16": "MJX compiles for a minute; test_device.py trains on that engine",
    "--on=ray": "it needs a cluster; test_sweep.py starts one on this machine",
    "--on=slurm": "it needs a cluster; test_sweep.py has submitit's own executor for it",
    "levers.toml": "a study of hours; the test below reads it",
    "tiny.toml": "a whole study; test_sweep.py runs one, and --status",
    "ray start": "it starts a cluster; test_sweep.py starts one on this machine",
    "experiments/bench.py": "it measures for minutes; test_bench.py runs it with small sizes",
    "pip install": "it installs",
    "tpu-vm.sh": "it needs a TPU",
    "measure.sh": "it needs half an hour of a GPU",
    "sphinx-build": "continuous integration makes the site",
    "taxonomy.py": "it reads seventeen diagnoses, which are not made here",
}
#: Of the agent sac, for another has other networks.
OF_SAC = {name: value for name, value in SMALL.items() if name.startswith("agent.")}
SIZES = SMALL_OF_ANY | {
    "random_steps": 60,
    "eval.every": 35,
    "eval.episodes": 1,
    "model.fit_every": 60,
    "rollout.batch": 40,
    "replay.synthetic": 400,
}
#: Of the agents with residual networks.
WIDE = {"agent.actor_width": 8, "agent.critic_width": 8}
TASK = """
import gymnasium, numpy as np

class MyEnv(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(1, 2, 2).astype(np.float32)
        return self.state, {}
    def step(self, action):
        self.state = np.clip(self.state + 0.1 * action, -9, 9).astype(np.float32)
        return self.state, 1.0, bool(self.state[0] < 0.2), False, {}
"""


def blocks(page, language):
    """The code blocks of a page in a language."""
    text = (ROOT / page).read_text()
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


def commands():
    """(page, command) for every line of a shell block that starts a program."""
    lines = [
        (page, line)
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [
        (page, line.split("  #")[0].strip())
        for page, line in lines
        if line.strip() and not line.startswith("#")
    ]


def runs():
    lines = [line for _, line in commands() if not any(part in line for part in EXCEPTIONS)]
    return list(dict.fromkeys(lines))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder where all of them run, with a task of one's own in it."""
    folder = tmp_path_factory.mktemp("desk")
    (own,) = [block for block in blocks(OWN, "python") if "# my_module.py" in block]
    (folder / "my_module.py").write_text(TASK + own)
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
    monkeypatch.setattr(fits, "ROUNDS", 1)
    small = {"width": 8, "depth": 2, "batch": 8, "fit_steps": 2}
    monkeypatch.setattr(fits, "MODEL", dataclasses.replace(fits.MODEL, **small))


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


@pytest.mark.parametrize("line", [line for line in runs() if "run.py" in line])
def test_a_run_that_a_page_shows(line, at_desk, monkeypatch, capsys):
    words = shlex.split(line)
    words = words[words.index("python") + 2 :]
    flag = {name: value for name, _, value in (word.partition("=") for word in words)}
    agent = flag.get("--agent") or PRESETS[flag.get("--preset", "quick")].agent
    sizes = SIZES | (OF_SAC if agent == "sac" else WIDE)
    # What the command itself says of a size is kept.
    said = {name.partition("=")[0] for name in words} | {word.partition("=")[2] for word in words}
    for name in [name for name in sizes if name in said]:
        del sizes[name]
    if "random_steps" in said:
        del sizes["replay.real"]
    if any(word.startswith("rollout.horizon") for word in words):
        sizes |= {"replay.synthetic": 4000}
    more = [f"--set={name}={str(value).strip('()')}" for name, value in sizes.items()]
    with scripts.loaded(ROOT / "experiments" / "run.py") as script:
        if any(word.startswith("--process") for word in words):
            # It waits for other machines: up to there.
            made = []
            monkeypatch.setattr(script, "train", lambda *a, **k: made.append(a) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                script_run(script, monkeypatch, *words, *more, "--steps=70")
            assert made[0][0].env == "humanoid-walk"
            return
        status = scripts.run(script, monkeypatch, *words, *more, "--seeds=1", "--steps=70")
    printed, err = capsys.readouterr()
    assert status == 0, err
    assert "report: runs/" in printed


def script_run(script, monkeypatch, *words):
    """A script's `main`, whose errors pass through."""
    monkeypatch.setattr(cli, "start", lambda process=None: None)
    flags.FLAGS.unparse_flags()
    flags.FLAGS([script.__file__, *words])
    return script.main([])


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
        agent = jax.tree.map(lambda x: x[0], own.state.rows.agent)
        np.testing.assert_allclose(policy.unit(obs), policy.agent.greedy(agent, obs), atol=1e-6)
        assert np.abs(policy(obs)).max() <= policy.high == 2
        assert model(obs, policy(obs)).next_obs.mean.shape == (2, 3)
        config = dynajax.make_config(
            "Cart",
            engine="mjx",
            agent="linear",
            algo="sac",
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
