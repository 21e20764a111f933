"""swimmer-swimmer6 and -swimmer15: swim to a target with a chain of 6 or 15 links in water."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, TaskFunctions, at_rest, body_axes, random_pose
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_NEAR, _FAR = 0.3, 2.0  # m, half the side of the square that contains the target
_NEAR_PROBABILITY = 0.2


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    head, nose, target = model.body("head").id, model.geom("nose").id, model.geom("target").id
    radius = model.geom_size[target, 0]

    def to_target(data: Any) -> Array:
        """Return the horizontal vector from nose to target in the head's frame."""
        return ((data.geom_xpos[target] - data.geom_xpos[nose]) @ body_axes(data)[head])[:2]

    def observation(data: Any) -> Array:
        # Each link has six entries, its linear and angular velocity in its own frame. The first 12
        # entries belong to the head.
        links = data.sensordata[12:].reshape(-1, 6)
        planar = links[:, np.array([0, 1, 5])].ravel()
        return jnp.concatenate([data.qpos[3:], to_target(data), planar])

    def reward(data: Any) -> Array:
        distance = jnp.linalg.norm(to_target(data))
        return tolerance(distance, (0, radius), 5 * radius, "long_tail")

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        pose_key, near_key, target_key = jax.random.split(key, 3)
        half = jnp.where(jax.random.bernoulli(near_key, _NEAR_PROBABILITY), _NEAR, _FAR)
        position = half * jax.random.uniform(target_key, (2,), minval=-1)
        return at_rest(mjx_model, random_pose(model, pose_key), position)

    def set_params(mjx_model: mjx.Model, params: Array) -> mjx.Model:
        return mjx_model.replace(geom_pos=mjx_model.geom_pos.at[target, :2].set(params))

    return TaskFunctions(observation, reward, initial, set_params)
