"""Compute MJX's Cholesky factorizations and solves one matrix at a time on CPUs.

jaxlib spreads a batch of more than 200,000 floating-point operations over XLA's worker threads and
waits for them *on* one of these threads. If as many batches run as there are threads, every thread
waits forever. On two cores a few dozen humanoid environments deadlock in this way within seconds. A
batch of one is computed in place.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from dynajax.xla import backend

_factor, _solve = jax.scipy.linalg.cho_factor, jax.scipy.linalg.cho_solve
# Under vmap, also nested, loop over the batch instead of batching the operation.
_sequential_factor = jax.custom_batching.sequential_vmap(lambda matrix: _factor(matrix)[0])
_sequential_solve = jax.custom_batching.sequential_vmap(
    lambda factor, b: _solve((factor, False), b)
)


@contextlib.contextmanager
def sequential_cholesky() -> Iterator[None]:
    """While tracing MJX for a CPU, do not batch Cholesky; for other devices change nothing."""
    if not backend.target_is_cpu():
        yield
        return
    module: Any = jax.scipy.linalg
    module.cho_factor = lambda matrix: (_sequential_factor(matrix), False)
    module.cho_solve = lambda factor, b: _sequential_solve(factor[0], b)
    try:
        yield
    finally:
        module.cho_factor, module.cho_solve = _factor, _solve
