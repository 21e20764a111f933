"""Learners of one device one after the other."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

_Function = TypeVar("_Function", bound=Callable[..., Any])


def in_turn(function: _Function) -> _Function:
    """Return a function that a `vmap` over learners calls for one learner after the other.

    A learner's weights and moments then stay in a core's cache for the whole call. The function must
    not read arrays other than its arguments, and is not differentiated.
    """
    wrapped: Any = jax.custom_batching.custom_vmap(function)

    @wrapped.def_vmap
    def one_after_the_other(size: int, mapped: Any, *arguments: Any) -> tuple[Any, Any]:
        leaves: list[Any]
        structure: Any
        leaves, structure = jax.tree.flatten(arguments)
        is_mapped = jax.tree.leaves(mapped)

        # The learner's own axis stays: XLA makes faster code of the same matmuls with it, and a
        # learner alone computes the same numbers.
        def mapped_function(*leaves: Any) -> Any:
            return function(*structure.unflatten(leaves))

        of_one = jax.vmap(mapped_function, [0 if own else None for own in is_mapped])

        def take(index: Any) -> list[Any]:
            return [
                jax.lax.dynamic_slice_in_dim(x, index, 1) if own else x
                for x, own in zip(leaves, is_mapped, strict=True)
            ]

        if size == 1:
            results = of_one(*leaves)
        else:
            results = jax.lax.map(lambda index: of_one(*take(index)), jax.numpy.arange(size))
            results = jax.tree.map(lambda x: x[:, 0], results)
        return results, jax.tree.map(lambda _: True, results)

    return wrapped
