"""fish-upright and -swim: a fish in water rights itself, or brings its mouth to a target."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, Rules, at_rest, frames
from dynajax.envs.mjx.rewards import tolerance
from dynajax.types import Array

_JOINTS = (
    "tail1",
    "tail_twist",
    "tail2",
    "finright_roll",
    "finright_pitch",
    "finleft_roll",
    "finleft_pitch",
)
_BEND = 0.2  # rad, of a joint at first
_LOW, _HIGH = np.array([-0.4, -0.4, 0.1]), np.array([0.4, 0.4, 0.3])  # m, the target's place


def rules(model: mujoco.MjModel, task: str) -> Rules:
    torso, mouth, target = model.body("torso").id, model.geom("mouth").id, model.geom("target").id
    joints = np.array([model.joint(name).qposadr[0] for name in _JOINTS])
    touching = model.geom_size[[mouth, target], 0].sum()
    swimming = task == "swim"

    def to_target(data: Any) -> Array:
        """In the mouth's frame."""
        frame = data.geom_xmat[mouth].reshape(3, 3)
        return (data.geom_xpos[target] - data.geom_xpos[mouth]) @ frame

    def observation(data: Any) -> Array:
        where = [to_target(data)] if swimming else []
        upright = frames(data)[torso, 2, 2:]
        return jnp.concatenate([data.qpos[joints], upright, *where, data.qvel])

    def reward(data: Any) -> Array:
        upright = frames(data)[torso, 2, 2]
        if not swimming:
            return tolerance(upright, (1, 1), 1)
        distance = jnp.linalg.norm(to_target(data))
        return (7 * tolerance(distance, (0, touching), 2 * touching) + (upright + 1) / 2) / 8

    def initial(device: mjx.Model, key: Array) -> Physics:
        turn, bend, where = jax.random.split(key, 3)
        direction = jax.random.normal(turn, (4,))
        qpos = jnp.asarray(model.qpos0).at[3:7].set(direction / jnp.linalg.norm(direction))
        bent = jax.random.uniform(bend, joints.shape, minval=-_BEND, maxval=_BEND)
        qpos = qpos.at[joints].set(bent)
        if not swimming:
            return at_rest(device, qpos)
        return at_rest(device, qpos, _LOW + (_HIGH - _LOW) * jax.random.uniform(where, (3,)))

    def put(device: mjx.Model, drawn: Array) -> mjx.Model:
        return device.replace(geom_pos=device.geom_pos.at[target].set(drawn))

    return (
        Rules(observation, reward, initial, put)
        if swimming
        else Rules(observation, reward, initial)
    )
