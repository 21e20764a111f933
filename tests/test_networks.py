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
@pytest.mark.parametrize("outputs", [3, 5, 70, 140])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5), (4, 65), (4, 130)])
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


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("shape", [(50,), (4, 50), (2, 4, 70)])
def test_layer_norm_and_its_gradients_equal_the_formula(shape, platform):
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    x, weights = jax.random.normal(keys[0], shape) + 3, jax.random.normal(keys[1], shape)
    variables = {
        "scale": 1 + 0.1 * jax.random.normal(keys[2], shape[-1:]),
        "bias": jax.random.normal(keys[3], shape[-1:]),
    }

    def formula(parameters, x):
        z = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return z * parameters["scale"] + parameters["bias"]

    def value_and_gradients(function):
        def weighted_sum(parameters, x):
            return (weights * function(parameters, x)).sum()

        return function(variables, x), jax.grad(weighted_sum, (0, 1))(variables, x)

    with backend.compiling_for(platform):
        norm = dense.layer_norm("norm")
        initial = norm.init(keys[0], x)["params"]
        results = [
            value_and_gradients(lambda p, x: norm.apply({"params": p}, x)),
            value_and_gradients(formula),
        ]
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, variables)
    assert (initial["scale"] == 1).all() and (initial["bias"] == 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


@pytest.mark.parametrize(("platform", "sums"), [("cpu", 0), ("gpu", 2)])
def test_layer_norm_sums_by_products_on_a_cpu(platform, sums):
    x = jnp.zeros((4, 50))
    with backend.compiling_for(platform), dense.matmul_precision("bfloat16"):
        norm = dense.layer_norm("norm")
        variables = norm.init(jax.random.PRNGKey(1), x)
        found = list(equations(jax.make_jaxpr(norm.apply)(variables, x).jaxpr))
    assert sum(e.primitive.name == "reduce_sum" for e in found) == sums
    # Whatever the precision of the networks' own products is.
    products = [e for e in found if e.primitive.name == "dot_general"]
    assert len(products) == 2 - sums
    assert all("HIGHEST" in str(e.params["precision"]) for e in products)


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
