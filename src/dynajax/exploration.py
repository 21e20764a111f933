"""Exploration noise that is held for several agent steps (FlashSAC, 2026).

Independent noise averages out within a few steps; held noise is correlated in time and explores
further. When noise changes is a function of key and agent step alone, so an interrupted run resumes
with the same noise.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def held_since(key: Array, step: Int[Array, ""], longest: int) -> Int[Array, ""]:
    """Return the agent step at which the noise that is held at `step` was drawn.

    A noise is held for n steps with probability proportional to 1/n^2, n <= `longest`. A new hold
    begins every 4 `longest` steps in any case, so the holds of a block depend on its index alone.
    """
    block = 4 * longest
    times = jnp.arange(1, longest + 1)
    drawn = jax.random.categorical(
        jax.random.fold_in(key, step // block), -2 * jnp.log(times), shape=(block,)
    )
    starts = jnp.cumsum(1 + drawn) - (1 + drawn)
    within = step % block
    return step - within + jnp.where(starts <= within, starts, 0).max()
