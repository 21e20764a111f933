"""Brax's tasks on the device; all except the cheapest need `--all-tasks`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax.envs import mjx

pytestmark = pytest.mark.filterwarnings("ignore:Brax System")
NUM_ENVS, STEPS = 32, 60
DEFAULT = ("inverted_pendulum",)
TASKS = [
    pytest.param(name, marks=() if name in DEFAULT else pytest.mark.all_tasks) for name in mjx.BRAX
]


@functools.cache
def _episodes(name):
    """Return (task, first state, actions, obs before, state after, reward, terminated).

    The last five have the axes (STEPS, NUM_ENVS).
    """
    task = mjx.make(f"brax:{name}")
    keys = jax.random.split(jax.random.key(0), NUM_ENVS)
    first = jax.jit(jax.vmap(task.reset))(keys)
    shape = (STEPS, NUM_ENVS, task.spec.action_dim)
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
def test_termination_function_equals_braxs_done(name):
    task, _, actions, before, after, _, terminated = _episodes(name)
    termination = jax.vmap(jax.vmap(task.spec.termination))
    predicted = jax.device_get(termination(before, actions, after.obs))
    np.testing.assert_array_equal(predicted, terminated)
    # Many steps are terminated, because a terminated episode continues without a reset.
    assert terminated.any() == (name != "halfcheetah") and not terminated.all()


@pytest.mark.parametrize("name", TASKS)
def test_step_equals_braxs(name):
    from brax import envs as brax_envs

    _, first, actions, *_, after, _, _ = _episodes(name)
    reference = brax_envs.get_environment(name, backend="mjx")
    state = jax.jit(jax.vmap(reference.reset))(jax.random.split(jax.random.key(0), NUM_ENVS))
    np.testing.assert_array_equal(state.pipeline_state.q, first.physics.qpos)
    np.testing.assert_allclose(state.obs, first.obs, atol=1e-5)
    state = jax.jit(jax.vmap(reference.step))(state, jnp.asarray(actions[0]))
    physics = jax.tree.map(lambda x: x[0], after.physics)
    np.testing.assert_allclose(state.pipeline_state.q, physics.qpos, atol=1e-4)
    np.testing.assert_allclose(state.pipeline_state.qd, physics.qvel, rtol=1e-3, atol=5e-3)


@pytest.mark.all_tasks
def test_reward_uses_positions_before_and_after_the_step():
    _, first, actions, _, after, reward, _ = _episodes("halfcheetah")
    x = np.concatenate([first.physics.qpos[None, :, 0], after.physics.qpos[..., 0]])
    expected = np.diff(x, axis=0) / 0.05 - 0.1 * (actions**2).sum(axis=-1)
    np.testing.assert_allclose(reward, expected, rtol=1e-3, atol=1e-3)
