"""reacher-easy and -hard: reach a target of 5 or 1.5 cm with the tip of a planar two-link arm."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, TaskFunctions, at_rest, random_pose
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_RADII = (0.05, 0.2)  # m, range of the target's distance from the origin


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    target, finger = model.geom("target").id, model.geom("finger").id
    contact_distance = model.geom_size[[target, finger], 0].sum()

    def to_target(data: Any) -> Array:
        return data.geom_xpos[target, :2] - data.geom_xpos[finger, :2]

    def observation(data: Any) -> Array:
        return jnp.concatenate([data.qpos, to_target(data), data.qvel])

    def reward(data: Any) -> Array:
        return tolerance(jnp.linalg.norm(to_target(data)), (0, contact_distance))

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        pose_key, angle_key, radius_key = jax.random.split(key, 3)
        angle = jax.random.uniform(angle_key, maxval=2 * np.pi)
        radius = jax.random.uniform(radius_key, minval=_RADII[0], maxval=_RADII[1])
        position = radius * jnp.stack([jnp.sin(angle), jnp.cos(angle)])
        return at_rest(mjx_model, random_pose(model, pose_key), position)

    def set_params(mjx_model: mjx.Model, params: Array) -> mjx.Model:
        return mjx_model.replace(geom_pos=mjx_model.geom_pos.at[target, :2].set(params))

    return TaskFunctions(observation, reward, initial, set_params)
