"""Starting a run in unusual environments, and the warnings that are printed at the start."""

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
import scripts
from conftest import CORES
from dynajax import envs
from dynajax.cli import common
from dynajax.runs import video
from dynajax.runtime.program import build
from dynajax.train import configuration_warnings
from dynajax.types import UsageError
from dynajax.xla import backend
from sizes import SMALL, as_flags

RUN = Path(__file__).parents[1] / "experiments" / "run.py"
#: A task whose module creates a JAX array when it is imported.
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


def test_run_without_home_opengl_or_unicode(tmp_path):
    """Run with a notebook's backend, in an ASCII terminal, with a user's module that uses JAX."""
    (tmp_path / "slopes.py").write_text(textwrap.dedent(MODULE))
    bare = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "DISPLAY")}
    given = {
        "XDG_CACHE_HOME": str(tmp_path / "caches"),
        "MUJOCO_GL": "osmesa",
        "MPLBACKEND": "module://matplotlib_inline.no_such_backend",
        "PYTHONIOENCODING": "ascii",
    }
    command = [sys.executable, str(RUN), "--env=slopes:Slope-v0", "--fix=scale", "--seeds=2"]
    command += ["--steps=70", "--preset=paper", "--out=~/mine", *as_flags(SIZES)]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env=bare | given | {"HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "return" in result.stdout and "?" in result.stdout  # replaces the plus-minus sign
    assert (tmp_path / "home" / "mine" / "report.html").exists()
    assert not (tmp_path / "~").exists()


def test_compilation_cache_without_home(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", staticmethod(no_home))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    old = jax.config.jax_compilation_cache_dir
    common.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir.startswith(os.path.realpath("/tmp"))
    jax.config.update("jax_compilation_cache_dir", old)


def test_start_keeps_devices_if_jax_is_in_use(monkeypatch):
    """Set up JAX again, as when a notebook's cell is run again."""
    devices = jax.devices()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(len(devices) + 1))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    backend.use_cores()
    assert jax.devices() == devices


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(UsageError, match=r"^JAX_ENABLE_X64=1: .*float32"):
        backend.local_devices()


def test_missing_device_is_named(monkeypatch):
    def missing():
        raise AssertionError

    monkeypatch.setattr(jax, "local_devices", missing)
    with pytest.raises(UsageError, match=r"no such device \(AssertionError\)"):
        backend.local_devices()


class NaNs(gymnasium.Env):
    """A task whose reward is always NaN."""

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


def test_run_with_only_nan_rewards_fails(nans, tmp_path, capsys):
    run = dynajax.make_config(
        nans, algo="model-free", preset="paper", steps=40, settings=SIZES | {"eval.every": 20}
    )
    with pytest.raises(UsageError, match=r"^--env=NaNs-v0: none of the transitions of 40 steps"):
        dynajax.train(run, tmp_path / "run")
    assert (
        "warning: every evaluation episode of none (seed 0) ended because"
        in capsys.readouterr().out
    )


def test_unknown_termination_is_reported_at_the_start(nans, tmp_path, capsys):
    run = dynajax.make_config(nans, preset="paper", steps=20, settings=SIZES | {"eval.every": 20})
    with pytest.raises(UsageError):
        dynajax.train(run, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "not known when episodes of NaNs-v0 terminate" in printed
    assert "register_termination('NaNs-v0', function)" in printed


def test_run_that_cannot_learn_is_reported_at_the_start(nans, tmp_path, capsys):
    settings = SIZES | {"eval.every": 20, "rollout.real_fraction": 1.0}
    run = dynajax.make_config(nans, preset="paper", steps=20, settings=settings)
    with pytest.raises(UsageError):
        dynajax.train(run, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "--steps=20: all steps are random" in printed
    assert "learns from no synthetic transition" in printed


@pytest.mark.parametrize(("task", "own"), [("Pendulum-v1", True), ("lqr-lqr_2_1", False)])
def test_time_limit_without_effect_is_reported(task, own):
    settings = {"host.time_limit": 50, "task.repeat": 2}
    run = dynajax.make_config(task, algo="model-free", settings=settings)
    messages = configuration_warnings(build(run, envs.spec(task, **run.stepping)))
    found = [m for m in messages if m.startswith("--set host.time_limit=50: it has no effect")]
    assert [m.endswith("100 agent steps") for m in found] == [True] * own


def test_video_that_cannot_be_recorded_is_refused_before_training(nans):
    run = dynajax.make_config(nans, algo="model-free", steps=20)
    with pytest.raises(UsageError, match="cannot render"):
        video.check(run)
    with pytest.raises(UsageError, match="only host environments can be rendered"):
        video.check(dynajax.make_config("brax:ant", algo="model-free", engine="mjx"))


def test_use_cores_makes_a_device_of_each_core():
    script = "import dynajax; dynajax.use_cores(); import jax; print(len(jax.devices()))"
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    )
    os.sched_setaffinity(process.pid, CORES)
    assert int(process.communicate(timeout=60)[0]) == len(CORES)


@pytest.mark.parametrize("script", ["diagnose", "bench"])
def test_missing_devices_are_reported_in_one_line(monkeypatch, capsys, script):
    def missing():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    with scripts.loaded(RUN.with_name(f"{script}.py")) as module:
        monkeypatch.setattr(jax, "local_devices", missing)
        assert scripts.run(module, monkeypatch, "--env=cheetah-run") == 2
    printed = "".join(capsys.readouterr())
    assert "JAX finds no such device" in printed and "Traceback" not in printed
