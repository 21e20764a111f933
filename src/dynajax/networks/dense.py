"""Dense layers and LayerNorms whose gradients XLA compiles to fast programs."""

import contextlib
from typing import Any

import flax.linen as nn
import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from dynajax.xla import backend

# From this width on, transposing a kernel costs less than the product gains.
_WIDE = 64

# JAX's name for it. JAX keeps traced functions by this setting.
_BFLOAT16 = "BF16_BF16_F32"


def layer_norm(name: str) -> nn.LayerNorm:
    """Return a LayerNorm over the last axis."""
    return nn.LayerNorm(name=name, use_fast_variance=backend.lowering().fast_variance)


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
    return of_x, _contract(x, gradient, (batch, batch))


_product.defvjp(_product_forward, _product_backward)


def dot_general(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """Multiply as flax's `Dense` does, over the last axis of x and the first of the kernel."""
    return _product(x, kernel)
