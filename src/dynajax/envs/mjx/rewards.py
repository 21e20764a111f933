"""dm_control's soft indicator, from which all of its rewards are made, in JAX."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynajax.types import Array

# Each falls from 1 at distance 0 to `v` at distance 1; the last three reach 0 and stay there.
_SIGMOIDS: dict[str, Callable[[Array, float], Array]] = {
    "gaussian": lambda d, v: jnp.exp(np.log(v) * d**2),
    "hyperbolic": lambda d, v: 1 / jnp.cosh(np.arccosh(1 / v) * d),
    "long_tail": lambda d, v: 1 / (1 + (1 / v - 1) * d**2),
    "reciprocal": lambda d, v: 1 / (1 + (1 / v - 1) * jnp.abs(d)),
    "tanh_squared": lambda d, v: 1 - jnp.tanh(np.arctanh(np.sqrt(1 - v)) * d) ** 2,
    "linear": lambda d, v: jnp.clip(1 - (1 - v) * d, 0),
    "quadratic": lambda d, v: jnp.clip(1 - (1 - v) * d**2, 0),
    "cosine": lambda d, v: (1 + jnp.cos(jnp.clip(np.arccos(2 * v - 1) * d, -np.pi, np.pi))) / 2,
}


def tolerance(
    x: Any,
    bounds: tuple[float, float] = (0.0, 0.0),
    margin: float = 0.0,
    sigmoid: str = "gaussian",
    value_at_margin: float = 0.1,
) -> Array:
    """1 where x is within the bounds, less outside: `rewards.tolerance` of dm_control.

    Args:
      x: any shape.
      bounds: lowest and highest x of value 1, both inclusive; may be infinite.
      margin: the distance from the bounds at which the value is `value_at_margin`; with 0 the
        value drops to 0 at once.
      sigmoid: how the value falls.
      value_at_margin: in (0, 1); 0 too for linear, quadratic and cosine.

    Returns:
      Values in [0, 1], shaped as x.
    """
    x = jnp.asarray(x)
    low, high = bounds
    inside = (low <= x) & (x <= high)
    if margin == 0:
        return jnp.where(inside, 1.0, 0.0)
    distance = jnp.where(x < low, low - x, x - high) / margin
    return jnp.where(inside, 1.0, _SIGMOIDS[sigmoid](distance, value_at_margin))
