"""What the environment of clusters and notebooks leaves behind, and what can be known at the start."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest

import dynajax
from conftest import SMALL
from dynajax.cli import common
from dynajax.runs import video
from dynajax.types import UsageError
from dynajax.xla import backend

RUN = Path(__file__).parents[1] / "experiments" / "run.py"
#: A task whose module makes an array of JAX while it is imported.
MODULE = """
    import gymnasium, jax.numpy as jnp, numpy as np

    GRAVITY = jnp.float32(9.81)

    class Slope(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.state = self.np_random.normal(size=2).astype(np.float32)
            return self.state, {}
        def step(self, action):
            self.state = np.clip(0.9 * self.state + 0.1 * action, -9, 9).astype(np.float32)
            return self.state, -float(abs(self.state[0])), False, False, {}

    gymnasium.register("Slope-v0", Slope, max_episode_steps=20)
"""
SIZES = SMALL | {"random_steps": 60, "eval.every": 60, "eval.episodes": 1, "model.fit_every": 60}


def test_a_run_where_nothing_is_as_at_a_desk(tmp_path):
    """No home, no OpenGL, a notebook's backend, a terminal in ASCII, JAX used by a user's module."""
    (tmp_path / "slopes.py").write_text(textwrap.dedent(MODULE))
    bare = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "DISPLAY")}
    given = {
        "XDG_CACHE_HOME": str(tmp_path / "caches"),
        "MUJOCO_GL": "osmesa",
        "MPLBACKEND": "module://matplotlib_inline.no_such_backend",
        "PYTHONIOENCODING": "ascii",
    }
    sizes = [f"--set={name}={str(v).strip('()')}" for name, v in SIZES.items()]
    command = [sys.executable, str(RUN), "--env=slopes:Slope-v0", "--fix=scale", "--seeds=2"]
    command += ["--steps=70", "--preset=paper", "--out=~/mine", *sizes]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env=bare | given | {"HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "return" in result.stdout and "?" in result.stdout  # what stands for a plus-minus sign
    assert (tmp_path / "home" / "mine" / "report.html").exists()
    assert not (tmp_path / "~").exists()


def test_no_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", staticmethod(no_home))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    old = jax.config.jax_compilation_cache_dir
    common.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir.startswith(os.path.realpath("/tmp"))
    jax.config.update("jax_compilation_cache_dir", old)


def test_a_start_where_jax_is_in_use_already(monkeypatch):
    """As in a notebook, whose cells are run again: it has the devices that it had."""
    devices = jax.devices()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(len(devices) + 1))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    backend.use_cores()
    assert jax.devices() == devices


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(UsageError, match=r"^JAX_ENABLE_X64=1: .*float32"):
        backend.local_devices()


def test_a_device_that_is_not_there_is_named(monkeypatch):
    def missing():
        raise AssertionError

    monkeypatch.setattr(jax, "local_devices", missing)
    with pytest.raises(UsageError, match=r"no such device \(AssertionError\)"):
        backend.local_devices()


class NaNs(gymnasium.Env):
    """A task that never gives a number."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, **_):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), float("nan"), False, False, {}


@pytest.fixture
def nans():
    gymnasium.register("NaNs-v0", NaNs, max_episode_steps=20)
    yield "NaNs-v0"
    del gymnasium.registry["NaNs-v0"]


def test_a_run_without_a_number_says_so_and_fails(nans, tmp_path, capsys):
    run = dynajax.make_config(
        nans, algo="model-free", preset="paper", steps=40, settings=SIZES | {"eval.every": 20}
    )
    with pytest.raises(UsageError, match=r"^--env=NaNs-v0: none of the transitions of 40 steps"):
        dynajax.train(run, tmp_path / "run")
    assert "every episode of the evaluation ended" in capsys.readouterr().out


def test_a_task_that_may_terminate_is_told_at_the_start(nans, tmp_path, capsys):
    run = dynajax.make_config(nans, preset="paper", steps=20, settings=SIZES | {"eval.every": 20})
    with pytest.raises(UsageError):
        dynajax.train(run, tmp_path / "run")
    said = capsys.readouterr().out
    assert "not known when episodes of NaNs-v0 terminate" in said
    assert "register_termination('NaNs-v0', function)" in said


def test_a_run_that_learns_nothing_is_told_at_the_start(nans, tmp_path, capsys):
    settings = SIZES | {"eval.every": 20, "rollout.real_fraction": 1.0}
    run = dynajax.make_config(nans, preset="paper", steps=20, settings=settings)
    with pytest.raises(UsageError):
        dynajax.train(run, tmp_path / "run")
    said = capsys.readouterr().out
    assert "--steps=20: all steps are random" in said
    assert "learns from no synthetic transition" in said


def test_a_film_that_cannot_be_made_is_refused_before(nans):
    run = dynajax.make_config(nans, algo="model-free", steps=20)
    with pytest.raises(UsageError, match="draws no pictures"):
        video.check(run)
    with pytest.raises(UsageError, match="the pictures come from the host"):
        video.check(dynajax.make_config("brax:ant", algo="model-free", engine="mjx"))
