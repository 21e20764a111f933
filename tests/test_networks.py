"""The product that all layers share, and its gradient, beside JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import nets
from dynajax.xla import backend
from jaxprs import equations


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("outputs", [3, 5, 70])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5), (4, 65)])
def test_value_and_gradients_are_those_of_a_product(shape, outputs, platform):
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    x, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (shape[-1], outputs))
    weights = jax.random.normal(keys[2], (*shape[:-1], outputs))

    def value_and_gradients(product):
        def of_both(x, kernel):
            return (weights * product(x, kernel)).sum()

        return jax.value_and_grad(of_both, (0, 1))(x, kernel)

    with backend.compiling_for(platform):
        ours, theirs = map(value_and_gradients, (nets._product, jnp.matmul))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


@pytest.mark.parametrize(("platform", "turned"), [("cpu", 2), ("gpu", 0)])
def test_what_is_turned_is_written_out(platform, turned):
    """On a CPU the head's gradient, (64, 1), and the second hidden layer's kernel."""
    network = nets.critic((64, 64), layer_norm=False)
    params = network.init(jax.random.PRNGKey(0), jnp.zeros(4))["params"]

    def loss(params, x):
        return nets.apply(network, params, x).sum()

    with backend.compiling_for(platform):
        program = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((6, 4))).as_text()
    assert "stablehlo.dot_general" in program
    assert program.count("stablehlo.transpose") == turned
    assert program.count("@LayoutConstraint") == 2 * turned


@pytest.mark.parametrize(("platform", "passes"), [("cpu", 1), ("gpu", 2)])
def test_a_layer_norm_on_either_kind_of_device(platform, passes):
    x = jax.random.normal(jax.random.PRNGKey(0), (4, 50)) + 3

    with backend.compiling_for(platform):
        norm = nets._layer_norm("norm")
        variables = norm.init(jax.random.PRNGKey(1), x)
        y, program = norm.apply(variables, x), jax.make_jaxpr(norm.apply)(variables, x)
    x64 = np.asarray(x, np.float64)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    # The square of a difference where the variance follows the mean, else that of x itself.
    squares = [e for e in equations(program.jaxpr) if e.primitive.name in ("square", "mul")]
    assert any(e.invars[0] is program.jaxpr.invars[-1] for e in squares) == (passes == 1)


def test_at_bfloat16_values_and_gradients_are_of_rounded_arrays_and_sums_of_float32():
    def rounded(x):
        return jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)

    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    x, kernel = jax.random.normal(keys[0], (4, 500)), jax.random.normal(keys[1], (500, 3))
    weights = rounded(jax.random.normal(keys[2], (4, 3)))

    @jax.jit
    def value_and_gradients(x, kernel):
        return nets._product(x, kernel), *jax.vjp(nets._product, x, kernel)[1](weights)

    plain = value_and_gradients(x, kernel)
    with nets.matmul_precision("bfloat16"):
        low = value_and_gradients(x, kernel)
    with nets.matmul_precision("float32"):
        again = value_and_gradients(x, kernel)
    expected = value_and_gradients(rounded(x), rounded(kernel))
    for a, b, c, d in zip(plain, low, again, expected, strict=True):
        np.testing.assert_array_equal(a, c)
        assert b.dtype == jnp.float32
        np.testing.assert_allclose(b, d, rtol=1e-5, atol=1e-4)
        assert np.abs(a - b).max() > 1e-3
