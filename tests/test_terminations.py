"""Termination functions compared with `terminated` of the tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import envs
from dynajax.envs import terminations
from dynajax.types import UsageError

TASKS = ["InvertedPendulum", "Hopper", "Walker2d", "HalfCheetah", "Ant", "Humanoid"]
IDS = [f"{task}-{version}" for task in TASKS for version in ("v4", "v5")]
# Number of leading entries of qpos that the observation omits.
HIDDEN = {"Hopper": 1, "Walker2d": 1, "HalfCheetah": 1, "Ant": 2, "Humanoid": 2}
# Ranges of the entries of qpos that contain the height and angle of the body.
RANGES = {
    "InvertedPendulum": {1: (-0.4, 0.4)},
    "Hopper": {1: (0.5, 1.5), 2: (-0.4, 0.4)},
    "Walker2d": {1: (0.6, 2.2), 2: (-1.5, 1.5)},
    "HalfCheetah": {1: (-1.0, 2.0)},
    "Ant": {2: (0.0, 1.8)},
    "Humanoid": {2: (0.7, 2.3)},
}


def transitions(env_id, rng):
    """Yield (obs, action, next_obs, terminated) of random episodes and of random states."""
    env = envs.make(env_id)
    simulator = env._env.unwrapped
    task = env_id[:-3]
    obs, _ = env.reset(seed=0)
    for t in range(2100):
        if t >= 700:
            qpos = simulator.init_qpos + rng.normal(0, 0.05, simulator.model.nq)
            qvel = rng.normal(0, rng.choice([0.1, 3.0]), simulator.model.nv)
            for i, (low, high) in RANGES[task].items():
                if rng.random() < 0.7:
                    qpos[i] = rng.uniform(low, high)
            simulator.set_state(qpos, qvel)
            obs = env._flat(simulator._get_obs())
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        next_obs, _, terminated, truncated, _ = env.step(action)
        yield obs, action, next_obs, terminated
        obs = env.reset()[0] if terminated or truncated else next_obs
    env.close()


@pytest.mark.parametrize("env_id", IDS)
def test_termination_equals_that_of_the_task(env_id):
    columns = zip(*transitions(env_id, np.random.default_rng(0)), strict=True)
    obs, action, next_obs, terminated = (np.array(c) for c in columns)
    termination = jax.jit(jax.vmap(envs.TERMINATIONS[env_id]))
    np.testing.assert_array_equal(termination(obs, action, next_obs), terminated)
    if env_id.startswith("HalfCheetah"):
        assert not terminated.any()
    else:
        assert 200 < terminated.sum() < 1900


@pytest.mark.parametrize(
    "env_id", [i for i in IDS if i[:-3] in ("Hopper", "Walker2d", "Ant", "Humanoid")]
)
def test_termination_of_non_finite_states_equals_that_of_the_task(env_id):
    env = envs.make(env_id)
    simulator = env._env.unwrapped
    termination = envs.TERMINATIONS[env_id]
    action = jnp.zeros(env.action_space.shape)
    healthy = set()
    for value in (np.nan, np.inf, -np.inf):
        for array, first in (("qpos", HIDDEN[env_id[:-3]]), ("qvel", 0)):
            if env_id.startswith("Hopper") and array == "qvel" and not np.isnan(value):
                continue  # the observation is clipped to +-10
            for i in range(first, getattr(simulator.data, array).size):
                obs, _ = env.reset(seed=0)
                getattr(simulator.data, array)[i] = value
                next_obs = env._flat(simulator._get_obs())
                assert bool(termination(obs, action, next_obs)) == (not simulator.is_healthy), (
                    array,
                    i,
                    value,
                )
                healthy.add(bool(simulator.is_healthy))
    assert False in healthy
    env.close()


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5"])
def test_hopper_terminates_at_100(env_id):
    env = envs.make(env_id)
    simulator = env._env.unwrapped
    action = jnp.zeros(3)
    for i in range(3, 6):
        for angle in (-101, -100, -99, 99, 100, 101):
            obs, _ = env.reset(seed=0)
            simulator.data.qpos[i] = angle
            ended = envs.TERMINATIONS[env_id](obs, action, env._flat(simulator._get_obs()))
            assert bool(ended) == (not simulator.is_healthy) == (abs(angle) >= 100)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inverted_pendulum_terminates_if_not_finite(value):
    for i in range(4):
        obs = jnp.zeros(4).at[i].set(value)
        assert terminations.inverted_pendulum(jnp.zeros(4), jnp.zeros(1), obs)


def test_registered_termination_is_found_without_module_prefix():
    def termination(obs, action, next_obs):
        return next_obs[0] > 1

    try:
        envs.register_termination("some.module:Mine-v0", termination)
        assert envs.TERMINATIONS["Mine-v0"] is termination
    finally:
        envs.TERMINATIONS.pop("Mine-v0", None)
    with pytest.raises(UsageError, match="must be a function"):
        envs.register_termination("Mine-v0", 3)


def test_termination_in_spec():
    assert envs.spec("cheetah-run").termination is terminations.never
    assert envs.spec("lqr-lqr_2_1").termination is None
    assert envs.spec("Pusher-v5").termination is None
    assert envs.spec("Hopper-v5").termination is terminations.hopper
