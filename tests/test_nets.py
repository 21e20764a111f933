"""The product that all layers share, and its gradient, beside JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import nets


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5)])
def test_value_and_gradients_are_those_of_a_product(shape):
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    x, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (5, 3))
    weights = jax.random.normal(keys[2], (*shape[:-1], 3))

    def value_and_gradients(product):
        return jax.value_and_grad(lambda *both: (weights * product(*both)).sum(), (0, 1))(x, kernel)

    ours, theirs = map(value_and_gradients, (nets._product, jnp.matmul))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_the_gradient_of_a_kernel_is_not_turned():
    network = nets.critic((8, 8), layer_norm=False)
    params = network.init(jax.random.PRNGKey(0), jnp.zeros(4))["params"]

    def loss(params, x):
        return nets.apply(network, params, x).sum()

    program = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((6, 4))).as_text()
    assert "stablehlo.dot_general" in program
    assert "stablehlo.transpose" not in program
