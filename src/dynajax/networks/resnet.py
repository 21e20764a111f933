"""Residual networks with LayerNorm before each branch, as in SimBa (Lee et al., 2024)."""

import functools
from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float

from dynajax.networks import export
from dynajax.networks.dense import dot_general, layer_norm
from dynajax.networks.export import Layer
from dynajax.networks.initializers import orthogonal
from dynajax.types import Params


class ResNet(nn.Module):
    """A linear layer, blocks x + W2 relu(W1 LN(x)), a LayerNorm and a linear head.

    W1 is four times as wide as the residual stream.
    """

    width: int
    blocks: int
    outputs: int
    head_init: Callable[..., Array] = orthogonal(1.0)

    @nn.compact
    def __call__(self, x: Float[Array, "*B X"]) -> Float[Array, "*B Y"]:
        dense = functools.partial(nn.Dense, dot_general=dot_general)
        he = nn.initializers.he_normal()
        x = dense(self.width, kernel_init=orthogonal(1.0), name="embed")(x)
        for i in range(self.blocks):
            branch = layer_norm(f"norm_{i}")(x)
            branch = nn.relu(dense(4 * self.width, kernel_init=he, name=f"wide_{i}")(branch))
            x = x + dense(self.width, kernel_init=he, name=f"narrow_{i}")(branch)
        x = layer_norm("norm")(x)
        return dense(self.outputs, kernel_init=self.head_init, name="head")(x)

    def layers(self, params: Params) -> list[Layer]:
        """Return the network as layers."""
        layers = [export.dense(params, "embed")]
        for i in range(self.blocks):
            layers += [export.KEEP, export.norm(params, f"norm_{i}")]
            layers += [export.dense(params, f"wide_{i}"), export.RELU]
            layers += [export.dense(params, f"narrow_{i}"), export.ADD]
        return [*layers, export.norm(params, "norm"), export.dense(params, "head")]
