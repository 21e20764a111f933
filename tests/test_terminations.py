"""The termination rules against the tasks' own `terminated`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import envs
from dynajax.envs import terminations
from dynajax.types import UsageError

TASKS = ["InvertedPendulum", "Hopper", "Walker2d", "HalfCheetah", "Ant", "Humanoid"]
IDS = [f"{task}-{version}" for task in TASKS for version in ("v4", "v5")]
# What of qpos the observation leaves out, and where a task stands its body's height and lean.
HIDDEN = {"Hopper": 1, "Walker2d": 1, "HalfCheetah": 1, "Ant": 2, "Humanoid": 2}
RANGES = {
    "InvertedPendulum": {1: (-0.4, 0.4)},
    "Hopper": {1: (0.5, 1.5), 2: (-0.4, 0.4)},
    "Walker2d": {1: (0.6, 2.2), 2: (-1.5, 1.5)},
    "HalfCheetah": {1: (-1.0, 2.0)},
    "Ant": {2: (0.0, 1.8)},
    "Humanoid": {2: (0.7, 2.3)},
}


def transitions(env_id, rng):
    """(obs, action, next_obs, terminated) of random episodes and of pushed states."""
    env = envs.make(env_id)
    real = env._env.unwrapped
    task = env_id[:-3]
    obs, _ = env.reset(seed=0)
    for t in range(2100):
        if t >= 700:
            qpos = real.init_qpos + rng.normal(0, 0.05, real.model.nq)
            qvel = rng.normal(0, rng.choice([0.1, 3.0]), real.model.nv)
            for i, (low, high) in RANGES[task].items():
                if rng.random() < 0.7:
                    qpos[i] = rng.uniform(low, high)
            real.set_state(qpos, qvel)
            obs = env._flat(real._get_obs())
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        next_obs, _, terminated, truncated, _ = env.step(action)
        yield obs, action, next_obs, terminated
        obs = env.reset()[0] if terminated or truncated else next_obs
    env.close()


@pytest.mark.parametrize("env_id", IDS)
def test_the_rule_is_the_tasks_own(env_id):
    columns = zip(*transitions(env_id, np.random.default_rng(0)), strict=True)
    obs, action, next_obs, terminated = (np.array(c) for c in columns)
    rule = jax.jit(jax.vmap(envs.TERMINATIONS[env_id]))
    np.testing.assert_array_equal(rule(obs, action, next_obs), terminated)
    if env_id.startswith("HalfCheetah"):
        assert not terminated.any()
    else:
        assert 200 < terminated.sum() < 1900


@pytest.mark.parametrize(
    "env_id", [i for i in IDS if i[:-3] in ("Hopper", "Walker2d", "Ant", "Humanoid")]
)
def test_numbers_that_are_not_finite_count_where_the_task_counts_them(env_id):
    env = envs.make(env_id)
    real = env._env.unwrapped
    rule = envs.TERMINATIONS[env_id]
    action = jnp.zeros(env.action_space.shape)
    seen = set()
    for value in (np.nan, np.inf, -np.inf):
        for array, first in (("qpos", HIDDEN[env_id[:-3]]), ("qvel", 0)):
            if env_id.startswith("Hopper") and array == "qvel" and not np.isnan(value):
                continue  # clipped to +-10 before anybody can see it
            for i in range(first, getattr(real.data, array).size):
                obs, _ = env.reset(seed=0)
                getattr(real.data, array)[i] = value
                next_obs = env._flat(real._get_obs())
                assert bool(rule(obs, action, next_obs)) == (not real.is_healthy), (array, i, value)
                seen.add(bool(real.is_healthy))
    assert False in seen
    env.close()


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5"])
def test_a_hopper_must_stay_within_100(env_id):
    env = envs.make(env_id)
    real = env._env.unwrapped
    action = jnp.zeros(3)
    for i in range(3, 6):
        for angle in (-101, -100, -99, 99, 100, 101):
            obs, _ = env.reset(seed=0)
            real.data.qpos[i] = angle
            ended = envs.TERMINATIONS[env_id](obs, action, env._flat(real._get_obs()))
            assert bool(ended) == (not real.is_healthy) == (abs(angle) >= 100)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_inverted_pendulum_that_is_not_finite_has_fallen(value):
    for i in range(4):
        obs = jnp.zeros(4).at[i].set(value)
        assert terminations.inverted_pendulum(jnp.zeros(4), jnp.zeros(1), obs)


def test_a_users_rule_is_found_without_its_module():
    def rule(obs, action, next_obs):
        return next_obs[0] > 1

    try:
        envs.register_termination("some.module:Mine-v0", rule)
        assert envs.TERMINATIONS["Mine-v0"] is rule
    finally:
        envs.TERMINATIONS.pop("Mine-v0", None)
    with pytest.raises(UsageError, match="must be a function"):
        envs.register_termination("Mine-v0", 3)


def test_rules_of_other_tasks():
    assert envs.spec("cheetah-run").termination is terminations.never
    assert envs.spec("lqr-lqr_2_1").termination is None
    assert envs.spec("Pusher-v5").termination is None
    assert envs.spec("Hopper-v5").termination is terminations.hopper
