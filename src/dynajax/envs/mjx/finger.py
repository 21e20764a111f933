"""finger-spin and -turn: a two-link finger spins a free body, or turns its tip to a target."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, Rules, at_rest, first_free, random_pose, sensors
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_SPIN = 15.0  # rad/s
_XZ = np.array([0, 2])


def rules(model: mujoco.MjModel, task: str) -> Rules:
    joints = sensors(model, "proximal", "distal")
    velocities = sensors(model, "proximal_velocity", "distal_velocity", "hinge_velocity")
    tip, spinner, goal = (sensors(model, name)[_XZ] for name in ("tip", "spinner", "target"))
    touch = sensors(model, "touchtop", "touchbottom")
    target, hinge = model.site("target").id, model.joint("hinge").id
    turning = task.startswith("turn")

    reference = mujoco.MjData(model)
    mujoco.mj_kinematics(model, reference)
    centre = reference.xanchor[hinge, _XZ]
    reach = model.geom("cap1").size.sum()  # m, from the hinge

    def distance(data: Any) -> Array:
        """Of the tip to the target's surface in metres, negative inside."""
        to_target = data.sensordata[goal] - data.sensordata[tip]
        return jnp.linalg.norm(to_target) - model.site_size[target, 0]

    def observation(data: Any) -> Array:
        read = data.sensordata
        common = [
            read[joints],
            read[tip] - read[spinner],
            read[velocities],
            jnp.log1p(read[touch]),
        ]
        if turning:
            common += [read[goal] - read[spinner], distance(data)[None]]
        return jnp.concatenate(common)

    def reward(data: Any) -> Array:
        if turning:
            return tolerance(distance(data), (-np.inf, 0))
        return tolerance(data.sensordata[velocities[2]], (-np.inf, -_SPIN))

    def initial(device: mjx.Model, key: Array) -> Physics:
        pose, where = jax.random.split(key)
        qpos = first_free(device, lambda ours: random_pose(model, ours), pose)
        if not turning:
            return at_rest(device, qpos)
        angle = jax.random.uniform(where, minval=-np.pi, maxval=np.pi)
        return at_rest(device, qpos, centre + reach * jnp.stack([jnp.sin(angle), jnp.cos(angle)]))

    def put(device: mjx.Model, drawn: Array) -> mjx.Model:
        return device.replace(site_pos=device.site_pos.at[target, _XZ].set(drawn))

    if not turning:
        return Rules(observation, reward, initial, forces=True)
    return Rules(observation, reward, initial, put, forces=True)
