"""fish-upright and -swim: turn a fish in water upright, or bring its mouth to a target."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

from dynajax.envs.mjx.physics import Physics, TaskFunctions, at_rest, body_axes
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
_BEND = 0.2  # rad, largest initial angle of a joint
_LOW, _HIGH = np.array([-0.4, -0.4, 0.1]), np.array([0.4, 0.4, 0.3])  # m, position of the target


def task_functions(model: mujoco.MjModel, task: str) -> TaskFunctions:
    """Return the functions of a task of this domain; see `physics.TaskFunctions`."""
    torso, mouth, target = model.body("torso").id, model.geom("mouth").id, model.geom("target").id
    joints = np.array([model.joint(name).qposadr[0] for name in _JOINTS])
    contact_distance = model.geom_size[[mouth, target], 0].sum()
    swimming = task == "swim"

    def to_target(data: Any) -> Array:
        """Return the vector from mouth to target in the mouth's frame."""
        frame = data.geom_xmat[mouth].reshape(3, 3)
        return (data.geom_xpos[target] - data.geom_xpos[mouth]) @ frame

    def observation(data: Any) -> Array:
        target_offset = [to_target(data)] if swimming else []
        upright = body_axes(data)[torso, 2, 2:]
        return jnp.concatenate([data.qpos[joints], upright, *target_offset, data.qvel])

    def reward(data: Any) -> Array:
        upright = body_axes(data)[torso, 2, 2]
        if not swimming:
            return tolerance(upright, (1, 1), 1)
        distance = jnp.linalg.norm(to_target(data))
        return (
            7 * tolerance(distance, (0, contact_distance), 2 * contact_distance) + (upright + 1) / 2
        ) / 8

    def initial(mjx_model: mjx.Model, key: Array) -> Physics:
        turn_key, bend_key, target_key = jax.random.split(key, 3)
        direction = jax.random.normal(turn_key, (4,))
        qpos = jnp.asarray(model.qpos0).at[3:7].set(direction / jnp.linalg.norm(direction))
        bent = jax.random.uniform(bend_key, joints.shape, minval=-_BEND, maxval=_BEND)
        qpos = qpos.at[joints].set(bent)
        if not swimming:
            return at_rest(mjx_model, qpos)
        return at_rest(
            mjx_model, qpos, _LOW + (_HIGH - _LOW) * jax.random.uniform(target_key, (3,))
        )

    def set_params(mjx_model: mjx.Model, params: Array) -> mjx.Model:
        return mjx_model.replace(geom_pos=mjx_model.geom_pos.at[target].set(params))

    return (
        TaskFunctions(observation, reward, initial, set_params)
        if swimming
        else TaskFunctions(observation, reward, initial)
    )
