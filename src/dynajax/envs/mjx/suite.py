"""A task of dm_control.suite from its domain's rules and the shared physics."""

import contextlib
import importlib
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# MJX says on stdout that an engine it does not need is missing.
with contextlib.redirect_stdout(io.StringIO()):
    from mujoco import mjx

from dynajax import envs
from dynajax.envs import dmc
from dynajax.envs.mjx import EnvState, Task, physics
from dynajax.types import Array


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
    module = importlib.import_module(f"dynajax.envs.mjx.{domain}")
    return Parts(
        environment,
        mjx.put_model(model, impl="jax"),
        module.rules(model, task),
        environment._n_sub_steps,
        *dmc.bounds(environment),
    )


def make(name: str) -> Task:
    """See `dynajax.envs.mjx.make`."""
    _, model, rules, substeps, low, high = parts(name)

    def reset(key: Array) -> EnvState:
        first = rules.initial(model, key)
        data = physics.settle(rules.put(model, first.drawn), first, forces=rules.forces)
        return EnvState(rules.observation(data).astype(jnp.float32), first)

    def step(before: EnvState, action: Array) -> tuple[EnvState, Array, Array]:
        control = jnp.asarray(action, before.physics.qpos.dtype)
        control = jnp.clip((low + high) / 2 + (high - low) / 2 * control, low, high)
        episode = rules.put(model, before.physics.drawn)
        after, data = physics.advance(
            episode, before.physics, control, substeps, forces=rules.forces
        )
        obs, reward = physics.or_nan(after, rules.observation(data), rules.reward(data))
        return EnvState(obs, after), reward, jnp.zeros((), bool)

    # Jitted, so that MJX is traced once for all the places of a program that step or reset.
    return Task(envs.spec(name), jax.jit(reset), jax.jit(step))
