"""Positions of bodies, one level of the tree after the other.

MJX unrolls a kinematic chain, and XLA fuses each link's position with all that follows from it,
which computes it again for each. On a CPU swimmer6 took 100 times as long as it needs, and
swimmer15 did not compile in 14 GB (BUILD_NOTES.md).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from mujoco.mjx._src import scan


@contextlib.contextmanager
def by_levels() -> Iterator[None]:
    """XLA keeps what MJX traces inside for one level of bodies apart from the next."""
    theirs = scan.body_tree

    def body_tree(model: Any, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        # Others of its functions are sums along the tree, which lose by it.
        if function.__qualname__.startswith("kinematics."):
            return theirs(
                model,
                lambda *level: jax.lax.optimization_barrier(function(*level)),
                *arguments,
                **options,
            )
        return theirs(model, function, *arguments, **options)

    scan.body_tree = body_tree
    try:
        yield
    finally:
        scan.body_tree = theirs
