"""humanoid-stand, -walk and -run: stand, or move at 1 or 10 m/s, with 21 joints."""

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
    sample_without_contacts,
    sensor_indices,
)
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_HEIGHT = 1.4  # m, head
_SPEEDS = {"stand": 0.0, "walk": 1.0, "run": 10.0}  # m/s
_LIMBS = ("left_hand", "left_foot", "right_hand", "right_foot")


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    torso, head = model.body("torso").id, model.body("head").id
    limbs = np.array([model.body(name).id for name in _LIMBS])
    velocity = sensor_indices(model, "torso_subtreelinvel")
    goal = _SPEEDS[task]

    def observation(data: Any) -> Array:
        frame = body_axes(data)[torso]
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
        upright = tolerance(body_axes(data)[torso, 2, 2], (0.9, np.inf), 1.9, "linear", 0.0)
        small_control = tolerance(data.ctrl, (0, 0), 1, "quadratic", 0.0).mean()
        stand = (4 + small_control) / 5 * standing * upright
        horizontal = data.sensordata[velocity[:2]]
        if goal == 0:
            return stand * tolerance(horizontal, margin=2).mean()
        speed = jnp.linalg.norm(horizontal)
        return stand * (5 * tolerance(speed, (goal, np.inf), goal, "linear", 0.0) + 1) / 6

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        pose = sample_without_contacts(mjx_model, lambda k: random_pose(model, k), key)
        return at_rest(mjx_model, pose)

    return TaskFunctions(observation, reward, initial)
