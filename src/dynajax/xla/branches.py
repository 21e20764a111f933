"""Branches that do not copy what goes through them."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import Array, Bool

_Carry = TypeVar("_Carry")


def apply_if(
    condition: Bool[Array, ""], change: Callable[[_Carry], _Carry], carry: _Carry
) -> _Carry:
    """Return `change(carry)` if the condition holds, which must be the same for all learners.

    This is a loop of zero or one iterations: XLA updates the carry of a loop in place, but copies
    whatever goes through a branch, such as replay buffers.
    """
    return jax.lax.fori_loop(0, condition.astype("int32"), lambda _, carry: change(carry), carry)
