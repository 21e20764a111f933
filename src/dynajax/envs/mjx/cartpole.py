"""cartpole-balance and -swingup: keep a pole on a cart upright; `_sparse` has rewards 0 and 1."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, TaskFunctions, at_rest, body_axes
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_CART_RANGE = (-0.25, 0.25)  # m
_COSINE_RANGE = (0.995, 1.0)


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""

    def observation(data: Any) -> Array:
        poles = body_axes(data)[2:, np.array([2, 0]), 2]
        return jnp.concatenate([data.qpos[:1], poles.ravel(), data.qvel])

    def sparse(data: Any) -> Array:
        # In float32 the cosine of an upright pole can round to more than 1.
        cosines = jnp.minimum(body_axes(data)[2:, 2, 2], 1)
        upright = tolerance(cosines, _COSINE_RANGE)
        return tolerance(data.qpos[0], _CART_RANGE) * upright.prod()

    def smooth(data: Any) -> Array:
        upright = (body_axes(data)[2:, 2, 2] + 1) / 2
        centered = (1 + tolerance(data.qpos[0], margin=2)) / 2
        small_control = tolerance(data.ctrl[0], (0, 0), 1, "quadratic", 0.0)
        small_velocity = tolerance(data.qvel[1:], margin=5).min()
        return upright.mean() * (4 + small_control) / 5 * (1 + small_velocity) / 2 * centered

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        qpos_key, qvel_key = jax.random.split(key)
        if task.startswith("swingup"):
            mean, std = np.array([0, np.pi]), np.array([0.01, 0.01])
            qpos = mean + std * jax.random.normal(qpos_key, (2,))
        else:
            half = np.array([0.1, 0.034])
            qpos = half * jax.random.uniform(qpos_key, (2,), minval=-1)
        return at_rest(mjx_model, qpos)._replace(qvel=0.01 * jax.random.normal(qvel_key, (2,)))

    return TaskFunctions(observation, sparse if task.endswith("sparse") else smooth, initial)
