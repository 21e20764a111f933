"""ball_in_cup-catch: a cup on two sliders catches the ball on its string; reward 0 or 1."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, Rules, at_rest, first_free
from dynajax.types import Array

_XZ = np.array([0, 2])
_LOW, _HIGH = np.array([-0.2, 0.2]), np.array([0.2, 0.5])  # m, of the ball's x and z


def rules(model: mujoco.MjModel, task: str) -> Rules:
    ball, target = model.body("ball").id, model.site("target").id
    place = np.array([model.joint(name).qposadr[0] for name in ("ball_x", "ball_z")])
    room = model.site_size[target, _XZ] - model.geom("ball").size[0]

    def observation(data: Any) -> Array:
        return jnp.concatenate([data.qpos, data.qvel])

    def reward(data: Any) -> Array:
        distance = jnp.abs(data.site_xpos[target, _XZ] - data.xpos[ball, _XZ])
        return jnp.where(jnp.all(distance < room), 1.0, 0.0)

    def initial(device: mjx.Model, key: Array) -> Physics:
        def pose(ours: Array) -> Array:
            drawn = jax.random.uniform(ours, (2,)) * (_HIGH - _LOW) + _LOW
            return jnp.asarray(model.qpos0).at[place].set(drawn)

        return at_rest(device, first_free(device, pose, key))

    return Rules(observation, reward, initial)
