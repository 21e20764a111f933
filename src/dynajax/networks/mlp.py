"""Multilayer perceptrons."""

import functools
from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float

from dynajax.networks import export
from dynajax.networks.dense import dot_general, layer_norm
from dynajax.networks.export import Layer
from dynajax.types import Params


class MLP(nn.Module):
    """Hidden layers and a linear head."""

    hidden: tuple[int, ...]
    outputs: int
    activation: Callable[[Array], Array]
    kernel_init: Callable[..., Array]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B X"]) -> Float[Array, "*B Y"]:
        dense = functools.partial(nn.Dense, kernel_init=self.kernel_init, dot_general=dot_general)
        for i, width in enumerate(self.hidden):
            x = dense(width, name=f"hidden_{i}")(x)
            if self.layer_norm:
                x = layer_norm(f"norm_{i}")(x)
            x = self.activation(x)
        return dense(self.outputs, name="head")(x)

    def layers(self, params: Params) -> list[Layer]:
        """Return the network as layers; its activation must be relu."""
        assert self.activation is nn.relu
        layers = []
        for i in range(len(self.hidden)):
            layers.append(export.dense(params, f"hidden_{i}"))
            layers += [export.norm(params, f"norm_{i}")] if self.layer_norm else []
            layers.append(export.RELU)
        return [*layers, export.dense(params, "head")]
