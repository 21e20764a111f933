"""Test the times for which exploration noise is held, and that actions use them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import exploration, make_config
from dynajax.envs import spec
from dynajax.mbpo import MBPO


def test_times_are_drawn_with_probabilities_one_over_their_square():
    longest, blocks = 4, 4000
    held = jax.jit(jax.vmap(functools.partial(exploration.held_since, longest=longest), (None, 0)))
    since = np.asarray(held(jax.random.PRNGKey(0), jnp.arange(4 * longest * blocks)))
    steps = np.arange(since.size)
    assert (since <= steps).all() and (steps - since < longest).all()
    assert (np.diff(since) >= 0).all(), "a noise is not taken up again"
    # The first time of each block is not cut off by the block's end.
    table = since.reshape(blocks, -1)
    times = (table == table[:, :1]).sum(1)
    expected = 1 / np.arange(1, longest + 1) ** 2
    found = np.bincount(times, minlength=longest + 1)[1:] / blocks
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.03)


def test_policy_keeps_its_noise_while_it_is_held():
    def actions(longest):
        config = make_config(
            "pendulum-swingup",
            algo="model-free",
            settings={"learn.hold_noise": longest, "random_steps": 10},
        )
        algorithm = MBPO(config, spec("pendulum-swingup"))
        learner = algorithm.init(config, jnp.array(0), jnp.array(3))
        act = jax.jit(jax.vmap(algorithm.act, (None, None, 0)))
        return np.asarray(act(learner, jnp.ones(3), jnp.arange(300)))[:, 0]

    free, held = actions(1), actions(16)
    np.testing.assert_array_equal(free[:10], held[:10], "random actions are not held")
    assert len(np.unique(free)) == 300
    changes = np.flatnonzero(np.diff(held[10:])) + 1
    assert 80 < len(changes) < 220
    assert set(held[64:]) <= set(free), "a held action is one that its first step would take"
