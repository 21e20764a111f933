"""The memory of environments is counted before a run starts."""

import mmap

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from dynajax import envs
from dynajax.engines.evaluate import Evaluator
from dynajax.envs.vector import VectorEnv
from dynajax.runtime import sharding
from dynajax.settings import make
from dynajax.train import train
from dynajax.types import UsageError
from dynajax.xla import backend
from sizes import SHORT_RUN

SETTINGS = SHORT_RUN | {"agent.hidden": (8, 8), "eval.every": 70}


class Large(gymnasium.Env):
    """A task whose instances need 4 MiB each."""

    action_space = spaces.Box(-1.0, 1.0, (1,))
    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    made = 0

    def __init__(self):
        Large.made += 1
        # Not of the heap, where memory that was freed before could be used again.
        self.data = mmap.mmap(-1, 1 << 22, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.data.write(bytes(1 << 22))


@pytest.fixture
def large(monkeypatch):
    gymnasium.register("Large-v0", Large, max_episode_steps=20)
    monkeypatch.setattr(Large, "made", 0)
    yield Large
    del gymnasium.registry["Large-v0"]


def test_environments_without_memory_are_refused_before_they_are_made(large, monkeypatch):
    used = backend.resident_memory()
    monkeypatch.setattr(backend, "host_memory", lambda: int((used + (100 << 20)) / backend.FILLED))
    spec = envs.spec("Large-v0")
    few, many = (make("Large-v0", settings={"eval.episodes": n}) for n in (4, 100))
    Evaluator(few, spec, [0]).close()
    large.made = 0
    with pytest.raises(
        UsageError, match=r"^--env=Large-v0: 100 copies .*--set eval.episodes.*--episodes of"
    ):
        Evaluator(many, spec, [0])
    assert large.made < 10


def test_memory_of_environments_is_measured_and_counted(large, monkeypatch):
    vector_env = VectorEnv("Large-v0", 20)
    assert 70 << 20 < vector_env.memory < 160 << 20
    vector_env.close()
    in_processes = VectorEnv("Pendulum-v1", 2, workers=2)
    assert in_processes.memory > 40 << 20
    in_processes.close()
    placement = sharding.place(2, backend.local_devices()[:1])
    monkeypatch.setattr(backend, "host_memory", lambda: 10 << 30)
    assert placement.check_memory(8 << 30, 1 << 29) == 8 << 30
    with pytest.raises(
        UsageError, match=r"8.0 GiB and their environments 2.0, but .* eval.episodes"
    ):
        placement.check_memory(8 << 30, 2 << 30)


def test_run_with_too_many_evaluation_environments_is_refused(large, monkeypatch, tmp_path):
    made = make(
        "Large-v0",
        preset="paper",
        algo="model-free",
        agent="sac",
        settings=SETTINGS | {"eval.episodes": 8},
        steps=70,
    )
    monkeypatch.setattr(backend, "host_memory", lambda: 24 << 20)
    with pytest.raises(UsageError, match=r"and their environments 0\.0, but it has 0\.0"):
        train(made, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "eval.csv").exists()
