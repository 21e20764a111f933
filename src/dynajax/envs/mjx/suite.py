"""Make a task of dm_control.suite from the functions of its domain and the shared physics."""

import contextlib
import importlib
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# MJX prints to stdout that an optional engine is missing.
with contextlib.redirect_stdout(io.StringIO()):
    from mujoco import mjx

from dynajax import envs
from dynajax.envs import dmc
from dynajax.envs.mjx import EnvState, Task, physics
from dynajax.types import Array


class Parts(NamedTuple):
    """The parts from which `make` builds a task; tests use them separately."""

    environment: Any  # the dm_control environment, after a reset
    model: mjx.Model
    functions: physics.TaskFunctions
    substeps: int
    low: np.ndarray  # (A,) controls that correspond to -1
    high: np.ndarray  # (A,) controls that correspond to 1


def load_parts(name: str) -> Parts:
    """Load a task's model from dm_control and create the functions of its domain."""
    environment = dmc.load(name)
    environment.reset()
    model = physics.prepare_model(environment.physics.model.ptr)
    domain, _, task = name.partition("-")
    module = importlib.import_module(f"dynajax.envs.mjx.{domain}")
    return Parts(
        environment,
        mjx.put_model(model, impl="jax"),
        module.task_functions(model, task),
        environment._n_sub_steps,
        *dmc.bounds(environment),
    )


def make(name: str) -> Task:
    """Make a task of dm_control.suite; see `dynajax.envs.mjx.make`."""
    _, model, functions, substeps, low, high = load_parts(name)
    forces = functions.force_sensors

    def reset(key: Array) -> EnvState:
        first = functions.initial(model, key)
        episode_model = functions.set_params(model, first.params)
        data = physics.initial_data(episode_model, first, force_sensors=forces)
        return EnvState(functions.observation(data).astype(jnp.float32), first)

    def step(before: EnvState, action: Array) -> tuple[EnvState, Array, Array]:
        control = jnp.asarray(action, before.physics.qpos.dtype)
        control = jnp.clip((low + high) / 2 + (high - low) / 2 * control, low, high)
        episode_model = functions.set_params(model, before.physics.params)
        after, data = physics.advance(
            episode_model, before.physics, control, substeps, force_sensors=forces
        )
        obs, reward = physics.nan_if_invalid(
            after, functions.observation(data), functions.reward(data)
        )
        return EnvState(obs, after), reward, jnp.zeros((), bool)

    # Jit here, so that MJX is traced once even if a program calls reset or step in several places.
    return Task(envs.spec(name), jax.jit(reset), jax.jit(step))
