"""acrobot-swingup: raise the tip of a two-link pendulum with a motor at the elbow to a target."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, TaskFunctions, at_rest, body_axes
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    arms = np.array([model.body("upper_arm").id, model.body("lower_arm").id])
    tip, target = model.site("tip").id, model.site("target").id
    radius = model.site_size[target, 0]
    margin = 0 if task.endswith("sparse") else 1

    def observation(data: Any) -> Array:
        upward = body_axes(data)[arms, :, 2]
        return jnp.concatenate([upward[:, 0], upward[:, 2], data.qvel])

    def reward(data: Any) -> Array:
        distance = jnp.linalg.norm(data.site_xpos[target] - data.site_xpos[tip])
        return tolerance(distance, (0, radius), margin)

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        return at_rest(mjx_model, jax.random.uniform(key, (2,), minval=-np.pi, maxval=np.pi))

    return TaskFunctions(observation, reward, initial)
