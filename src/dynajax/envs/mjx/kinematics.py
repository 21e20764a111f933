"""Compute the positions of bodies level by level of the kinematic tree.

MJX unrolls a kinematic chain, and XLA fuses the position of each link into everything that depends
on it and so recomputes it many times. On a CPU, swimmer6 was 100 times slower than necessary and
compiling swimmer15 needed more than 14 GB.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from mujoco.mjx._src import scan


@contextlib.contextmanager
def barriers_between_levels() -> Iterator[None]:
    """While tracing MJX, insert barriers so that XLA does not fuse across levels of bodies."""
    original = scan.body_tree

    def body_tree(model: Any, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        # MJX's other functions are sums along the tree, which barriers make slower.
        if function.__qualname__.startswith("kinematics."):
            return original(
                model,
                lambda *level: jax.lax.optimization_barrier(function(*level)),
                *arguments,
                **options,
            )
        return original(model, function, *arguments, **options)

    scan.body_tree = body_tree
    try:
        yield
    finally:
        scan.body_tree = original
