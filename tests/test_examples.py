"""The files in examples/: each command of their docstrings trains, from an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dynajax
import scripts
from conftest import SMALL_OF_ANY
from dynajax.envs import mjx

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMANDS = [
    (path.stem, command)
    for path in EXAMPLES
    for command in re.findall(r"(?m)^    (dynajax .*)$", path.read_text())
]
SMALL = SMALL_OF_ANY | {"eval.every": 30, "eval.episodes": 1, "host.time_limit": 30}
SIMBA = {"agent.actor_width": 8, "agent.critic_width": 8, "agent.critic_blocks": 1}


def small(settings) -> list[str]:
    return [f"--set={path}={value}" for path, value in settings.items()]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """Return an empty folder, the current one, with the examples on the path."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    mjx.TASKS.pop("CartOnDevice", None)
    for path in EXAMPLES:
        sys.modules.pop(path.stem, None)


def test_examples_have_commands_and_are_short():
    assert {stem for stem, _ in COMMANDS} == {path.stem for path in EXAMPLES}
    assert len(EXAMPLES) == 7
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 70


@pytest.mark.parametrize(("stem", "command"), COMMANDS)
def test_command_of_an_example_trains(stem, command, empty, monkeypatch, capsys):
    _, train, *words = shlex.split(command)
    assert train == "train"
    settings = SMALL if "--agent" in command else SMALL | SIMBA
    words += [*small(settings), "--steps=60", "--out=run"]
    with scripts.loaded(ROOT / "experiments" / "run.py") as script:
        assert scripts.run(script, monkeypatch, *words) == 0, capsys.readouterr().err
    config = json.loads((empty / "run" / "config.json").read_text())["config"]
    assert f"{stem}:" in json.dumps(config)
    assert (empty / "run" / "report.html").exists()
    assert all(len(returns) for returns in dynajax.read_run(empty / "run").evals.values())


def test_examples_together_in_fresh_interpreters(tmp_path):
    """Train, resume, and load policy and model, each in a new interpreter."""
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "examples")))

    def python(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = [
        *("-m", "dynajax", "train", "--env=own_task:Cart-v0", "--preset=paper", "--out=run"),
        *("--agent=own_agent:Linear", "--trust=own_trust_rule:Agreement"),
        *("--fix=none", "--fix=scale,own_fix:slope"),
        "--set=model.network=own_model:Linear",
        "--set=rollout.source=own_source:EachStep",
        *small(SMALL),
    ]
    python(*command, "--steps=60")
    assert "step 90/90" in python(*command, "--steps=90")
    printed = python(
        "-c",
        "import dynajax, numpy as np\n"
        "policy, model = dynajax.load_policy('run', 1), dynajax.load_model('run', 1)\n"
        "obs = np.zeros((4, 2))\n"
        "print(policy.variant, policy(obs).shape, model(obs, policy(obs)).next_obs.mean.shape)\n",
    )
    assert printed == "scale,own_fix:slope (4, 1) (4, 2)\n"
