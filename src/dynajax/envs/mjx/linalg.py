"""Cholesky's factors and solutions one matrix after the other, where MJX asks for them on a CPU.

jaxlib spreads a batch of more than 200,000 floating-point operations over XLA's worker threads and
waits for them *on* one of these threads; with as many batches under way as there are threads, every
thread waits for ever. On two cores a humanoid in a few dozen rows stops like that within seconds. A
batch of one is computed in place.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

_factor, _solve = jax.scipy.linalg.cho_factor, jax.scipy.linalg.cho_solve
# Under vmap, and under vmaps of it, one row after the other.
_factor_in_turn = jax.custom_batching.sequential_vmap(lambda matrix: _factor(matrix)[0])
_solve_in_turn = jax.custom_batching.sequential_vmap(lambda factor, b: _solve((factor, False), b))


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """MJX traced inside never asks a CPU for a batch of factors; other devices keep their own."""
    if jax.local_devices()[0].platform != "cpu":
        yield
        return
    theirs: Any = jax.scipy.linalg
    theirs.cho_factor = lambda matrix: (_factor_in_turn(matrix), False)
    theirs.cho_solve = lambda factor, b: _solve_in_turn(factor[0], b)
    try:
        yield
    finally:
        theirs.cho_factor, theirs.cho_solve = _factor, _solve
