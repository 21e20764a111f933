"""Test the replay buffer: where transitions are written, and that sampling is uniform."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dynajax import replay
from dynajax.types import Transition
from dynajax.xla import backend

N = 100


@functools.partial(jax.jit, static_argnames=("shape", "window"))
def sample(key, buffer, count, shape, window=0):
    """Return slots for a single request."""
    request = replay.Request(key, shape)
    (slots,) = replay.sample_indices(buffer, count, [request], window=window)
    return slots


def transitions(numbers):
    """Return one transition for each number, whose fields all contain the number."""
    x = jnp.asarray(numbers, jnp.float32)
    return Transition(x[:, None] + jnp.zeros(2), x[:, None], x, x, x[:, None] + jnp.ones(2))


def insert(buffer, numbers, valid, count, weight=None):
    return replay.insert(buffer, replay.pack(transitions(numbers), valid, weight), jnp.array(count))


def buffer_with(valid):
    return dataclasses.replace(replay.init(N, 2, 1), valid=jnp.asarray(valid))


def test_new_blocks_overwrite_the_oldest():
    buffer = replay.init(6, 2, 1)
    for first in range(0, 10, 2):
        buffer = insert(buffer, [first, first + 1], jnp.ones(2, bool), first)
    np.testing.assert_array_equal(buffer.unpack().reward, [6, 7, 8, 9, 4, 5])
    gathered = replay.gather(buffer, jnp.array([[3, 4]])).unpack()
    np.testing.assert_array_equal(gathered.reward, [[9, 4]])
    np.testing.assert_array_equal(gathered.next_obs, [[[10, 10], [5, 5]]])
    np.testing.assert_array_equal(gathered.action, [[[9], [4]]])


@pytest.mark.parametrize(("obs_dim", "action_dim"), [(17, 6), (3, 1), (7, 8), (67, 21)])
def test_packed_transitions_are_whole_tiles_and_unpack_unchanged(obs_dim, action_dim):
    size = replay.packed_size(obs_dim, action_dim)
    assert size % 8 == 0 and 0 <= size - (2 * obs_dim + action_dim + 2) < 8
    numbers = np.random.default_rng(0).normal(size=(5, 2 * obs_dim + action_dim + 2))
    ends = np.cumsum([obs_dim, action_dim, 1, 1])
    obs, action, reward, discount, next_obs = np.split(numbers.astype(np.float32), ends, 1)
    stored = Transition(obs, action, reward[:, 0], discount[:, 0], next_obs)
    buffer = replay.insert(
        replay.init(10, obs_dim, action_dim), replay.pack(stored, np.ones(5, bool)), jnp.array(5)
    )
    assert buffer.packed.shape == (10, size)
    jax.tree.map(
        np.testing.assert_array_equal, replay.gather(buffer, jnp.arange(5, 10)).unpack(), stored
    )


def test_valid_flags_are_written_with_their_transitions():
    buffer = replay.init(4, 2, 1)
    assert not buffer.valid.any()
    buffer = insert(buffer, [0, 1], jnp.array([True, False]), 0)
    np.testing.assert_array_equal(buffer.valid, [True, False, False, False])
    buffer = insert(buffer, [2, 3], jnp.array([False, True]), 2)
    buffer = insert(buffer, [4, 5], jnp.array([False, True]), 4)
    np.testing.assert_array_equal(buffer.valid, [False, True, False, True])


def test_weights_are_written_with_their_transitions():
    buffer = replay.init(4, 2, 1, weighted=True)
    for first in (0, 2, 4):
        weight = jnp.array([0.25, 0.5]) + first
        buffer = insert(buffer, [0, 1], jnp.ones(2, bool), first, weight)
    np.testing.assert_array_equal(buffer.weight, [4.25, 4.5, 2.25, 2.5])
    assert replay.init(4, 2, 1).weight is None


@pytest.mark.parametrize("filled", [80, 100, 250])
@pytest.mark.parametrize("invalid", [0.0, 0.2, 0.9])
def test_sampling_is_uniform_among_valid_slots(invalid, filled):
    size = min(filled, N)
    valid = np.zeros(N, bool)
    valid[:size] = np.random.default_rng(3).permutation(size) >= invalid * size
    # Slots beyond the filled part are flagged as valid, but must not be sampled.
    marked = valid | (np.arange(N) >= size)
    slots = sample(jax.random.PRNGKey(1), buffer_with(marked), jnp.array(filled), (200, 100))
    counts = np.bincount(np.ravel(slots), minlength=N)
    assert counts[~valid].sum() == 0
    assert stats.chisquare(counts[valid]).pvalue > 1e-3


def test_samples_are_independent():
    valid = np.arange(N) % 2 == 0
    slots = np.asarray(sample(jax.random.PRNGKey(2), buffer_with(valid), jnp.array(N), (20000, 2)))
    table = np.histogram2d(*slots.T, bins=(5, 5))[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("size", [1, 31, 33, 1000, 5000])
def test_several_requests_equal_each_alone(size, platform):
    """By definition: the valid slot of each rank, counted word by word."""
    valid = np.random.default_rng(size).random(size) < 0.7
    valid[0] = True
    width = int(np.ceil(np.sqrt(np.ceil(size / 32))))
    in_order = sorted(np.flatnonzero(valid), key=lambda i: (i % width**2, i // width**2))
    requests = [
        replay.Request(jax.random.PRNGKey(i), shape)
        for i, shape in enumerate([(3, 50), (7,), (2, 0)])
    ]
    buffer = dataclasses.replace(replay.init(size, 2, 1), valid=jnp.asarray(valid))
    with backend.compiling_for(platform):
        slots = replay.sample_indices(buffer, jnp.array(size), requests)
    for (key, shape, _), found in zip(requests, slots, strict=True):
        first, _ = jax.random.split(key)
        rank = jax.random.randint(first, shape, 0, len(in_order))
        np.testing.assert_array_equal(
            found, np.array(in_order)[rank] if valid.sum() < size else rank
        )


def test_vmapped_insert_equals_each_learner_alone():
    buffers = [insert(replay.init(6, 2, 1), [i, i], jnp.ones(2, bool), 0) for i in (1, 2)]
    blocks = [replay.pack(transitions([i, i + 1]), jnp.array([True, i > 3])) for i in (3, 4)]
    at = jnp.array(8)
    stacked = [jax.tree.map(lambda *x: jnp.stack(x), *parts) for parts in (buffers, blocks)]
    both = jax.jit(jax.vmap(replay.insert, (0, 0, None)))(*stacked, at)
    for i, (buffer, block) in enumerate(zip(buffers, blocks, strict=True)):
        alone = replay.insert(buffer, block, at)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), both, alone)


def test_sampling_without_valid_slots_returns_filled_slots():
    slots = sample(jax.random.PRNGKey(0), buffer_with(np.zeros(N, bool)), jnp.array(7), (5,))
    assert ((slots >= 0) & (slots < 7)).all()


def test_vmapped_sampling_equals_each_learner_alone():
    rng = np.random.default_rng(0)
    # Learners with very different shares of valid slots.
    buffers = buffer_with(rng.random((4, N)) < np.array([[1.0], [0.8], [0.3], [0.05]]))
    buffers = dataclasses.replace(buffers, packed=jnp.stack([buffers.packed] * 4))
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    sample_all = jax.vmap(lambda key, buffer: sample(key, buffer, jnp.array(N), (6, 5)))
    mapped = sample_all(keys, buffers)
    for i in range(4):
        alone = sample(keys[i], jax.tree.map(lambda x, i=i: x[i], buffers), jnp.array(N), (6, 5))
        np.testing.assert_array_equal(mapped[i], alone)


@pytest.mark.parametrize("count", [7, 60, 100, 230])
@pytest.mark.parametrize("window", [10, 100, 1000])
def test_window_limits_sampling_to_the_newest_transitions(window, count):
    valid = np.random.default_rng(5).random(N) < 0.8
    newest = np.arange(max(0, count - min(window, N)), count) % N
    slots = sample(jax.random.PRNGKey(0), buffer_with(valid), jnp.array(count), (3000,), window)
    assert set(np.asarray(slots).tolist()) == {i for i in newest.tolist() if valid[i]}


@pytest.mark.parametrize(("count", "decay"), [(60, 0.9), (100, 0.98), (130, 0.9)])
def test_old_transitions_are_sampled_less_often(count, decay):
    """The probability of an age is proportional to max(decay^age, 0.1), among valid transitions."""
    valid = np.arange(N) < count
    valid[[3, 40, 41]] = False
    buffer = buffer_with(valid)
    request = replay.Request(jax.random.PRNGKey(1), (200_000,), decay)
    (slots,) = replay.sample_indices(buffer, jnp.array(count), [request])
    age = (count - 1 - np.arange(N)) % N
    order = np.argsort(np.where(valid, age, N))[: valid.sum()]  # valid slots, newest first
    expected = np.maximum(decay ** np.arange(len(order)), 0.1)
    found = np.bincount(np.asarray(slots), minlength=N)
    assert found[~valid].sum() == 0
    p = stats.chisquare(found[order], expected / expected.sum() * found.sum()).pvalue
    assert p > 1e-3, p


def test_sampling_by_age_without_valid_transitions_takes_filled_slots():
    request = replay.Request(jax.random.PRNGKey(1), (1000,), 0.5)
    (slots,) = replay.sample_indices(buffer_with(np.zeros(N, bool)), jnp.array(4), [request])
    assert set(np.asarray(slots).tolist()) == {0, 1, 2, 3}
    assert (np.asarray(slots) == 3).mean() > 0.4


def test_real_transitions_have_weight_1_beside_weighted_ones():
    zeros = Transition(*(jnp.zeros((3, *shape)) for shape in ((2,), (1,), (), (), (2,))))
    real = replay.pack(zeros, jnp.ones(3, bool))
    synthetic = replay.pack(zeros, jnp.ones(3, bool), jnp.array([0.25, 0.5, 4.0]))
    weight = replay.concatenate(real, synthetic).weight
    np.testing.assert_array_equal(weight, [1, 1, 1, 0.25, 0.5, 4])
