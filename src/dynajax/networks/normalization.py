"""Running statistics of observations (Welford, 1962)."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

#: A standard deviation below this share of the values' root mean square, 8 units in the last place
#: of float32, is rounding.
RESOLUTION = 8 * 2.0**-23
#: A standard deviation below this is rounding too: float64 simulators leave errors of this size in
#: a dimension that should stay at zero. So the smallest unit in which tasks vary is about 1e-12.
SMALLEST_STD = 1e-15


class Statistics(NamedTuple):
    """Running mean and variance of observations.

    The mean is kept relative to the first observation: for a dimension far from zero, a late
    observation moves the mean by less than float32 can add to it.
    """

    num_obs: Float[Array, ""]
    origin: Float[Array, " D"]  # the first observation
    offset: Float[Array, " D"]  # of the mean from the origin
    squares: Float[Array, " D"]  # sum of squared deviations

    @property
    def mean(self) -> Float[Array, " D"]:
        """The mean observation."""
        return self.origin + self.offset


def init(obs_dim: int) -> Statistics:
    """Return the statistics of no observation."""
    return Statistics(jnp.zeros(()), *jnp.zeros((3, obs_dim)))


def update(statistics: Statistics, obs: Float[Array, " D"], valid: Bool[Array, ""]) -> Statistics:
    """Add an observation if it is valid."""
    chex.assert_equal_shape([obs, statistics.origin])
    num_obs = statistics.num_obs + 1
    origin = jnp.where(statistics.num_obs > 0, statistics.origin, obs)
    from_origin = obs - origin
    deviation = from_origin - statistics.offset
    offset = statistics.offset + deviation / num_obs
    squares = statistics.squares + deviation * (from_origin - offset)
    updated = Statistics(num_obs, origin, offset, squares)
    return jax.tree.map(lambda new, old: jnp.where(valid, new, old), updated, statistics)


def std(statistics: Statistics) -> Float[Array, " D"]:
    """Return standard deviations; 1 for a dimension that has not varied yet."""
    variance = statistics.squares / jnp.maximum(statistics.num_obs, 1.0)
    # The rounding errors of a constant are no variance.
    varies = variance > jnp.square(RESOLUTION * statistics.mean) + SMALLEST_STD**2
    return jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1.0)), 1.0)


def normalize(
    statistics: Statistics, obs: Float[Array, "*B D"], clip: Array | float
) -> Float[Array, "*B D"]:
    """Return observations in standard deviations from the mean, clipped to [-clip, clip].

    A dimension that has not varied yet keeps its own unit.
    """
    deviation = (obs - statistics.origin) - statistics.offset
    return jnp.clip(deviation / std(statistics), -clip, clip)
