"""Action repeat on the device: a decision lasts several simulator steps and sums their rewards."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dynajax.envs.mjx import EnvState, Task
from dynajax.types import Array


class Counted(NamedTuple):
    """The physics of a task, and the age of its episode."""

    physics: Any
    frames: Array  # () int32


def repeat(task: Task, frames: int) -> Task:
    """A task whose steps are decisions of so many frames.

    A frame that terminates, reaches the task's time limit or is not finite is the last of its
    decision, and one that is not finite makes the decision's reward NaN: as `envs.repeat.Repeat`.
    """
    limit = task.spec.time_limit

    def reset(key: Array) -> EnvState:
        first = task.reset(key)
        return EnvState(first.obs, Counted(first.physics, jnp.int32(0)))

    def step(before: EnvState, action: Array) -> tuple[EnvState, Array, Array]:
        Carry = tuple[EnvState, Array, Array, Array]

        def frame(carry: Carry, _: None) -> tuple[Carry, None]:
            state, total, _terminated, over = carry
            after, reward, ends = task.step(EnvState(state.obs, state.physics.physics), action)
            count = state.physics.frames + 1
            finite = jnp.isfinite(after.obs).all() & jnp.isfinite(reward)
            taken = (
                EnvState(after.obs, Counted(after.physics, count)),
                jnp.where(finite, total + reward, jnp.nan),
                ends,
                ends | ~finite | (count >= limit),
            )
            return jax.tree.map(lambda old, new: jnp.where(over, old, new), carry, taken), None

        no = jnp.zeros((), bool)
        start = (before, jnp.float32(0), no, no)
        (after, total, terminated, _), _ = jax.lax.scan(frame, start, length=frames)
        return after, total, terminated

    spec = task.spec._replace(time_limit=-(-limit // frames))
    return Task(spec, jax.jit(reset), jax.jit(step))
