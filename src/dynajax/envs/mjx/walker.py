"""walker-stand, -walk and -run: a planar body on two legs stands, or moves at 1 or 8 m/s."""

from typing import Any

import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, Rules, at_rest, frames, random_pose, sensors
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_HEIGHT = 1.2  # m, of the torso
_SPEEDS = {"stand": 0.0, "walk": 1.0, "run": 8.0}  # m/s


def rules(model: mujoco.MjModel, task: str) -> Rules:
    torso = model.body("torso").id
    velocity = sensors(model, "torso_subtreelinvel")
    goal = _SPEEDS[task]

    def observation(data: Any) -> Array:
        planar = frames(data)[1:, 0, ::2]
        return jnp.concatenate([planar.ravel(), data.xpos[torso, 2:], data.qvel])

    def reward(data: Any) -> Array:
        standing = tolerance(data.xpos[torso, 2], (_HEIGHT, np.inf), _HEIGHT / 2)
        upright = (1 + frames(data)[torso, 2, 2]) / 2
        stand = (3 * standing + upright) / 4
        if goal == 0:
            return stand
        speed = data.sensordata[velocity[0]]
        return stand * (5 * tolerance(speed, (goal, np.inf), goal / 2, "linear", 0.5) + 1) / 6

    def initial(device: mjx.Model, key: Array) -> Physics:
        return at_rest(device, random_pose(model, key))

    return Rules(observation, reward, initial)
