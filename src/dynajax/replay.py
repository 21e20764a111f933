"""A ring of transitions as pure functions on arrays.

A slot is drawn only while it is `valid`: dropped transitions and the ends of rollouts leave holes.
Draws are even among the valid slots: one of their ranks is drawn, and the slot is looked up that
has it. This is exact, and there is no loop in it whose end depends on data, for which an
accelerator would have to wait for its host.
"""

import dataclasses
import math
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dynajax.types import Array, Minibatch, Replay, Transition
from dynajax.xla import backend

_Block = TypeVar("_Block", Replay, Minibatch)

#: Flags of slots that lie in one word of an index.
_BITS = 32

#: A TPU lays an array out in tiles of 8 by 128, along those of its axes that they fill best.
_TILE = 8


def init(capacity: int, obs_dim: int, action_dim: int, *, uses_weights: bool = False) -> Replay:
    """An empty ring of N = `capacity` slots, with a column of weights if it `weighs`."""
    return Replay(
        packed=jnp.zeros((capacity, columns(obs_dim, action_dim))),
        valid=jnp.zeros(capacity, bool),
        weight=jnp.zeros(capacity) if uses_weights else None,
        obs_dim=obs_dim,
        action_dim=action_dim,
    )


def columns(obs_dim: int, action_dim: int) -> int:
    """P, the entries that a transition lies in: 2D+A+2, and up to the next whole tile.

    With less, a TPU finds that eight rows of a run fill its tiles better than the entries do, lays
    the rings out along the rows, and turns them whole in every step.
    """
    return -(-(2 * obs_dim + action_dim + 2) // _TILE) * _TILE


def pack(transitions: Transition, valid: Array, weight: Array | None = None) -> Replay:
    """Transitions, leaves (B, ...), with their flags and weights (B,)."""
    obs, action, reward, discount, next_obs = transitions
    chex.assert_equal_shape_prefix(jax.tree.leaves((transitions, valid, weight)), valid.ndim)
    sizes = obs.shape[-1], action.shape[-1]
    parts = [obs, action, reward[..., None], discount[..., None], next_obs]
    filler = jnp.zeros((*valid.shape, columns(*sizes) - sum(x.shape[-1] for x in parts)))
    return Replay(jnp.concatenate([*parts, filler], -1), valid, weight, *sizes)


def add(replay: Replay, block: Replay, count: Array) -> Replay:
    """Writes B transitions over the oldest.

    Args:
      block: leaves (B, ...). B divides N, so that a block never wraps.
      count: () transitions that were added so far, a multiple of B. It is an argument, not part
        of the ring, because all rows share it: under vmap an unbatched position keeps this a
        slice update in place.
    """
    (capacity,) = replay.valid.shape
    start = count % capacity
    return jax.tree.map(lambda ring, block: _write(ring, block, start), replay, block)


@jax.custom_batching.custom_vmap
def _write(ring: Array, block: Array, start: Array) -> Array:
    """The ring (N, ...) with a block (B, ...) from slot `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(ring, block.astype(ring.dtype), start, 0)


@_write.def_vmap
def _write_rows(rows: int, mapped: Any, ring: Array, block: Array, start: Array) -> Any:
    """The same of rows: one slice of all, where JAX would have a scatter and check its positions."""
    assert not mapped[2], "rows share the position"
    ring, block = (
        x if of_rows else jnp.broadcast_to(x, (rows, *x.shape))
        for x, of_rows in zip((ring, block), mapped[:2], strict=True)
    )
    return jax.lax.dynamic_update_slice_in_dim(ring, block.astype(ring.dtype), start, 1), True


def draw(key: Array, replay: Replay, count: Array, shape: tuple[int, ...]) -> Array:
    """Slots of valid transitions, evenly and independently: int `shape`. See `draws`."""
    return sample_indices(replay, count, (key, shape))[0]


def sample_indices(
    replay: Replay, count: Array, *wanted: tuple[Array, tuple[int, ...]]
) -> list[Array]:
    """Slots of valid transitions, evenly and independently, int `shape` for each (key, shape) that is wanted.

    Where no slot is valid, of any that are filled. Together, for they are looked up in one go.

    Args:
      count: () transitions that were added so far.
    """
    (capacity,) = replay.valid.shape
    size = jnp.clip(count, 1, capacity)
    valid = replay.valid & (jnp.arange(capacity) < size)
    # A square, so that a look-up reads one row and the ends of all.
    width = math.isqrt(max(-(-capacity // _BITS) - 1, 0)) + 1
    words = _pack(valid, width**2).reshape(width, width)
    within, ends = _counts(words)
    total = ends[-1]
    span = jnp.where(total > 0, total, size)
    drawn = [jax.random.randint(jax.random.split(key)[0], shape, 0, span) for key, shape in wanted]
    rank = jnp.concatenate([x.reshape(-1) for x in drawn])
    # Where there is no hole a rank is a slot.
    holes = (total > 0) & (total < size)
    slots = jnp.where(holes, _slot(words, within, ends, rank), rank)
    last = np.cumsum([x.size for x in drawn])[:-1]
    return [x.reshape(y.shape) for x, y in zip(jnp.split(slots, last), drawn, strict=True)]


def _pack(flags: Array, count: int) -> Array:
    """Flags (N,) as bits of `count` words, 32 count >= N: flag i is bit i // count of word i % count.

    So that a word's bits lie far apart, for neighbours as a last axis are what vector units lack.
    """
    bits = jnp.pad(flags, (0, _BITS * count - flags.size)).reshape(_BITS, count)
    shifts = jnp.arange(_BITS, dtype=jnp.uint32)[:, None]
    return (bits.astype(jnp.uint32) << shifts).sum(0, dtype=jnp.uint32)


def _counts(words: Array) -> tuple[Array, Array]:
    """Of X * X words, row by row: set flags from a row's beginning to the end of each of its words, (X, X),
    and from the very beginning to the end of each row, (X,).
    """
    flags = jax.lax.population_count(words).astype(jnp.int32)
    if backend.target_is_cpu():
        within = jnp.cumsum(flags, -1)
        return within, jnp.cumsum(within[:, -1])
    # One kernel each, where a cumulative sum is three or four; X is small.
    upto = jnp.tri(len(words), dtype=jnp.int32)
    within = (flags[:, None, :] * upto).sum(-1)
    return within, (within[:, -1] * upto).sum(-1)


def _slot(words: Array, within: Array, ends: Array, rank: Array) -> Array:
    """Which flags (see `_pack`) are the set ones of these ranks, counted word by word: int (...).

    Args:
      words: (X, X) of 32 flags each; within, ends: see `_counts`.
      rank: (...) int.
    """
    row, left = _passed(ends, rank)
    column, left = _passed(within[row], left)
    at = row * len(words) + column
    word, bit = words.reshape(-1)[at], jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        low = jax.lax.population_count(word & jnp.uint32((1 << half) - 1)).astype(jnp.int32)
        above = left >= low
        left = jnp.where(above, left - low, left)
        word = jnp.where(above, word >> half, word)
        bit += jnp.where(above, half, 0)
    return at + bit * words.size


def _passed(ends: Array, rank: Array) -> tuple[Array, Array]:
    """How many of the `ends` (..., X) a rank (...) lies beyond, X - 1 at most, and its rank from there."""
    passed = ends <= rank[..., None]
    before = jnp.where(passed, ends, 0).max(-1)
    return jnp.minimum(passed.sum(-1), ends.shape[-1] - 1), rank - before


def take(replay: Replay, slots: Array) -> Replay:
    """What is in `slots`: leaves (*slots.shape, ...)."""
    return jax.tree.map(lambda ring: ring[slots], replay)


def minibatch(block: Replay) -> Minibatch:
    """Transitions as they are learned from."""
    return Minibatch(block.data, block.valid, block.weight)


def beside(real: _Block, synthetic: _Block | None) -> _Block:
    """A minibatch of both, leaves (B, ...)."""
    if synthetic is None:
        return real
    if synthetic.weight is not None:
        real = dataclasses.replace(real, weight=jnp.ones(real.valid.shape))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), real, synthetic)
