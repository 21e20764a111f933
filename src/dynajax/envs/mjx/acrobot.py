"""acrobot-swingup: raise the tip of a two-link pendulum, driven at its elbow, to a target."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, Rules, at_rest, frames
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array


def rules(model: mujoco.MjModel, task: str) -> Rules:
    arms = np.array([model.body("upper_arm").id, model.body("lower_arm").id])
    tip, target = model.site("tip").id, model.site("target").id
    radius = model.site_size[target, 0]
    margin = 0 if task.endswith("sparse") else 1

    def observation(data: Any) -> Array:
        upward = frames(data)[arms, :, 2]
        return jnp.concatenate([upward[:, 0], upward[:, 2], data.qvel])

    def reward(data: Any) -> Array:
        distance = jnp.linalg.norm(data.site_xpos[target] - data.site_xpos[tip])
        return tolerance(distance, (0, radius), margin)

    def initial(device: mjx.Model, key: Array) -> Physics:
        return at_rest(device, jax.random.uniform(key, (2,), minval=-np.pi, maxval=np.pi))

    return Rules(observation, reward, initial)
