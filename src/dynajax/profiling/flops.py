"""Count the floating-point operations of a function from the matmuls in its jaxpr.

A matmul of (m, k) and (k, n) counts 2 m k n; a convolution counts as the equivalent matmul.
Everything else, such as activations, losses and optimisers, is not counted. It is a few per cent,
as the comparison with XLA's count in tests/test_flops.py shows. XLA's count is not used because it
counts the body of a loop once, however often it runs.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal


def count(function: Callable[..., Any], *arguments: Any, trips: int | None = None) -> int:
    """Return the number of operations of one call, without those whose results are unused.

    The body of a loop of static length counts as often as the loop runs.

    Args:
      function: a function, jitted or not.
      arguments: arrays, or their shapes.
      trips: assumed trip count of loops whose length depends on data.

    Raises:
      ValueError: such a loop contains matmuls, and `trips` is not given.
    """
    # A function that is jitted with compiler options cannot be traced inside another.
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    jaxpr = jitted.trace(*arguments).jaxpr.jaxpr
    return _count_jaxpr(jaxpr, [True] * len(jaxpr.outvars), trips)


def _count_jaxpr(jaxpr: Jaxpr, used: Sequence[bool], trips: int | None) -> int:
    """Count the operations of a jaxpr, where `used` tells which of its results are used."""
    total = 0
    live = {x for x in itertools.compress(jaxpr.outvars, used) if not isinstance(x, Literal)}
    for equation in reversed(jaxpr.eqns):
        used = [variable in live for variable in equation.outvars]
        if any(used) or equation.effects:
            total += _count_equation(equation, used, trips)
            live.update(x for x in equation.invars if not isinstance(x, Literal))
    return total


def _count_equation(equation: JaxprEqn, used: Sequence[bool], trips: int | None) -> int:
    name, parameters = equation.primitive.name, equation.params
    # The carry of a loop is used by its next iteration.
    is_loop = name in ("scan", "while")
    inner = [
        _count_jaxpr(jaxpr, [True] * len(jaxpr.outvars) if is_loop else used, trips)
        for jaxpr in _jaxprs(parameters.values())
    ]
    size = math.prod(_shape(equation.outvars[0])) if equation.outvars else 0
    match name:
        case "dot_general":
            left = _shape(equation.invars[0])
            (contracted, _), _ = parameters["dimension_numbers"]
            return 2 * size * math.prod(left[axis] for axis in contracted)
        case "conv_general_dilated":
            kernel = _shape(equation.invars[1])
            outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            return 2 * size * math.prod(kernel) // outputs
        case "scan":
            return parameters["length"] * sum(inner)
        case "while":
            if trips is None and any(inner):
                raise ValueError("the length of a loop depends on data: pass `trips`")
            return (trips or 0) * sum(inner)
        case "cond":
            return max(inner)
        case "shard_map":
            # The shapes inside are those of one device.
            return parameters["mesh"].size * sum(inner)
    return sum(inner)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _jaxprs(values: Any) -> Iterator[Jaxpr]:
    """Yield the jaxprs among the parameters of an equation, also those in tuples."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)
