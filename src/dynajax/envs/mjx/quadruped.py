"""quadruped-walk and -run: a body on four legs moves forward at 0.5 or 5 m/s."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, Rules, at_rest, clearance, frames, sensors
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_SPEEDS = {"walk": 0.5, "run": 5.0}  # m/s
_RISE = 0.01  # m, the step by which dm_control lifts the body until nothing touches


def _of_types(model: mujoco.MjModel, *types: mujoco.mjtSensor) -> np.ndarray:
    ids = np.flatnonzero(np.isin(model.sensor_type, types))
    return sensors(model, *(model.sensor(i).name for i in ids))


def rules(model: mujoco.MjModel, task: str) -> Rules:
    torso = model.body("torso").id
    hinges = model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE
    qpos_at, qvel_at = model.jnt_qposadr[hinges], model.jnt_dofadr[hinges]
    kind = mujoco.mjtSensor
    velocity = sensors(model, "velocimeter")
    imu = _of_types(model, kind.mjSENS_GYRO, kind.mjSENS_ACCELEROMETER)
    force_torque = _of_types(model, kind.mjSENS_FORCE, kind.mjSENS_TORQUE)
    goal = _SPEEDS[task]

    def observation(data: Any) -> Array:
        return jnp.concatenate(
            [
                data.qpos[qpos_at],
                data.qvel[qvel_at],
                data.act,
                data.sensordata[velocity],
                frames(data)[torso, 2, 2:],
                data.sensordata[imu],
                jnp.arcsinh(data.sensordata[force_torque]),
            ]
        )

    def reward(data: Any) -> Array:
        upright = tolerance(frames(data)[torso, 2, 2], (1, np.inf), 2, "linear", 0.0)
        forward = data.sensordata[velocity[0]]
        return upright * tolerance(forward, (goal, np.inf), goal, "linear", 0.5)

    def initial(device: mjx.Model, key: Array) -> Physics:
        direction = jax.random.normal(key, (4,))
        qpos = jnp.asarray(model.qpos0).at[:3].set(0)
        qpos = qpos.at[3:7].set(direction / jnp.linalg.norm(direction))
        # Distances to the floor grow by what the body is lifted, so the search for a height is a
        # division.
        lifts = jnp.ceil(-clearance(device, qpos) / _RISE)
        return at_rest(device, qpos.at[2].set(_RISE * lifts))

    return Rules(observation, reward, initial, forces=True)
