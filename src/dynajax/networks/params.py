"""Parameters of one network, and of several copies of it."""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynajax.types import Params


def apply(network: nn.Module, params: Params, inputs: Float[Array, "*B X"]) -> Array:
    """Return the output of a network."""
    return cast(Array, network.apply({"params": params}, inputs))


def init_stacked(network: nn.Module, key: Array, copies: int, inputs: int) -> Params:
    """Return independent parameters for several copies of a network, leaves (copies, ...)."""
    keys = jax.random.split(key, copies)
    # One after the other: random numbers for a batch of keys take XLA twice as long to compile.
    return jax.lax.map(lambda k: network.init(k, jnp.zeros(inputs))["params"], keys)
