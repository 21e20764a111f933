"""A task of dm_control.suite from its domain's rules and the shared physics."""

import contextlib
import importlib
import io
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# MJX says on stdout that an engine it does not need is missing.
with contextlib.redirect_stdout(io.StringIO()):
    from mujoco import mjx

from dynajax import envs
from dynajax.envs import dmc
from dynajax.envs.device import EnvState, Task, physics
from dynajax.types import Array

# Beyond this MuJoCo calls a position, velocity or acceleration bad, and dm_control the physics.
_LIMIT = 1e10


class Parts(NamedTuple):
    """What a task is made of; tests take it apart."""

    environment: Any  # dm_control's own, after a reset
    model: mjx.Model
    rules: physics.Rules
    substeps: int
    low: np.ndarray  # (A,) controls that -1 and 1 stand for
    high: np.ndarray  # (A,)


def parts(name: str) -> Parts:
    """Loads the model of a task from dm_control and reads its domain's rules."""
    environment = dmc.load(name)
    environment.reset()
    model = physics.prepare(environment.physics.model.ptr)
    domain, _, task = name.partition("-")
    module = importlib.import_module(f"dynajax.envs.device.{domain}")
    return Parts(
        environment,
        mjx.put_model(model, impl="jax"),
        module.rules(model, task),
        environment._n_sub_steps,
        *dmc.bounds(environment),
    )


def make(name: str) -> Task:
    """See `dynajax.envs.device.make`."""
    _, model, rules, substeps, low, high = parts(name)

    def state(after: physics.Physics, data: mjx.Data) -> EnvState:
        return EnvState(rules.observation(data).astype(jnp.float32), after)

    def reset(key: Array) -> EnvState:
        first = rules.initial(model, key)
        data = physics.settle(rules.put(model, first.drawn), first, forces=rules.forces)
        return state(first, data)

    def step(before: EnvState, action: Array) -> tuple[EnvState, Array, Array]:
        control = jnp.asarray(action, before.physics.qpos.dtype)
        control = jnp.clip((low + high) / 2 + (high - low) / 2 * control, low, high)
        episode = rules.put(model, before.physics.drawn)
        after, data = physics.advance(
            episode, before.physics, control, substeps, forces=rules.forces
        )
        moved = jnp.concatenate([after.qpos, after.qvel, after.warmstart])
        valid = jnp.all(jnp.abs(moved) <= _LIMIT)
        reward = jnp.where(valid, rules.reward(data), jnp.nan).astype(jnp.float32)
        new = state(after, data)
        return new._replace(obs=jnp.where(valid, new.obs, jnp.nan)), reward, jnp.zeros((), bool)

    return Task(envs.spec(name), reset, step)
