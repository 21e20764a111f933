"""Barriers against unwanted fusion."""

from typing import TypeVar

import jax

_Tree = TypeVar("_Tree")


def materialize(tree: _Tree) -> _Tree:
    """Compute a tree of arrays before anything that reads it.

    Without the barrier XLA sinks the gathers of minibatches into the update loop and copies both
    replay buffers for it.
    """
    return jax.lax.optimization_barrier(tree)
