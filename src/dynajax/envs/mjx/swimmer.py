"""swimmer-swimmer6 and -swimmer15: a chain of 6 or 15 links in water swims to a target."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, Rules, at_rest, frames, random_pose
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_NEAR, _FAR = 0.3, 2.0  # m, half the side of the square in which the target lies
_SHARE_NEAR = 0.2


def rules(model: mujoco.MjModel, task: str) -> Rules:
    head, nose, target = model.body("head").id, model.geom("nose").id, model.geom("target").id
    radius = model.geom_size[target, 0]

    def to_target(data: Any) -> Array:
        """In the head's frame, the vertical left out."""
        return ((data.geom_xpos[target] - data.geom_xpos[nose]) @ frames(data)[head])[:2]

    def observation(data: Any) -> Array:
        # Linear and angular velocity of each link in its own frame, after 12 of the head.
        links = data.sensordata[12:].reshape(-1, 6)
        planar = links[:, np.array([0, 1, 5])].ravel()
        return jnp.concatenate([data.qpos[3:], to_target(data), planar])

    def reward(data: Any) -> Array:
        distance = jnp.linalg.norm(to_target(data))
        return tolerance(distance, (0, radius), 5 * radius, "long_tail")

    def initial(device: mjx.Model, key: Array) -> Physics:
        pose, near, where = jax.random.split(key, 3)
        half = jnp.where(jax.random.bernoulli(near, _SHARE_NEAR), _NEAR, _FAR)
        place = half * jax.random.uniform(where, (2,), minval=-1)
        return at_rest(device, random_pose(model, pose), place)

    def put(device: mjx.Model, drawn: Array) -> mjx.Model:
        return device.replace(geom_pos=device.geom_pos.at[target, :2].set(drawn))

    return Rules(observation, reward, initial, put)
