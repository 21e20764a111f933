"""finger-spin and -turn: spin a free body with a two-link finger, or turn its tip to a target."""

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
    random_pose,
    sample_without_contacts,
    sensor_indices,
)
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_SPIN = 15.0  # rad/s
_XZ = np.array([0, 2])


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    joints = sensor_indices(model, "proximal", "distal")
    velocities = sensor_indices(model, "proximal_velocity", "distal_velocity", "hinge_velocity")
    tip, spinner, goal = (sensor_indices(model, name)[_XZ] for name in ("tip", "spinner", "target"))
    touch = sensor_indices(model, "touchtop", "touchbottom")
    target, hinge = model.site("target").id, model.joint("hinge").id
    turning = task.startswith("turn")

    reference = mujoco.MjData(model)
    mujoco.mj_kinematics(model, reference)
    center = reference.xanchor[hinge, _XZ]
    reach = model.geom("cap1").size.sum()  # m, from the hinge

    def distance(data: Any) -> Array:
        """Return the distance from the tip to the target's surface in metres, negative inside."""
        to_target = data.sensordata[goal] - data.sensordata[tip]
        return jnp.linalg.norm(to_target) - model.site_size[target, 0]

    def observation(data: Any) -> Array:
        sensor = data.sensordata
        common = [
            sensor[joints],
            sensor[tip] - sensor[spinner],
            sensor[velocities],
            jnp.log1p(sensor[touch]),
        ]
        if turning:
            common += [sensor[goal] - sensor[spinner], distance(data)[None]]
        return jnp.concatenate(common)

    def reward(data: Any) -> Array:
        if turning:
            return tolerance(distance(data), (-np.inf, 0))
        return tolerance(data.sensordata[velocities[2]], (-np.inf, -_SPIN))

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        pose_key, target_key = jax.random.split(key)
        qpos = sample_without_contacts(mjx_model, lambda k: random_pose(model, k), pose_key)
        if not turning:
            return at_rest(mjx_model, qpos)
        angle = jax.random.uniform(target_key, minval=-np.pi, maxval=np.pi)
        return at_rest(
            mjx_model, qpos, center + reach * jnp.stack([jnp.sin(angle), jnp.cos(angle)])
        )

    def set_params(mjx_model: mjx.Model, params: Array) -> mjx.Model:
        return mjx_model.replace(site_pos=mjx_model.site_pos.at[target, _XZ].set(params))

    if not turning:
        return TaskFunctions(observation, reward, initial, force_sensors=True)
    return TaskFunctions(observation, reward, initial, set_params, force_sensors=True)
