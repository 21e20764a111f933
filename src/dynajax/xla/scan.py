"""A scan that averages its metrics."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dynajax.types import Metrics

_Carry = TypeVar("_Carry")


def scan_mean(
    function: Callable[[_Carry, Any], tuple[_Carry, Metrics]], carry: _Carry, inputs: Any
) -> tuple[_Carry, Metrics]:
    """Scan `function` over `inputs` and return the last carry and the means of its metrics.

    The metrics of an iteration are stacked, because each of them alone is a kernel of a GPU.
    """
    names: list[str] = []

    def body(carry: _Carry, x: Any) -> tuple[_Carry, jax.Array]:
        carry, metrics = function(carry, x)
        names[:] = metrics
        return carry, jnp.stack(list(metrics.values()))

    carry, values = jax.lax.scan(body, carry, inputs)
    return carry, dict(zip(names, values.mean(0), strict=True))
