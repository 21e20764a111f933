"""quadruped-walk and -run: move forward at 0.5 or 5 m/s on four legs."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import (
    Physics,
    TaskFunctions,
    at_rest,
    body_axes,
    clearance,
    sensor_indices,
)
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_SPEEDS = {"walk": 0.5, "run": 5.0}  # m/s
_LIFT = 0.01  # m, step in which dm_control lifts the body until it has no contacts


def _indices_of_types(model: mujoco.MjModel, *types: mujoco.mjtSensor) -> np.ndarray:
    """Return the indices into `sensordata` of all sensors of the given types."""
    ids = np.flatnonzero(np.isin(model.sensor_type, types))
    return sensor_indices(model, *(model.sensor(i).name for i in ids))


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    torso = model.body("torso").id
    hinges = model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE
    qpos_at, qvel_at = model.jnt_qposadr[hinges], model.jnt_dofadr[hinges]
    kind = mujoco.mjtSensor
    velocity = sensor_indices(model, "velocimeter")
    imu = _indices_of_types(model, kind.mjSENS_GYRO, kind.mjSENS_ACCELEROMETER)
    force_torque = _indices_of_types(model, kind.mjSENS_FORCE, kind.mjSENS_TORQUE)
    goal = _SPEEDS[task]

    def observation(data: Any) -> Array:
        return jnp.concatenate(
            [
                data.qpos[qpos_at],
                data.qvel[qvel_at],
                data.act,
                data.sensordata[velocity],
                body_axes(data)[torso, 2, 2:],
                data.sensordata[imu],
                jnp.arcsinh(data.sensordata[force_torque]),
            ]
        )

    def reward(data: Any) -> Array:
        upright = tolerance(body_axes(data)[torso, 2, 2], (1, np.inf), 2, "linear", 0.0)
        forward = data.sensordata[velocity[0]]
        return upright * tolerance(forward, (goal, np.inf), goal, "linear", 0.5)

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        direction = jax.random.normal(key, (4,))
        qpos = jnp.asarray(model.qpos0).at[:3].set(0)
        qpos = qpos.at[3:7].set(direction / jnp.linalg.norm(direction))
        # Lifting the body increases all distances to the floor by the same amount, so a division
        # replaces dm_control's search for a height.
        lifts = jnp.ceil(-clearance(mjx_model, qpos) / _LIFT)
        return at_rest(mjx_model, qpos.at[2].set(_LIFT * lifts))

    return TaskFunctions(observation, reward, initial, force_sensors=True)
