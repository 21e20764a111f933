"""hopper-stand and hopper-hop: a planar one-legged body stands still, or hops at 2 m/s."""

from typing import Any

import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, Rules, at_rest, random_pose, sensors
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_HEIGHT = (0.6, 2.0)  # m, of the torso above the foot; the reward drops to 0 outside
_SPEED = 2.0  # m/s


def rules(model: mujoco.MjModel, task: str) -> Rules:
    torso, foot = model.body("torso").id, model.body("foot").id
    velocity = sensors(model, "torso_subtreelinvel")
    touch = sensors(model, "touch_toe", "touch_heel")

    def observation(data: Any) -> Array:
        return jnp.concatenate([data.qpos[1:], data.qvel, jnp.log1p(data.sensordata[touch])])

    def reward(data: Any) -> Array:
        standing = tolerance(data.xipos[torso, 2] - data.xipos[foot, 2], _HEIGHT)
        if task == "hop":
            speed = data.sensordata[velocity[0]]
            return standing * tolerance(speed, (_SPEED, np.inf), _SPEED / 2, "linear", 0.5)
        small_control = tolerance(data.ctrl, (0, 0), 1, "quadratic", 0.0).mean()
        return standing * (small_control + 4) / 5

    def initial(device: mjx.Model, key: Array) -> Physics:
        return at_rest(device, random_pose(model, key))

    return Rules(observation, reward, initial, forces=True)
