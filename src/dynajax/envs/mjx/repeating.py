"""Repeat each action for several frames (simulator control steps) on the device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dynajax.envs.mjx import EnvState, Task
from dynajax.types import Array


class CountedPhysics(NamedTuple):
    """The physics of a task and the number of frames since the reset."""

    physics: Any
    frames: Array  # () int32


def repeat_actions(task: Task, repeat: int) -> Task:
    """Return a task whose agent steps are `repeat` frames of `task`, with summed rewards.

    As in `envs.repeat.ActionRepeat`, an agent step ends early at a frame that terminates, reaches
    the time limit or is not finite. A frame that is not finite makes the reward NaN.
    """
    limit = task.spec.time_limit

    def reset(key: Array) -> EnvState:
        first = task.reset(key)
        return EnvState(first.obs, CountedPhysics(first.physics, jnp.int32(0)))

    def step(before: EnvState, action: Array) -> tuple[EnvState, Array, Array]:
        Carry = tuple[EnvState, Array, Array, Array]

        def frame(carry: Carry, _: None) -> tuple[Carry, None]:
            state, total, _terminated, done = carry
            after, reward, terminated = task.step(
                EnvState(state.obs, state.physics.physics), action
            )
            count = state.physics.frames + 1
            is_finite = jnp.isfinite(after.obs).all() & jnp.isfinite(reward)
            updated = (
                EnvState(after.obs, CountedPhysics(after.physics, count)),
                jnp.where(is_finite, total + reward, jnp.nan),
                terminated,
                terminated | ~is_finite | (count >= limit),
            )
            return jax.tree.map(lambda old, new: jnp.where(done, old, new), carry, updated), None

        false = jnp.zeros((), bool)
        start = (before, jnp.float32(0), false, false)
        (after, total, terminated, _), _ = jax.lax.scan(frame, start, length=repeat)
        return after, total, terminated

    spec = task.spec._replace(time_limit=-(-limit // repeat))
    return Task(spec, jax.jit(reset), jax.jit(step))


def frames_between(before: EnvState, after: EnvState) -> Array | int:
    """Return the frames of the agent step between two states of an episode."""
    if isinstance(after.physics, CountedPhysics):
        return after.physics.frames - before.physics.frames
    return 1
