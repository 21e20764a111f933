"""Test functions that learners of one device call one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax.runtime.program import build
from dynajax.xla.in_turn import in_turn


def combine(scale, pair, offset):
    """Return two arrays from a scalar, a pair that may have no second part, and an array."""
    first, second = pair
    total = scale * (first @ first.T) + offset
    return {"total": total, "second": None if second is None else second + 1}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("has_second", [True, False])
def test_in_turn_returns_what_vmap_does(size, has_second):
    rng = np.random.default_rng(0)
    first = jnp.asarray(rng.normal(size=(size, 4, 5)), jnp.float32)
    pair = (first, jnp.arange(size) if has_second else None)
    arguments = (jnp.arange(1.0, size + 1), pair, jnp.ones((4, 4)))
    axes = (0, 0, None)
    expected = jax.vmap(combine, axes)(*arguments)
    found = jax.jit(jax.vmap(in_turn(combine), axes))(*arguments)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_in_turn_without_learners_calls_the_function():
    pair = (jnp.ones((2, 2)), None)
    assert in_turn(combine)(2.0, pair, 1.0)["total"].tolist() == [[5, 5], [5, 5]]


def test_fit_trains_one_learner_after_the_other(make, spec):
    """No matmul of a gradient step has the axis of several learners."""
    program = build(make(seeds=3), spec, jax.local_devices()[:1])
    text = program.fit.lower(program.shapes()).as_text()
    batch, width = program.config.model.batch, program.config.model.width
    assert f"tensor<1x{batch}x{width}xf32>" in text
    assert f"tensor<3x{batch}x{width}xf32>" not in text
