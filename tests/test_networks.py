"""Test the matmul of all dense layers and its gradients, and LayerNorm, on each platform."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax.networks import dense, params
from dynajax.networks.initializers import orthogonal
from dynajax.networks.mlp import MLP
from dynajax.xla import backend
from jaxprs import equations


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("outputs", [3, 5, 70])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5), (4, 65)])
def test_value_and_gradients_equal_those_of_matmul(shape, outputs, platform):
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    x, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (shape[-1], outputs))
    weights = jax.random.normal(keys[2], (*shape[:-1], outputs))

    def value_and_gradients(product):
        def weighted_sum(x, kernel):
            return (weights * product(x, kernel)).sum()

        return jax.value_and_grad(weighted_sum, (0, 1))(x, kernel)

    with backend.compiling_for(platform):
        results = map(value_and_gradients, (dense._product, jnp.matmul))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


@pytest.mark.parametrize(("platform", "transposes"), [("cpu", 2), ("gpu", 0)])
def test_transposes_are_explicit(platform, transposes):
    """On a CPU the gradient of the head, (64, 1), and the kernel of the second hidden layer."""
    network = MLP((64, 64), 1, nn.relu, orthogonal(1.0))
    initial = network.init(jax.random.PRNGKey(0), jnp.zeros(4))["params"]

    def loss(parameters, x):
        return params.apply(network, parameters, x).sum()

    with backend.compiling_for(platform):
        program = jax.jit(jax.grad(loss)).lower(initial, jnp.zeros((6, 4))).as_text()
    assert "stablehlo.dot_general" in program
    assert program.count("stablehlo.transpose") == transposes
    assert program.count("@LayoutConstraint") == 2 * transposes


@pytest.mark.parametrize(("platform", "passes"), [("cpu", 1), ("gpu", 2)])
def test_layer_norm_computes_its_variance_in_one_or_two_passes(platform, passes):
    x = jax.random.normal(jax.random.PRNGKey(0), (4, 50)) + 3

    with backend.compiling_for(platform):
        norm = dense.layer_norm("norm")
        variables = norm.init(jax.random.PRNGKey(1), x)
        y, program = norm.apply(variables, x), jax.make_jaxpr(norm.apply)(variables, x)
    x64 = np.asarray(x, np.float64)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    # One pass squares x itself, two passes square the difference from the mean.
    squares = [e for e in equations(program.jaxpr) if e.primitive.name in ("square", "mul")]
    assert any(e.invars[0] is program.jaxpr.invars[-1] for e in squares) == (passes == 1)


def test_bfloat16_rounds_operands_and_sums_in_float32():
    def rounded(x):
        return jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)

    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    x, kernel = jax.random.normal(keys[0], (4, 500)), jax.random.normal(keys[1], (500, 3))
    weights = rounded(jax.random.normal(keys[2], (4, 3)))

    @jax.jit
    def value_and_gradients(x, kernel):
        return dense._product(x, kernel), *jax.vjp(dense._product, x, kernel)[1](weights)

    plain = value_and_gradients(x, kernel)
    with dense.matmul_precision("bfloat16"):
        low = value_and_gradients(x, kernel)
    with dense.matmul_precision("float32"):
        again = value_and_gradients(x, kernel)
    expected = value_and_gradients(rounded(x), rounded(kernel))
    for a, b, c, d in zip(plain, low, again, expected, strict=True):
        np.testing.assert_array_equal(a, c)
        assert b.dtype == jnp.float32
        np.testing.assert_allclose(b, d, rtol=1e-5, atol=1e-4)
        assert np.abs(a - b).max() > 1e-3
