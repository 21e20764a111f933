"""Dense layers and LayerNorms whose gradients XLA compiles to fast programs."""

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from dynajax.xla import backend

# From these widths on, transposing a kernel, and a layer's inputs, costs less than the product gains.
_WIDE, _VERY_WIDE = 64, 128

# Added to the variance of a LayerNorm.
_EPSILON = 1e-6

# JAX's name of the precision "bfloat16", which is part of the key of its trace cache.
_BFLOAT16 = "BF16_BF16_F32"


def layer_norm(name: str) -> nn.Module:
    """Return a LayerNorm over the last axis."""
    if backend.lowering().norm_by_products:
        return LayerNorm(name=name)
    return nn.LayerNorm(name=name, epsilon=_EPSILON, use_fast_variance=False)


def matmul_precision(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which networks multiply matrices at a `Config.precision`.

    "bfloat16" rounds the operands and sums in float32; "float32" leaves JAX's default.
    """
    if precision == "float32":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(_BFLOAT16)


def _contract(x: Array, y: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    """Return the sum of x y over `axes` of x and of y."""
    settings: Any = jax.config
    precision = None
    if settings.jax_default_matmul_precision == _BFLOAT16 and backend.lowering().emulate_bfloat16:
        x, y = (jax.lax.reduce_precision(operand, 8, 7) for operand in (x, y))
        precision = jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, y, (axes, ((), ())), precision=precision)


def _transposed(x: Float[Array, "X Y"]) -> Float[Array, "Y X"]:
    """Transpose in memory: without a layout constraint XLA transposes at each use."""
    by_rows = Layout((0, 1))
    return with_layout_constraint(with_layout_constraint(x, by_rows).T, by_rows)


@jax.custom_vjp
def _product(x: Float[Array, "*B X"], kernel: Float[Array, "X Y"]) -> Float[Array, "*B Y"]:
    """Return x @ kernel, with a gradient of the kernel that is computed as (X, Y).

    JAX computes it as (Y, X) and transposes; Adam's moments, which read it with the transposition
    fused in, then take three times as long on a CPU. There an operand or a result is transposed
    where XLA is slow the other way round: the gradient of a kernel that is taller than wide takes
    half the time.
    """
    return _contract(x, kernel, ((x.ndim - 1,), (0,)))


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    last, batch = x.ndim - 1, tuple(range(x.ndim - 1))
    transpose = backend.lowering().transpose_kernels
    if transpose and min(kernel.shape) >= _WIDE:
        of_x = _contract(gradient, _transposed(kernel), ((last,), (0,)))
    else:
        of_x = _contract(gradient, kernel, ((last,), (1,)))
    if transpose and kernel.shape[0] > kernel.shape[1]:
        return of_x, _transposed(_contract(gradient, x, (batch, batch)))
    if transpose and x.ndim == 2 and min(kernel.shape) >= _VERY_WIDE:
        return of_x, _contract(_transposed(x), gradient, ((1,), (0,)))
    return of_x, _contract(x, gradient, (batch, batch))


_product.defvjp(_product_forward, _product_backward)


def dot_general(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """Multiply as flax's `Dense` does, over the last axis of x and the first of the kernel."""
    return _product(x, kernel)


class LayerNorm(nn.Module):
    """A LayerNorm (Ba et al., 2016) with the parameters of flax's, whose sums are matrix products.

    XLA divides a sum on a CPU into windows of 32, each a loop of its own, which takes longer than
    the arithmetic around it.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "*B X"]) -> Float[Array, "*B X"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return _scale_and_shift(_standardize(x), scale, bias)


def _multiply(x: Array, y: Array) -> Array:
    """Return x @ y in float32, whatever `matmul_precision` says."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _mean(x: Float[Array, "*B X"]) -> Float[Array, "*B 1"]:
    """Return the mean over the last axis."""
    width = x.shape[-1]
    return _multiply(x, jnp.full((width, 1), 1 / width, x.dtype))


def _sum_batch(x: Float[Array, "*B X"]) -> Float[Array, " X"]:
    """Return the sum over all axes but the last."""
    rows = x.reshape(-1, x.shape[-1])
    return _multiply(jnp.ones(len(rows), x.dtype), rows)


@jax.custom_vjp
def _standardize(x: Float[Array, "*B X"]) -> Float[Array, "*B X"]:
    """Return x with mean 0 and variance 1 along the last axis."""
    return _standardize_forward(x)[0]


def _standardize_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    mean = _mean(x)
    variance = jnp.maximum(_mean(jnp.square(x)) - jnp.square(mean), 0.0)
    factor = jax.lax.rsqrt(variance + _EPSILON)
    z = (x - mean) * factor
    return z, (z, factor)


def _standardize_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    z, factor = kept
    return (factor * (gradient - _mean(gradient) - z * _mean(gradient * z)),)


_standardize.defvjp(_standardize_forward, _standardize_backward)


@jax.custom_vjp
def _scale_and_shift(
    x: Float[Array, "*B X"], scale: Float[Array, " X"], bias: Float[Array, " X"]
) -> Float[Array, "*B X"]:
    """Return x * scale + bias."""
    return x * scale + bias


def _scale_and_shift_forward(
    x: Array, scale: Array, bias: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _scale_and_shift(x, scale, bias), (x, scale)


def _scale_and_shift_backward(
    kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    x, scale = kept
    return gradient * scale, _sum_batch(gradient * x), _sum_batch(gradient)


_scale_and_shift.defvjp(_scale_and_shift_forward, _scale_and_shift_backward)
