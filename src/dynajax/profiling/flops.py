"""Floating-point operations of any function, counted from the matmuls that it is traced to.

A matmul of (m, k) and (k, n) counts 2 m k n, a convolution as the matmul that it is. All else, such
as activations, losses and optimisers, is left out: it is a few per cent, as a comparison with XLA's
own count shows (tests/test_flops.py). XLA counts the body of a loop once, however often it runs.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal


def count(function: Callable[..., Any], *arguments: Any, trips: int | None = None) -> int:
    """Operations of one call, without those whose results nothing reads.

    A loop whose length is known when it is traced counts as often as it runs.

    Args:
      function: jitted, or not.
      arguments: arrays, or their shapes.
      trips: how often a loop runs whose length depends on data.

    Raises:
      ValueError: there are matmuls in such a loop, and no `trips`.
    """
    # One that is jitted with options of the compiler cannot be traced inside another.
    jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
    jaxpr = jitted.trace(*arguments).jaxpr.jaxpr
    return _of_jaxpr(jaxpr, [True] * len(jaxpr.outvars), trips)


def _of_jaxpr(jaxpr: Jaxpr, read: Sequence[bool], trips: int | None) -> int:
    """`read`: which of its results are."""
    total = 0
    live = {x for x in itertools.compress(jaxpr.outvars, read) if not isinstance(x, Literal)}
    for equation in reversed(jaxpr.eqns):
        read = [variable in live for variable in equation.outvars]
        if any(read) or equation.effects:
            total += _of_equation(equation, read, trips)
            live.update(x for x in equation.invars if not isinstance(x, Literal))
    return total


def _of_equation(equation: JaxprEqn, read: Sequence[bool], trips: int | None) -> int:
    name, parameters = equation.primitive.name, equation.params
    # What a loop carries is read by its next round.
    loops = name in ("scan", "while")
    parts = [
        _of_jaxpr(jaxpr, [True] * len(jaxpr.outvars) if loops else read, trips)
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
            return parameters["length"] * sum(parts)
        case "while":
            if trips is None and any(parts):
                raise ValueError("the length of a loop depends on data: say `trips`")
            return (trips or 0) * sum(parts)
        case "cond":
            return max(parts)
        case "shard_map":
            # Its shapes are those of one device.
            return parameters["mesh"].size * sum(parts)
    return sum(parts)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _jaxprs(values: Any) -> Iterator[Jaxpr]:
    """Those among an equation's parameters, which may lie in tuples."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)
