"""point_mass-easy: move a planar mass with two motors to the origin."""

from typing import Any

import jax.numpy as jnp
import mujoco
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, TaskFunctions, at_rest, random_pose
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    mass, target = model.geom("pointmass").id, model.geom("target").id
    radius = model.geom_size[target, 0]

    def observation(data: Any) -> Array:
        return jnp.concatenate([data.qpos, data.qvel])

    def reward(data: Any) -> Array:
        distance = jnp.linalg.norm(data.geom_xpos[target] - data.geom_xpos[mass])
        small_control = tolerance(data.ctrl, (0, 0), 1, "quadratic", 0.0).mean()
        return tolerance(distance, (0, radius), radius) * (small_control + 4) / 5

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        return at_rest(mjx_model, random_pose(model, key))

    return TaskFunctions(observation, reward, initial)
