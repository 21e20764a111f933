"""hopper-stand and -hop: stand still, or hop at 2 m/s, with a planar one-legged body."""

from typing import Any

import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, TaskFunctions, at_rest, random_pose, sensor_indices
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_HEIGHT = (0.6, 2.0)  # m, torso above foot; the reward is 0 outside
_SPEED = 2.0  # m/s


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    torso, foot = model.body("torso").id, model.body("foot").id
    velocity = sensor_indices(model, "torso_subtreelinvel")
    touch = sensor_indices(model, "touch_toe", "touch_heel")

    def observation(data: Any) -> Array:
        return jnp.concatenate([data.qpos[1:], data.qvel, jnp.log1p(data.sensordata[touch])])

    def reward(data: Any) -> Array:
        standing = tolerance(data.xipos[torso, 2] - data.xipos[foot, 2], _HEIGHT)
        if task == "hop":
            speed = data.sensordata[velocity[0]]
            return standing * tolerance(speed, (_SPEED, np.inf), _SPEED / 2, "linear", 0.5)
        small_control = tolerance(data.ctrl, (0, 0), 1, "quadratic", 0.0).mean()
        return standing * (small_control + 4) / 5

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        return at_rest(mjx_model, random_pose(model, key))

    return TaskFunctions(observation, reward, initial, force_sensors=True)
