"""cheetah-run: a planar body on two legs runs at 10 m/s."""

from typing import Any

import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, Rules, advance, at_rest, random_pose, sensors
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_SPEED = 10.0  # m/s
_SETTLING = 200  # MuJoCo steps before an episode starts


def rules(model: mujoco.MjModel, task: str) -> Rules:
    velocity = sensors(model, "torso_subtreelinvel")
    limited = model.jnt_limited == 1
    # dm_control sets random joints and steps without recomputing what depends on them, so the
    # first of the settling steps has the acceleration of the reference pose.
    start = mujoco.MjData(model)
    mujoco.mj_forward(model, start)
    mujoco.mj_step2(model, start)

    def observation(data: Any) -> Array:
        return jnp.concatenate([data.qpos[1:], data.qvel])

    def reward(data: Any) -> Array:
        speed = data.sensordata[velocity[0]]
        return tolerance(speed, (_SPEED, np.inf), _SPEED, "linear", 0.0)

    def initial(device: mjx.Model, key: Array) -> Physics:
        qpos = jnp.where(limited, random_pose(model, key), model.qpos0)
        physics = at_rest(device, qpos + model.opt.timestep * start.qvel)._replace(
            qvel=jnp.asarray(start.qvel, qpos.dtype),
            warmstart=jnp.asarray(start.qacc_warmstart, qpos.dtype),
        )
        return advance(device, physics, jnp.zeros_like(qpos, shape=model.nu), _SETTLING - 1)[0]

    return Rules(observation, reward, initial)
