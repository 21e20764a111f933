"""reacher-easy and -hard: the tip of a planar two-link arm reaches a target of 5 or 1.5 cm."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, Rules, at_rest, random_pose
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_RADII = (0.05, 0.2)  # m, of the target's place


def rules(model: mujoco.MjModel, task: str) -> Rules:
    target, finger = model.geom("target").id, model.geom("finger").id
    touching = model.geom_size[[target, finger], 0].sum()

    def to_target(data: Any) -> Array:
        return data.geom_xpos[target, :2] - data.geom_xpos[finger, :2]

    def observation(data: Any) -> Array:
        return jnp.concatenate([data.qpos, to_target(data), data.qvel])

    def reward(data: Any) -> Array:
        return tolerance(jnp.linalg.norm(to_target(data)), (0, touching))

    def initial(device: mjx.Model, key: Array) -> Physics:
        pose, around, out = jax.random.split(key, 3)
        angle = jax.random.uniform(around, maxval=2 * np.pi)
        radius = jax.random.uniform(out, minval=_RADII[0], maxval=_RADII[1])
        place = radius * jnp.stack([jnp.sin(angle), jnp.cos(angle)])
        return at_rest(device, random_pose(model, pose), place)

    def put(device: mjx.Model, drawn: Array) -> mjx.Model:
        return device.replace(geom_pos=device.geom_pos.at[target, :2].set(drawn))

    return Rules(observation, reward, initial, put)
