"""pendulum-swingup: swing a pole up with a weak motor and hold it within 8 degrees."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, Rules, at_rest, frames
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_COSINE = np.cos(np.deg2rad(8))


def rules(model: mujoco.MjModel, task: str) -> Rules:
    pole = model.body("pole").id

    def observation(data: Any) -> Array:
        return jnp.concatenate([frames(data)[pole, np.array([2, 0]), 2], data.qvel])

    def reward(data: Any) -> Array:
        # In float32 the cosine of an upright pole can be rounded to more than 1.
        return tolerance(jnp.minimum(frames(data)[pole, 2, 2], 1), (_COSINE, 1))

    def initial(device: mjx.Model, key: Array) -> Physics:
        return at_rest(device, jax.random.uniform(key, (1,), minval=-np.pi, maxval=np.pi))

    return Rules(observation, reward, initial)
