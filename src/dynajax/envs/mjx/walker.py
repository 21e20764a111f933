"""walker-stand, -walk and -run: stand, or move at 1 or 8 m/s, with a planar body on two legs."""

from typing import Any

import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import (
    Physics,
    TaskFunctions,
    at_rest,
    body_axes,
    random_pose,
    sensor_indices,
)
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_HEIGHT = 1.2  # m, torso
_SPEEDS = {"stand": 0.0, "walk": 1.0, "run": 8.0}  # m/s


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    torso = model.body("torso").id
    velocity = sensor_indices(model, "torso_subtreelinvel")
    goal = _SPEEDS[task]

    def observation(data: Any) -> Array:
        planar = body_axes(data)[1:, 0, ::2]
        return jnp.concatenate([planar.ravel(), data.xpos[torso, 2:], data.qvel])

    def reward(data: Any) -> Array:
        standing = tolerance(data.xpos[torso, 2], (_HEIGHT, np.inf), _HEIGHT / 2)
        upright = (1 + body_axes(data)[torso, 2, 2]) / 2
        stand = (3 * standing + upright) / 4
        if goal == 0:
            return stand
        speed = data.sensordata[velocity[0]]
        return stand * (5 * tolerance(speed, (goal, np.inf), goal / 2, "linear", 0.5) + 1) / 6

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        return at_rest(mjx_model, random_pose(model, key))

    return TaskFunctions(observation, reward, initial)
