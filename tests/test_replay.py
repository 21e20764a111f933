"""The ring of transitions: what is written where, and that draws are even."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dynajax import replay
from dynajax.types import Transition
from dynajax.xla import backend

N = 100
draw = jax.jit(replay.draw, static_argnums=3)


def block(numbers):
    """One transition for each number, which stands in all of its fields."""
    x = jnp.asarray(numbers, jnp.float32)
    return Transition(x[:, None] + jnp.zeros(2), x[:, None], x, x, x[:, None] + jnp.ones(2))


def add(ring, numbers, valid, count, weight=None):
    return replay.add(ring, replay.pack(block(numbers), valid, weight), jnp.array(count))


def ring_of(valid):
    return dataclasses.replace(replay.init(N, 2, 1), valid=jnp.asarray(valid))


def test_new_blocks_overwrite_the_oldest():
    ring = replay.init(6, 2, 1)
    for first in range(0, 10, 2):
        ring = add(ring, [first, first + 1], jnp.ones(2, bool), first)
    np.testing.assert_array_equal(ring.data.reward, [6, 7, 8, 9, 4, 5])
    taken = replay.take(ring, jnp.array([[3, 4]])).data
    np.testing.assert_array_equal(taken.reward, [[9, 4]])
    np.testing.assert_array_equal(taken.next_obs, [[[10, 10], [5, 5]]])
    np.testing.assert_array_equal(taken.action, [[[9], [4]]])


@pytest.mark.parametrize(("obs_dim", "action_dim"), [(17, 6), (3, 1), (7, 8), (67, 21)])
def test_a_transition_comes_back_from_whole_tiles(obs_dim, action_dim):
    size = replay.columns(obs_dim, action_dim)
    assert size % 8 == 0 and 0 <= size - (2 * obs_dim + action_dim + 2) < 8
    draws = np.random.default_rng(0).normal(size=(5, 2 * obs_dim + action_dim + 2))
    ends = np.cumsum([obs_dim, action_dim, 1, 1])
    obs, action, reward, discount, next_obs = np.split(draws.astype(np.float32), ends, 1)
    stored = Transition(obs, action, reward[:, 0], discount[:, 0], next_obs)
    ring = replay.add(
        replay.init(10, obs_dim, action_dim), replay.pack(stored, np.ones(5, bool)), jnp.array(5)
    )
    assert ring.packed.shape == (10, size)
    jax.tree.map(np.testing.assert_array_equal, replay.take(ring, jnp.arange(5, 10)).data, stored)


def test_valid_flags_follow_their_slots():
    ring = replay.init(4, 2, 1)
    assert not ring.valid.any()
    ring = add(ring, [0, 1], jnp.array([True, False]), 0)
    np.testing.assert_array_equal(ring.valid, [True, False, False, False])
    ring = add(ring, [2, 3], jnp.array([False, True]), 2)
    ring = add(ring, [4, 5], jnp.array([False, True]), 4)
    np.testing.assert_array_equal(ring.valid, [False, True, False, True])


def test_weights_follow_their_slots_where_there_is_a_column():
    ring = replay.init(4, 2, 1, uses_weights=True)
    for first in (0, 2, 4):
        weight = jnp.array([0.25, 0.5]) + first
        ring = add(ring, [0, 1], jnp.ones(2, bool), first, weight)
    np.testing.assert_array_equal(ring.weight, [4.25, 4.5, 2.25, 2.5])
    assert replay.init(4, 2, 1).weight is None


@pytest.mark.parametrize("filled", [80, 100, 250])
@pytest.mark.parametrize("holes", [0.0, 0.2, 0.9])
def test_draws_are_even_among_valid_slots(holes, filled):
    size = min(filled, N)
    valid = np.zeros(N, bool)
    valid[:size] = np.random.default_rng(3).permutation(size) >= holes * size
    # Slots beyond the filled part look valid, and must not be drawn for all that.
    marked = valid | (np.arange(N) >= size)
    slots = draw(jax.random.PRNGKey(1), ring_of(marked), jnp.array(filled), (200, 100))
    counts = np.bincount(np.ravel(slots), minlength=N)
    assert counts[~valid].sum() == 0
    assert stats.chisquare(counts[valid]).pvalue > 1e-3


def test_neighbouring_draws_are_independent():
    valid = np.arange(N) % 2 == 0
    slots = np.asarray(draw(jax.random.PRNGKey(2), ring_of(valid), jnp.array(N), (20000, 2)))
    table = np.histogram2d(*slots.T, bins=(5, 5))[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("size", [1, 31, 33, 1000, 5000])
def test_several_are_drawn_at_once_as_each_alone(size, platform):
    """By the definition of a draw: the valid slot of a rank, words being counted in their order."""
    valid = np.random.default_rng(size).random(size) < 0.7
    valid[0] = True
    width = int(np.ceil(np.sqrt(np.ceil(size / 32))))
    in_order = sorted(np.flatnonzero(valid), key=lambda i: (i % width**2, i // width**2))
    wanted = [(jax.random.PRNGKey(i), shape) for i, shape in enumerate([(3, 50), (7,), (2, 0)])]
    ring = dataclasses.replace(replay.init(size, 2, 1), valid=jnp.asarray(valid))
    with backend.compiling_for(platform):
        slots = replay.sample_indices(ring, jnp.array(size), *wanted)
    for (key, shape), of_it in zip(wanted, slots, strict=True):
        first, _ = jax.random.split(key)
        rank = jax.random.randint(first, shape, 0, len(in_order))
        np.testing.assert_array_equal(
            of_it, np.array(in_order)[rank] if valid.sum() < size else rank
        )


def test_rows_are_written_as_each_alone():
    rings = [add(replay.init(6, 2, 1), [i, i], jnp.ones(2, bool), 0) for i in (1, 2)]
    blocks = [replay.pack(block([i, i + 1]), jnp.array([True, i > 3])) for i in (3, 4)]
    at = jnp.array(8)
    stacked = [jax.tree.map(lambda *x: jnp.stack(x), *rows) for rows in (rings, blocks)]
    both = jax.jit(jax.vmap(replay.add, (0, 0, None)))(*stacked, at)
    for row, (ring, new) in enumerate(zip(rings, blocks, strict=True)):
        alone = replay.add(ring, new, at)
        jax.tree.map(lambda x, y, row=row: np.testing.assert_array_equal(x[row], y), both, alone)


def test_drawing_stops_where_nothing_is_valid():
    slots = draw(jax.random.PRNGKey(0), ring_of(np.zeros(N, bool)), jnp.array(7), (5,))
    assert ((slots >= 0) & (slots < 7)).all()


def test_mapped_draw_equals_each_row_alone():
    rng = np.random.default_rng(0)
    # Rows that need very different numbers of redraws.
    rings = ring_of(rng.random((4, N)) < np.array([[1.0], [0.8], [0.3], [0.05]]))
    rings = dataclasses.replace(rings, packed=jnp.stack([rings.packed] * 4))
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    draw_all = jax.jit(jax.vmap(lambda key, ring: replay.draw(key, ring, jnp.array(N), (6, 5))))
    mapped = draw_all(keys, rings)
    for i in range(4):
        alone = draw(keys[i], jax.tree.map(lambda x, i=i: x[i], rings), jnp.array(N), (6, 5))
        np.testing.assert_array_equal(mapped[i], alone)
