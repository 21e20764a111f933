"""A task of your own for the device engine: pure JAX functions that train on the accelerator.

Run it in the folder of this file, or with that folder on PYTHONPATH:

    dynajax train --env=own_device_task:CartOnDevice --engine=mjx --steps=4000
"""

import jax
import jax.numpy as jnp

import dynajax
from dynajax.envs.mjx import EnvState, Task
from dynajax.types import EnvSpec


def left_the_track(obs, action, next_obs):
    """Return whether the cart is 2 away from the origin."""
    return jnp.abs(next_obs[0]) > 2


def reset(key):
    """Return a random state; an `EnvState` may carry more than the observation."""
    return EnvState(jax.random.uniform(key, (2,), minval=-0.5, maxval=0.5), ())


def step(state, action):
    """Return the next state, the reward, and whether the episode terminates."""
    velocity = state.obs[1] + 0.1 * action[0]
    obs = jnp.stack([state.obs[0] + 0.1 * velocity, velocity])
    return EnvState(obs, ()), -jnp.abs(obs[0]), left_the_track(state.obs, action, obs)


def cart():
    """Return the task: its sizes, its time limit, and its functions."""
    spec = EnvSpec(
        name="CartOnDevice",
        obs_dim=2,
        action_dim=1,
        time_limit=200,
        obs_names=("position", "velocity"),
        termination=left_the_track,
    )
    return Task(spec, reset, step)


dynajax.register_mjx_task("CartOnDevice", cart)
