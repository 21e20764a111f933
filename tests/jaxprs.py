"""Iterate over the equations of a traced program."""

from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield every equation of a jaxpr and of the jaxprs in it."""
    for equation in jaxpr.eqns:
        yield equation
        values = list(equation.params.values())
        for inner in jax.tree.leaves(values, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
