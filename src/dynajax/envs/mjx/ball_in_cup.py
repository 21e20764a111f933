"""ball_in_cup-catch: catch a ball on a string with a cup on two sliders; the reward is 0 or 1."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, TaskFunctions, at_rest, sample_without_contacts
from dynajax.types import Array

_XZ = np.array([0, 2])
_LOW, _HIGH = np.array([-0.2, 0.2]), np.array([0.2, 0.5])  # m, initial x and z of the ball


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    ball, target = model.body("ball").id, model.site("target").id
    ball_qpos = np.array([model.joint(name).qposadr[0] for name in ("ball_x", "ball_z")])
    max_distance = model.site_size[target, _XZ] - model.geom("ball").size[0]

    def observation(data: Any) -> Array:
        return jnp.concatenate([data.qpos, data.qvel])

    def reward(data: Any) -> Array:
        distance = jnp.abs(data.site_xpos[target, _XZ] - data.xpos[ball, _XZ])
        return jnp.where(jnp.all(distance < max_distance), 1.0, 0.0)

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        def pose(sample_key: Array) -> Array:
            position = jax.random.uniform(sample_key, (2,)) * (_HIGH - _LOW) + _LOW
            return jnp.asarray(model.qpos0).at[ball_qpos].set(position)

        return at_rest(mjx_model, sample_without_contacts(mjx_model, pose, key))

    return TaskFunctions(observation, reward, initial)
