"""cheetah-run: run at 10 m/s with a planar body on two legs."""

from typing import Any

import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import (
    Physics,
    TaskFunctions,
    advance,
    at_rest,
    random_pose,
    sensor_indices,
)
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_SPEED = 10.0  # m/s
_SETTLING_STEPS = 200  # MuJoCo steps before an episode starts


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    velocity = sensor_indices(model, "torso_subtreelinvel")
    limited = model.jnt_limited == 1
    # dm_control sets random joints and then steps without recomputing what depends on them, so the
    # first settling step uses the acceleration of the reference pose.
    start = mujoco.MjData(model)
    mujoco.mj_forward(model, start)
    mujoco.mj_step2(model, start)

    def observation(data: Any) -> Array:
        return jnp.concatenate([data.qpos[1:], data.qvel])

    def reward(data: Any) -> Array:
        speed = data.sensordata[velocity[0]]
        return tolerance(speed, (_SPEED, np.inf), _SPEED, "linear", 0.0)

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        qpos = jnp.where(limited, random_pose(model, key), model.qpos0)
        physics = at_rest(mjx_model, qpos + model.opt.timestep * start.qvel)._replace(
            qvel=jnp.asarray(start.qvel, qpos.dtype),
            warmstart=jnp.asarray(start.qacc_warmstart, qpos.dtype),
        )
        return advance(
            mjx_model, physics, jnp.zeros_like(qpos, shape=model.nu), _SETTLING_STEPS - 1
        )[0]

    return TaskFunctions(observation, reward, initial)
