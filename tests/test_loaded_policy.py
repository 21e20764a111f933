"""Loaded policies and models in a user's own process: shapes, copies, pickles, settings of JAX."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium import spaces

import dynajax
from dynajax import envs
from dynajax.policy import export, standalone
from dynajax.types import ObsPart, UsageError
from dynajax.xla import backend
from sizes import NETWORKS
from test_export import random_policy
from test_policy import train

TASK = "NestedTask-v0"
HIGH = 0.1  # as float32 it is larger


class NestedTask(gymnasium.Env):
    """A task with nested observations, and actions that are single numbers."""

    observation_space = spaces.Dict(
        {
            "velocity": spaces.Box(-9, 9, (2, 2)),
            "gear": spaces.Discrete(3, start=1),
            "arms": spaces.Tuple([spaces.Box(-9, 9, ()), spaces.MultiDiscrete([2, 3])]),
        }
    )
    action_space = spaces.Box(-HIGH, HIGH, (), np.float64)

    def _obs(self):
        return self.observation_space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return self._obs(), float(action), False, False, {}


class MatrixTask(NestedTask):
    """A task whose observations and actions are matrices."""

    observation_space = spaces.Box(-9, 9, (2, 3))
    action_space = spaces.Box(-HIGH, HIGH, (2, 1))

    def step(self, action):
        assert self.action_space.contains(action), action
        return self._obs(), 0.0, False, False, {}


gymnasium.register(TASK, NestedTask, max_episode_steps=20)
gymnasium.register("MatrixTask-v0", MatrixTask, max_episode_steps=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested")
    train(folder, "sac", steps=60, env=TASK, fixes=["scale"])
    return folder


def rollout(policy, steps=4):
    """Return the actions of the documented loop, and the flat observations."""
    env, flat = gymnasium.make(TASK).unwrapped, []
    obs, _ = env.reset(seed=1)
    actions = []
    for _ in range(steps):
        actions.append(policy(obs))
        flat.append(spaces.flatten(env.observation_space, obs).astype(np.float32))
        obs, *_ = env.step(actions[-1])
    return actions, np.array(flat)


def test_policy_takes_what_the_task_returns(run, tmp_path):
    policy = dynajax.load_policy(run)
    export.export(policy, tmp_path / "policy.npz")
    for function in (policy, standalone.load_policy(tmp_path / "policy.npz")):
        actions, flat = rollout(function)
        assert all(a.shape == () and a.dtype == np.float32 for a in actions)
        assert function(flat).shape == (4,)
        np.testing.assert_allclose(function(flat), actions, atol=1e-6)
        np.testing.assert_allclose(function(flat.astype(float).tolist()), actions, atol=1e-6)
    assert np.ptp(actions) > 0


def test_batches_of_nested_observations(run):
    env = gymnasium.make_vec(TASK, 3)
    obs, _ = env.reset(seed=4)
    policy, model = dynajax.load_policy(run), dynajax.load_model(run)
    actions = policy(obs)
    assert actions.shape == (3,)
    env.step(actions)
    prediction = model(obs, actions)
    assert prediction.next_obs.mean.shape == (3, 13) and prediction.reward.mean.shape == (3,)
    first = jax.tree.map(lambda x: x[0], obs)
    np.testing.assert_allclose(policy(first), actions[0], rtol=1e-5)
    one = model(first, actions[0])
    np.testing.assert_allclose(one.next_obs.mean, prediction.next_obs.mean[0], rtol=1e-4)
    flat = policy._flatten(obs)
    again = model(flat.tolist(), actions[:, None].tolist())
    np.testing.assert_array_equal(again.reward.mean, prediction.reward.mean)


@pytest.mark.parametrize(
    ("obs", "found"),
    [
        ({"velocity": np.zeros((2, 2))}, r"dict \(KeyError: 'arms'\)"),
        (np.zeros(5), r"\(5,\)"),
        ("fast", "could not convert"),
        (
            {"velocity": np.zeros(4), "gear": 1, "arms": (0.0, [0, 0])},
            r"velocity has the shape \(4,\)",
        ),
        (
            {"velocity": np.zeros((2, 2)), "gear": 0, "arms": (0.0, [0, 0])},
            "0 is not between 1 and 3",
        ),
    ],
)
def test_other_observations_are_refused_in_one_line(run, obs, found):
    with pytest.raises(UsageError, match=found) as caught:
        dynajax.load_policy(run)(obs)
    assert "as the task returns them" in str(caught.value) and "\n" not in str(caught.value)


def test_run_of_a_version_that_stored_no_shapes(run, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(run, old)
    (path,) = old.glob("policies/*/meta.json")
    meta = json.loads(path.read_text())
    for name in ("action_shape", "obs_parts"):
        del meta["content"]["task"][name]
    meta["crc32"] = zlib.crc32(json.dumps(meta["content"]).encode())
    path.write_text(json.dumps(meta))
    policy, obs = dynajax.load_policy(old), np.zeros(13)
    assert policy(obs) == dynajax.load_policy(run)(obs)[None]
    with pytest.raises(UsageError, match=r"in the order of spec\.obs_names, but got dict$"):
        policy({"velocity": np.zeros((2, 2))})


def test_parts_of_tasks(run):
    spec = envs.spec(TASK)
    assert [part.keys for part in spec.obs_parts] == [
        ("arms", 0),
        ("arms", 1),
        ("gear",),
        ("velocity",),
    ]
    assert spec.obs_parts[2] == ObsPart(("gear",), (), ((3, 1),)) and spec.action_shape == ()
    assert dynajax.load_policy(run).spec == spec._replace(termination=None)
    matrix = envs.spec("MatrixTask-v0", repeat=2)
    assert matrix.action_shape == (2, 1) and matrix.obs_parts == (ObsPart((), (2, 3)),)
    cheetah = envs.spec("cheetah-run")
    assert cheetah.obs_parts == (ObsPart(("position",), (8,)), ObsPart(("velocity",), (9,)))


def test_one_part_of_any_shape():
    def flat(space, obs):
        return standalone.flatten(obs, envs.checks.obs_parts(space))

    for space in (
        spaces.Box(-1, 1, (2, 3)),
        spaces.Box(-1, 1, (1, 5)),
        spaces.Box(-1, 1, ()),
        spaces.Discrete(4, start=-1),
        spaces.MultiDiscrete([[2, 3], [4, 2]]),
        spaces.MultiBinary(3),
        spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (2,))]),
    ):
        space.seed(0)
        samples = [space.sample() for _ in range(5)]
        want = np.array([spaces.flatten(space, obs) for obs in samples], np.float32)
        np.testing.assert_array_equal([flat(space, obs) for obs in samples], want)
        np.testing.assert_array_equal(flat(space, want), want)
        batch = jax.tree.map(lambda *x: np.stack(x), *samples)
        np.testing.assert_array_equal(flat(space, batch), want)


def test_observations_and_actions_that_are_matrices(tmp_path):
    policy = dynajax.load_policy(train_matrix(tmp_path))
    env = gymnasium.make("MatrixTask-v0").unwrapped
    obs, _ = env.reset(seed=0)
    env.step(policy(obs))
    assert policy(np.stack([obs] * 5)).shape == (5, 2, 1)
    np.testing.assert_array_equal(policy(obs.ravel()), policy(obs))


def train_matrix(folder):
    train(folder, "sac", steps=30, env="MatrixTask-v0", algo="model-free")
    return folder


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_after_the_first_call(run, copied):
    policy, model = dynajax.load_policy(run), dynajax.load_model(run)
    obs = np.zeros(13)
    action, prediction = policy(obs), model(obs, policy(obs))
    again, other = copied(policy), copied(model)
    np.testing.assert_array_equal(again(obs), action)
    np.testing.assert_array_equal(other(obs, action).next_obs.mean, prediction.next_obs.mean)
    assert (again.spec, again.step, other.config) == (policy.spec, policy.step, model.config)


@pytest.mark.parametrize("agent", list(NETWORKS))
def test_policy_of_every_agent_can_be_pickled(agent):
    policy, obs = random_policy(agent), np.ones((2, 5))
    action = policy(obs)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(policy))(obs), action)


def test_one_short_line_is_printed(run):
    for loaded in (dynajax.load_policy(run), dynajax.load_model(run)):
        assert "\n" not in repr(loaded) and len(repr(loaded)) < 200
        assert TASK in repr(loaded) and "seed 0" in repr(loaded)


OTHER_SETTINGS = """
import sys
import numpy as np
import dynajax
import jax
policy, model = dynajax.load_policy(sys.argv[1]), dynajax.load_model(sys.argv[1])
obs = np.linspace(-1, 1, 13)
action = policy(obs)
prediction = model(obs, action)
assert all(type(x) is np.ndarray and x.dtype == np.float32 for x in jax.tree.leaves(prediction))
policy.layers()
np.savez(sys.argv[2], action, prediction.next_obs.mean)
assert jax.config.jax_enable_x64
"""


def test_process_with_other_settings_of_jax(run, tmp_path):
    settings = {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_TRANSFER_GUARD": "disallow_explicit",
        "JAX_DISABLE_JIT": "1",
    }
    command = [sys.executable, "-c", OTHER_SETTINGS, str(run), str(tmp_path / "out.npz")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    action, mean = np.load(tmp_path / "out.npz").values()
    obs = np.linspace(-1, 1, 13)
    np.testing.assert_allclose(action, dynajax.load_policy(run)(obs), rtol=1e-5)
    want = dynajax.load_model(run)(obs, action).next_obs.mean
    np.testing.assert_allclose(mean, want, rtol=1e-4, atol=1e-6)


def test_settings_are_restored():
    with jax.enable_x64(True), jax.default_prng_impl("rbg"):
        with backend.required_settings():
            backend.check_settings()
        assert jax.numpy.zeros(1).dtype == np.float64
        with pytest.raises(UsageError, match="JAX_ENABLE_X64"):
            backend.check_settings()
