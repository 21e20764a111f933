"""A ring of transitions as pure functions on arrays.

A slot is drawn only while it is `valid`: dropped transitions and the ends of rollouts leave holes.
Draws are even among the valid slots: one of their ranks is drawn, and the slot is looked up that
has it. This is exact, and there is no loop in it whose end depends on data, for which an
accelerator would have to wait for its host.
"""

import dataclasses
import math
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp

from dynajax.types import Array, Minibatch, Replay, Transition

_Block = TypeVar("_Block", Replay, Minibatch)

#: Flags of slots that lie in one word of an index.
_BITS = 32

#: A TPU lays an array out in tiles of 8 by 128, along those of its axes that they fill best.
_TILE = 8


def init(capacity: int, obs_dim: int, action_dim: int, *, weighs: bool = False) -> Replay:
    """An empty ring of N = `capacity` slots, with a column of weights if it `weighs`."""
    return Replay(
        packed=jnp.zeros((capacity, columns(obs_dim, action_dim))),
        valid=jnp.zeros(capacity, bool),
        weight=jnp.zeros(capacity) if weighs else None,
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

    def write(ring: Array, block: Array) -> Array:
        at = (start,) + (0,) * (ring.ndim - 1)
        return jax.lax.dynamic_update_slice(ring, block.astype(ring.dtype), at)

    return jax.tree.map(write, replay, block)


def draw(key: Array, replay: Replay, count: Array, shape: tuple[int, ...]) -> Array:
    """Slots of valid transitions, evenly and independently: int `shape`.

    Where no slot is valid, of any that are filled.

    Args:
      count: () transitions that were added so far.
    """
    (capacity,) = replay.valid.shape
    size = jnp.clip(count, 1, capacity)
    valid = replay.valid & (jnp.arange(capacity) < size)
    # A square, so that a look-up reads one row and the ends of all.
    width = math.isqrt(max(-(-capacity // _BITS) - 1, 0)) + 1
    words = _pack(valid, width**2)
    ends = jnp.cumsum(jax.lax.population_count(words).astype(jnp.int32))
    total = ends[-1]
    first_key, _ = jax.random.split(key)
    rank = jax.random.randint(first_key, shape, 0, jnp.where(total > 0, total, size))
    # Where there is no hole a rank is a slot.
    holes = (total > 0) & (total < size)
    return jnp.where(holes, _slot(words.reshape(width, width), ends, rank), rank)


def _pack(flags: Array, count: int) -> Array:
    """Flags (N,) as bits of `count` words, 32 count >= N: flag i is bit i // count of word i % count.

    So that a word's bits lie far apart, for neighbours as a last axis are what vector units lack.
    """
    bits = jnp.pad(flags, (0, _BITS * count - flags.size)).reshape(_BITS, count)
    shifts = jnp.arange(_BITS, dtype=jnp.uint32)[:, None]
    return (bits.astype(jnp.uint32) << shifts).sum(0, dtype=jnp.uint32)


def _slot(words: Array, ends: Array, rank: Array) -> Array:
    """Which flags (see `_pack`) are the set ones of these ranks, counted word by word: int (...).

    Args:
      words: (X, X) of 32 flags each.
      ends: (X * X,) set flags up to the end of each word.
      rank: (...) int.
    """
    width = words.shape[0]
    table = ends.reshape(width, width)
    row = (table[:, -1] <= rank[..., None]).sum(-1)
    row = jnp.minimum(row, width - 1)
    column = jnp.minimum((table[row] <= rank[..., None]).sum(-1), width - 1)
    at = row * width + column
    word = words[row, column]
    left = rank - jnp.where(at > 0, ends[at - 1], 0)
    bit = jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        low = jax.lax.population_count(word & jnp.uint32((1 << half) - 1)).astype(jnp.int32)
        above = left >= low
        left = jnp.where(above, left - low, left)
        word = jnp.where(above, word >> half, word)
        bit += jnp.where(above, half, 0)
    return at + bit * width**2


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
