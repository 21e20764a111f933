"""Brax's tasks on the device; all but the cheapest by `--all-tasks`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax.envs import mjx

pytestmark = pytest.mark.filterwarnings("ignore:Brax System")
ROWS, STEPS = 32, 60
DEFAULT = ("inverted_pendulum",)
TASKS = [
    pytest.param(name, marks=() if name in DEFAULT else pytest.mark.all_tasks) for name in mjx.BRAX
]


@functools.cache
def _episodes(name):
    """(task, first state, actions, obs before, obs after, reward, terminated), axes (T, ROWS)."""
    task = mjx.make(f"brax:{name}")
    keys = jax.random.split(jax.random.key(0), ROWS)
    first = jax.jit(jax.vmap(task.reset))(keys)
    shape = (STEPS, ROWS, task.spec.action_dim)
    actions = jax.random.uniform(jax.random.key(1), shape, minval=-1)

    def step(state, action):
        after, reward, terminated = jax.vmap(task.step)(state, action)
        return after, (state.obs, after, reward, terminated)

    _, (before, after, reward, terminated) = jax.jit(functools.partial(jax.lax.scan, step))(
        first, actions
    )
    return jax.device_get((task, first, actions, before, after, reward, terminated))


@pytest.mark.parametrize("name", TASKS)
def test_spec_and_shapes(name):
    task, first, *_, after, reward, terminated = _episodes(name)
    spec = task.spec
    assert (spec.name, spec.time_limit) == (f"brax:{name}", 1000)
    assert spec.obs_dim == first.obs.shape[1] == len(set(spec.obs_names))
    assert first.obs.dtype == after.obs.dtype == reward.dtype == np.float32
    assert terminated.dtype == bool
    assert np.isfinite(after.obs).all() and np.isfinite(reward).all()


@pytest.mark.parametrize("name", TASKS)
def test_the_termination_function_sees_in_the_observation_what_brax_sees_in_the_state(name):
    task, _, actions, before, after, _, terminated = _episodes(name)
    rule = jax.vmap(jax.vmap(task.spec.termination))
    found = jax.device_get(rule(before, actions, after.obs))
    np.testing.assert_array_equal(found, terminated)
    # Without a reset an episode that has ended goes on, so ends are plenty.
    assert terminated.any() == (name != "halfcheetah") and not terminated.all()


@pytest.mark.parametrize("name", TASKS)
def test_one_step_is_braxs_own(name):
    from brax import envs as brax_envs

    _, first, actions, *_, after, _, _ = _episodes(name)
    theirs = brax_envs.get_environment(name, backend="mjx")
    state = jax.jit(jax.vmap(theirs.reset))(jax.random.split(jax.random.key(0), ROWS))
    np.testing.assert_array_equal(state.pipeline_state.q, first.physics.qpos)
    np.testing.assert_allclose(state.obs, first.obs, atol=1e-5)
    state = jax.jit(jax.vmap(theirs.step))(state, jnp.asarray(actions[0]))
    ours = jax.tree.map(lambda x: x[0], after.physics)
    np.testing.assert_allclose(state.pipeline_state.q, ours.qpos, atol=1e-4)
    np.testing.assert_allclose(state.pipeline_state.qd, ours.qvel, rtol=1e-3, atol=5e-3)


@pytest.mark.all_tasks
def test_the_reward_is_made_of_the_positions_before_and_after():
    _, first, actions, _, after, reward, _ = _episodes("halfcheetah")
    x = np.concatenate([first.physics.qpos[None, :, 0], after.physics.qpos[..., 0]])
    expected = np.diff(x, axis=0) / 0.05 - 0.1 * (actions**2).sum(axis=-1)
    np.testing.assert_allclose(reward, expected, rtol=1e-3, atol=1e-3)
