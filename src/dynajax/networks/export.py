"""Networks as a sequence of layers, for use without JAX."""

from typing import Any, NamedTuple

from dynajax.types import Params


class Layer(NamedTuple):
    """One layer of a sequential network.

    ===========  =================  ==================================================
    kind         arrays             output for the input x
    ===========  =================  ==================================================
    standardise  mean, scale, clip  (x - mean) / scale, clipped to [-clip, clip]
    dense        kernel, bias       x @ kernel + bias
    norm         scale, bias        LayerNorm over the last axis, epsilon 1e-6
    relu, tanh                      max(x, 0), tanh(x)
    keep                            x, which is also remembered
    add                             x + the remembered array
    ===========  =================  ==================================================
    """

    kind: str
    arrays: tuple[Any, ...] = ()


def dense(params: Params, name: str) -> Layer:
    """Return the dense layer called `name`."""
    return Layer("dense", (params[name]["kernel"], params[name]["bias"]))


def norm(params: Params, name: str) -> Layer:
    """Return the LayerNorm called `name`."""
    return Layer("norm", (params[name]["scale"], params[name]["bias"]))


RELU, TANH, KEEP, ADD = Layer("relu"), Layer("tanh"), Layer("keep"), Layer("add")
