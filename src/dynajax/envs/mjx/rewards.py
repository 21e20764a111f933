"""dm_control's `rewards.tolerance` in JAX, from which all rewards of its tasks are built."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynajax.types import Array

# Functions of the distance d that are 1 at d = 0 and `v` at d = 1. The last three become 0 at a
# finite distance.
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
    """Return 1 if x is within the bounds and less outside (dm_control's `rewards.tolerance`).

    Args:
      x: array of any shape.
      bounds: smallest and largest x with value 1, both inclusive; may be infinite.
      margin: distance from the bounds at which the value is `value_at_margin`; with 0 the value is
        0 outside the bounds.
      sigmoid: shape of the decrease outside the bounds.
      value_at_margin: in (0, 1), or 0 for linear, quadratic and cosine.

    Returns:
      Values in [0, 1], in the shape of x.
    """
    x = jnp.asarray(x)
    low, high = bounds
    inside = (low <= x) & (x <= high)
    if margin == 0:
        return jnp.where(inside, 1.0, 0.0)
    distance = jnp.where(x < low, low - x, x - high) / margin
    return jnp.where(inside, 1.0, _SIGMOIDS[sigmoid](distance, value_at_margin))
