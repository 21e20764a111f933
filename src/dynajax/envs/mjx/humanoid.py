"""humanoid-stand, -walk and -run: a body with 21 joints stands, or moves at 1 or 10 m/s."""

from typing import Any

import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import (
    Physics,
    Rules,
    at_rest,
    first_free,
    frames,
    random_pose,
    sensors,
)
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_HEIGHT = 1.4  # m, of the head
_SPEEDS = {"stand": 0.0, "walk": 1.0, "run": 10.0}  # m/s
_LIMBS = ("left_hand", "left_foot", "right_hand", "right_foot")


def rules(model: mujoco.MjModel, task: str) -> Rules:
    torso, head = model.body("torso").id, model.body("head").id
    limbs = np.array([model.body(name).id for name in _LIMBS])
    velocity = sensors(model, "torso_subtreelinvel")
    goal = _SPEEDS[task]

    def observation(data: Any) -> Array:
        frame = frames(data)[torso]
        return jnp.concatenate(
            [
                data.qpos[7:],
                data.xpos[head, 2:],
                ((data.xpos[limbs] - data.xpos[torso]) @ frame).ravel(),
                frame[2],
                data.sensordata[velocity],
                data.qvel,
            ]
        )

    def reward(data: Any) -> Array:
        standing = tolerance(data.xpos[head, 2], (_HEIGHT, np.inf), _HEIGHT / 4)
        upright = tolerance(frames(data)[torso, 2, 2], (0.9, np.inf), 1.9, "linear", 0.0)
        small_control = tolerance(data.ctrl, (0, 0), 1, "quadratic", 0.0).mean()
        stand = (4 + small_control) / 5 * standing * upright
        horizontal = data.sensordata[velocity[:2]]
        if goal == 0:
            return stand * tolerance(horizontal, margin=2).mean()
        speed = jnp.linalg.norm(horizontal)
        return stand * (5 * tolerance(speed, (goal, np.inf), goal, "linear", 0.0) + 1) / 6

    def initial(device: mjx.Model, key: Array) -> Physics:
        pose = first_free(device, lambda ours: random_pose(model, ours), key)
        return at_rest(device, pose)

    return Rules(observation, reward, initial)
