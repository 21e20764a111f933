"""pendulum-swingup: swing a pole up with a weak motor and hold it within 8 degrees."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, TaskFunctions, at_rest, body_axes
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_COSINE = np.cos(np.deg2rad(8))


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    pole = model.body("pole").id

    def observation(data: Any) -> Array:
        return jnp.concatenate([body_axes(data)[pole, np.array([2, 0]), 2], data.qvel])

    def reward(data: Any) -> Array:
        # In float32 the cosine of an upright pole can round to more than 1.
        return tolerance(jnp.minimum(body_axes(data)[pole, 2, 2], 1), (_COSINE, 1))

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        return at_rest(mjx_model, jax.random.uniform(key, (1,), minval=-np.pi, maxval=np.pi))

    return TaskFunctions(observation, reward, initial)
