"""Initial weights."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def orthogonal(gain: float) -> Callable[..., Array]:
    """Return an initializer for `gain` times a matrix with orthonormal rows or columns.

    (Saxe et al., 2014.) The matrix is the polar factor of a Gaussian matrix, which is distributed as
    the Q of a QR decomposition, by the Newton-Schulz iteration X <- (3 X - X X' X) / 2. A vmapped
    QR can deadlock on a machine with few cores, and runs one matrix after the other on a GPU.
    """

    def init(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
        x = jax.random.normal(key, (min(shape), max(shape)), dtype)
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

        def closer(_: int, x: Array) -> Array:
            return 1.5 * x - 0.5 * product(product(x, x.T), x)

        # A singular value grows by at most 3/2 an iteration, and the smallest starts near 1e-4.
        x = jax.lax.fori_loop(0, 60, closer, x / jnp.linalg.norm(x))
        return gain * (x if shape[0] <= shape[1] else x.T)

    return init


def fan_in(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Draw a kernel (X, Y) from a truncated normal of std 1 / (2 sqrt(X)) (Chua et al., 2018)."""
    return jax.random.truncated_normal(key, -2, 2, shape, dtype) / (2 * math.sqrt(shape[0]))
