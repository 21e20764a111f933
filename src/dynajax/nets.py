"""Networks in flax.linen."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from dynajax.types import Array, Params
from dynajax.xla import backend

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0


class Layer(NamedTuple):
    """A step of a network whose steps stand in a row, for use without JAX.

    ===========  =================  ==================================================
    kind         arrays             what x becomes
    ===========  =================  ==================================================
    standardise  mean, scale, clip  (x - mean) / scale, no farther from 0 than clip
    dense        kernel, bias       x @ kernel + bias
    norm         scale, bias        LayerNorm over the last axis, epsilon 1e-6
    relu, tanh                      max(x, 0), tanh(x)
    keep                            x, which is remembered
    add                             x + what was remembered
    ===========  =================  ==================================================
    """

    kind: str
    arrays: tuple[Any, ...] = ()


def _dense(params: Params, name: str) -> Layer:
    return Layer("dense", (params[name]["kernel"], params[name]["bias"]))


def _norm(params: Params, name: str) -> Layer:
    return Layer("norm", (params[name]["scale"], params[name]["bias"]))


_RELU, _KEEP, _ADD = Layer("relu"), Layer("keep"), Layer("add")


def _layer_norm(name: str) -> nn.LayerNorm:
    """A LayerNorm over the last axis.

    On an accelerator the mean first, and then the variance about it, which is one kernel where both
    at once are two or three; on a CPU at once, which is a tenth of an update less (BUILD_NOTES.md).
    """
    return nn.LayerNorm(name=name, use_fast_variance=backend.target_is_cpu())


# From this width of a layer on turning its kernel costs less than the product gains.
_WIDE = 64

# JAX's name for it. A setting of JAX is part of what it keeps a traced function by.
_BFLOAT16 = "BF16_BF16_F32"


def matmul_precision(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Within it the networks' products are made at a `Config.precision`.

    With "bfloat16" of arrays rounded to it, and summed in float32; with "float32" as JAX has been
    told to make those of float32 arrays.
    """
    if precision == "float32":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(_BFLOAT16)


def _contract(x: Array, y: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    """The sum of x y over `axes` of x and of y."""
    settings: Any = jax.config
    precision = None
    if settings.jax_default_matmul_precision == _BFLOAT16 and backend.target_is_cpu():
        # A CPU computes in float32 all the same, so this is what an accelerator would do.
        x, y = (jax.lax.reduce_precision(one, 8, 7) for one in (x, y))
        precision = jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, y, (axes, ((), ())), precision=precision)


def _turned(x: Array) -> Array:
    """x.T, (X, Y) -> (Y, X), written out: without a word on its layout XLA turns it in each use."""
    by_rows = Layout((0, 1))
    return with_layout_constraint(with_layout_constraint(x, by_rows).T, by_rows)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    """x @ kernel: (..., X), (X, Y) -> (..., Y).

    The gradient of the kernel comes as (X, Y). JAX's own comes as (Y, X) and turned, and Adam's
    moments, which read it with the turn fused in, take three times as long on a CPU. There an
    operand or a result is turned where XLA is slow the other way round: a kernel's gradient takes
    half the time where the kernel is taller than wide (BUILD_NOTES.md, "Speed").
    """
    return _contract(x, kernel, ((x.ndim - 1,), (0,)))


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    last, batch = x.ndim - 1, tuple(range(x.ndim - 1))
    on_cpu = backend.target_is_cpu()
    if on_cpu and min(kernel.shape) >= _WIDE:
        of_x = _contract(gradient, _turned(kernel), ((last,), (0,)))
    else:
        of_x = _contract(gradient, kernel, ((last,), (1,)))
    if on_cpu and kernel.shape[0] > kernel.shape[1]:
        return of_x, _turned(_contract(gradient, x, (batch, batch)))
    return of_x, _contract(x, gradient, (batch, batch))


_product.defvjp(_product_forward, _product_backward)


def _dot_general(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """`_product` as flax's Dense calls it: over x's last axis and the kernel's first."""
    return _product(x, kernel)


class MLP(nn.Module):
    """Hidden layers and a linear head: (..., X) -> (..., outputs)."""

    hidden: tuple[int, ...]
    outputs: int
    activation: Callable[[Array], Array]
    kernel_init: Callable[..., Array]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(nn.Dense, kernel_init=self.kernel_init, dot_general=_dot_general)
        for i, width in enumerate(self.hidden):
            x = dense(width, name=f"hidden_{i}")(x)
            if self.layer_norm:
                x = _layer_norm(f"norm_{i}")(x)
            x = self.activation(x)
        return dense(self.outputs, name="head")(x)

    def layers(self, params: Params) -> list[Layer]:
        """The same in a row; its activation must be relu."""
        assert self.activation is nn.relu
        layers = []
        for i in range(len(self.hidden)):
            layers.append(_dense(params, f"hidden_{i}"))
            layers += [_norm(params, f"norm_{i}")] if self.layer_norm else []
            layers.append(_RELU)
        return [*layers, _dense(params, "head")]


def orthogonal(gain: float) -> Callable[..., Array]:
    """An initialiser: `gain` times a random matrix whose rows or columns are orthonormal.

    (Saxe et al., 2014.) It is the polar factor of a Gaussian matrix, which is as evenly distributed
    as the Q of a QR decomposition, found by Newton's and Schulz's iteration X <- (3 X - X X' X) / 2.
    A vmapped QR waits for itself for ever where there are few cores (BUILD_NOTES.md), and takes one
    matrix after the other on a GPU.
    """

    def init(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
        x = jax.random.normal(key, (min(shape), max(shape)), dtype)
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

        def closer(_: int, x: Array) -> Array:
            return 1.5 * x - 0.5 * product(product(x, x.T), x)

        # A singular value grows by at most 3/2 an iteration, and the smallest begins near 1e-4.
        x = jax.lax.fori_loop(0, 60, closer, x / jnp.linalg.norm(x))
        return gain * (x if shape[0] <= shape[1] else x.T)

    return init


class SimBa(nn.Module):
    """Residual blocks before whose branches stands a LayerNorm: (..., X) -> (..., outputs).

    A linear layer, blocks x + W2 relu(W1 LN(x)) with W1 four times as wide, a LayerNorm, a linear
    head (Lee et al., 2024).
    """

    width: int
    blocks: int
    outputs: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(nn.Dense, dot_general=_dot_general)
        he, plain = nn.initializers.he_normal(), orthogonal(1.0)
        x = dense(self.width, kernel_init=plain, name="embed")(x)
        for i in range(self.blocks):
            branch = _layer_norm(f"norm_{i}")(x)
            branch = nn.relu(dense(4 * self.width, kernel_init=he, name=f"wide_{i}")(branch))
            x = x + dense(self.width, kernel_init=he, name=f"narrow_{i}")(branch)
        x = _layer_norm("norm")(x)
        return dense(self.outputs, kernel_init=plain, name="head")(x)

    def layers(self, params: Params) -> list[Layer]:
        """The same in a row."""
        layers = [_dense(params, "embed")]
        for i in range(self.blocks):
            layers += [_KEEP, _norm(params, f"norm_{i}"), _dense(params, f"wide_{i}"), _RELU]
            layers += [_dense(params, f"narrow_{i}"), _ADD]
        return [*layers, _norm(params, "norm"), _dense(params, "head")]


class BroNet(nn.Module):
    """Residual blocks with a LayerNorm after each layer: (..., X) -> (..., outputs).

    x = relu(LN(W x)), blocks x + LN(W2 relu(LN(W1 x))), a linear head (Nauman et al., 2024).
    """

    width: int
    blocks: int
    outputs: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(
            nn.Dense, dot_general=_dot_general, kernel_init=orthogonal(math.sqrt(2))
        )
        x = nn.relu(_layer_norm("norm")(dense(self.width, name="embed")(x)))
        for i in range(self.blocks):
            branch = dense(self.width, name=f"first_{i}")(x)
            branch = nn.relu(_layer_norm(f"first_norm_{i}")(branch))
            branch = dense(self.width, name=f"second_{i}")(branch)
            x = x + _layer_norm(f"second_norm_{i}")(branch)
        return dense(self.outputs, name="head")(x)

    def layers(self, params: Params) -> list[Layer]:
        """The same in a row."""
        layers = [_dense(params, "embed"), _norm(params, "norm"), _RELU]
        for i in range(self.blocks):
            layers += [_KEEP, _dense(params, f"first_{i}"), _norm(params, f"first_norm_{i}"), _RELU]
            layers += [_dense(params, f"second_{i}"), _norm(params, f"second_norm_{i}"), _ADD]
        return [*layers, _dense(params, "head")]


def actor(hidden: tuple[int, ...], action_dim: int) -> MLP:
    """Network whose output `policy_parameters` reads: (..., D) -> (..., 2A)."""
    return MLP(hidden, 2 * action_dim, nn.relu, orthogonal(math.sqrt(2)))


def policy_parameters(
    output: Array, low: Array | float = LOG_STD_MIN, high: Array | float = LOG_STD_MAX
) -> tuple[Array, Array]:
    """Mean and log standard deviation of the Gaussian before tanh: (..., 2A) -> (..., A) twice.

    log std = low + (high - low)/2 (1 + tanh x), so that a new policy is narrow (std e^-4 with the
    usual bounds).
    """
    mean, x = jnp.split(output, 2, -1)
    return mean, low + 0.5 * (high - low) * (1 + jnp.tanh(x))


def critic(hidden: tuple[int, ...], layer_norm: bool) -> MLP:
    """One critic: (..., D+A) -> (..., 1)."""
    return MLP(hidden, 1, nn.relu, orthogonal(math.sqrt(2)), layer_norm)


class Statistics(NamedTuple):
    """Running mean and variance of observations (Welford, 1962).

    The mean is kept from the first observation on: where a channel lies far from zero, what a late
    observation moves it by is less than float32 can add to it.
    """

    seen: Array  # () how many
    origin: Array  # (D,) the first one
    offset: Array  # (D,) of the mean from it
    squares: Array  # (D,) sum of squared deviations

    @property
    def mean(self) -> Array:
        """(D,)."""
        return self.origin + self.offset


def init_statistics(obs_dim: int) -> Statistics:
    """Of no observation."""
    return Statistics(jnp.zeros(()), *jnp.zeros((3, obs_dim)))


def update_statistics(statistics: Statistics, obs: Array, valid: Array) -> Statistics:
    """With one more observation (D,), if it is `valid` ()."""
    chex.assert_equal_shape([obs, statistics.origin])
    seen, origin = statistics.seen + 1, jnp.where(statistics.seen > 0, statistics.origin, obs)
    from_origin = obs - origin
    deviation = from_origin - statistics.offset
    offset = statistics.offset + deviation / seen
    squares = statistics.squares + deviation * (from_origin - offset)
    after = Statistics(seen, origin, offset, squares)
    return jax.tree.map(lambda new, old: jnp.where(valid, new, old), after, statistics)


def spread(statistics: Statistics) -> Array:
    """Standard deviations (D,); 1 for a channel that has not varied yet."""
    variance = statistics.squares / jnp.maximum(statistics.seen, 1.0)
    # What rounding makes of a constant is no variance.
    varies = variance > 1e-12 * (1 + jnp.square(statistics.mean))
    return jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1.0)), 1.0)


def normalize(statistics: Statistics, obs: Array, clip: Array | float) -> Array:
    """Observations (..., D) in standard deviations from the mean, no farther than `clip`.

    A channel that has not varied yet is left in its own unit.
    """
    deviation = (obs - statistics.origin) - statistics.offset
    return jnp.clip(deviation / spread(statistics), -clip, clip)


def fan_in(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """A truncated normal of std 1/(2 sqrt(fan-in)) for a kernel (X, Y) (Chua et al., 2018)."""
    return jax.random.truncated_normal(key, -2, 2, shape, dtype) / (2 * math.sqrt(shape[0]))


def member(width: int, depth: int, obs_dim: int) -> MLP:
    """One member of the ensemble: (..., D+A) -> (..., 2(D+1)), means, then log-variances.

    The fan-in of its weights is that of one member.
    """
    return MLP((width,) * depth, 2 * (obs_dim + 1), nn.swish, fan_in)


def apply(network: nn.Module, params: Params, inputs: Array) -> Array:
    """The network's output for `inputs`."""
    return cast(Array, network.apply({"params": params}, inputs))


def stacked_init(network: nn.Module, key: Array, copies: int, inputs: int) -> Params:
    """Independent parameters for `copies` of a network: leaves (copies, ...)."""
    keys = jax.random.split(key, copies)
    # One after the other: random numbers for a batch of keys take XLA twice as long to compile.
    return jax.lax.map(lambda k: network.init(k, jnp.zeros(inputs))["params"], keys)
