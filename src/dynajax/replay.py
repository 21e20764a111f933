"""A replay buffer as pure functions on arrays.

Only `valid` slots are sampled: transitions that are not finite, and rollout steps that a
termination or a trust rule has cut off, stay in the buffer as invalid slots. Sampling draws a rank
among the valid slots and looks up the slot that has it. This is exact, and it needs no loop whose
length depends on data, which an accelerator would have to wait for.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from dynajax.types import Minibatch, PackedTransitions, ReplayBuffer, Transition
from dynajax.xla import backend

_Batch = TypeVar("_Batch", PackedTransitions, Minibatch)

#: Flags of slots in one word of the sampling index.
_BITS = 32

#: The smallest probability of an old transition, relative to the newest one's.
_AGE_FLOOR = 0.1

#: A TPU lays out an array in tiles of 8 by 128, along the axes that fill them best.
_TILE = 8


def init(capacity: int, obs_dim: int, action_dim: int, *, weighted: bool = False) -> ReplayBuffer:
    """Return an empty buffer of `capacity` slots, with a weight for each if `weighted`."""
    return ReplayBuffer(
        packed=jnp.zeros((capacity, packed_size(obs_dim, action_dim))),
        valid=jnp.zeros(capacity, bool),
        weight=jnp.zeros(capacity) if weighted else None,
        obs_dim=obs_dim,
        action_dim=action_dim,
    )


def packed_size(obs_dim: int, action_dim: int) -> int:
    """Return the numbers of a packed transition, 2D+A+2 rounded up to a whole tile.

    Without the padding, XLA for TPUs tiles the buffers along the learner axis and transposes them
    at every step.
    """
    return -(-(2 * obs_dim + action_dim + 2) // _TILE) * _TILE


def pack(
    transition: Transition, valid: Bool[Array, "*B"], weight: Float[Array, "*B"] | None = None
) -> PackedTransitions:
    """Pack transitions, leaves (*B, ...), with their flags and weights."""
    obs, action, reward, discount, next_obs = transition
    chex.assert_equal_shape_prefix(jax.tree.leaves((transition, valid, weight)), valid.ndim)
    sizes = obs.shape[-1], action.shape[-1]
    parts = [obs, action, reward[..., None], discount[..., None], next_obs]
    filler = jnp.zeros((*valid.shape, packed_size(*sizes) - sum(x.shape[-1] for x in parts)))
    return PackedTransitions(jnp.concatenate([*parts, filler], -1), valid, weight, *sizes)


def of_transitions(
    transition: Transition, valid: Bool[Array, "*B"], weight: Float[Array, "*B"] | None = None
) -> ReplayBuffer:
    """Return a full buffer of these transitions, leaves (*B, ...)."""
    return ReplayBuffer(**vars(pack(transition, valid, weight)))


def insert(buffer: ReplayBuffer, block: PackedTransitions, count: Int[Array, ""]) -> ReplayBuffer:
    """Write B transitions over the oldest ones.

    Args:
      block: leaves (B, ...). B divides the capacity, so a block never wraps around.
      count: transitions inserted so far, a multiple of B.
    """
    start = count % buffer.capacity
    packed = _write(buffer.packed, block.packed, start)
    valid = _write(buffer.valid, block.valid, start)
    weight = None if buffer.weight is None else _write(buffer.weight, block.weight, start)
    return dataclasses.replace(buffer, packed=packed, valid=valid, weight=weight)


@jax.custom_batching.custom_vmap
def _write(buffer: Array, block: Array, start: Array) -> Array:
    """Return the buffer (N, ...) with a block (B, ...) from slot `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(buffer, block.astype(buffer.dtype), start, 0)


@_write.def_vmap
def _write_rows(size: int, mapped: Any, buffer: Array, block: Array, start: Array) -> Any:
    """Write one slice of all learners; JAX's own rule is a scatter that checks its positions."""
    assert not mapped[2], "learners share the position"
    buffer, block = (
        x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
        for x, has_axis in zip((buffer, block), mapped[:2], strict=True)
    )
    return jax.lax.dynamic_update_slice_in_dim(buffer, block.astype(buffer.dtype), start, 1), True


class Request(NamedTuple):
    """Slots to sample: int `shape`, drawn with `key`."""

    key: Array
    shape: tuple[int, ...]
    age_decay: float = 1.0  # see `_sample_ages`; 1 samples uniformly


def sample_indices(
    buffer: ReplayBuffer,
    count: Int[Array, ""],
    requests: Sequence[Request],
    *,
    window: int = 0,
) -> list[Int[Array, "..."]]:
    """Sample slots of valid transitions independently, for several requests at once.

    If no slot is valid, sample any slots that are filled. Requests are answered together because
    the look-up costs the same for many ranks as for a few.

    Args:
      count: transitions inserted so far.
      window: sample from so many of the newest transitions; 0 for all.
    """
    capacity = buffer.capacity
    size = jnp.clip(count, 1, capacity)
    slots = jnp.arange(capacity)
    valid = buffer.valid & (slots < size)
    if window and window < capacity:
        age = (count - 1 - slots) % capacity
        valid = valid & (age < window)
    # A square table, so that a look-up reads one row and the ends of all rows.
    width = math.isqrt(max(-(-capacity // _BITS) - 1, 0)) + 1
    by_age = any(request.age_decay < 1 for request in requests)
    words = _pack_flags(valid, width**2, by_age).reshape(width, width)
    within, ends = _cumulative_counts(words)
    total = ends[-1]
    span = jnp.where(total > 0, total, size)
    newest = None
    if by_age:
        head = count % capacity  # where the next insertion begins
        newest = jnp.where(total > 0, (valid & (slots < head)).sum(), head) - 1
    drawn = [_sample_ranks(request, span, newest) for request in requests]
    rank = jnp.concatenate([x.reshape(-1) for x in drawn])
    # Where all filled slots are valid, a rank is a slot.
    some_invalid = (total > 0) & (total < size)
    found = jnp.where(some_invalid, _slot_of_rank(words, within, ends, rank, by_age), rank)
    last = np.cumsum([x.size for x in drawn])[:-1]
    return [x.reshape(y.shape) for x, y in zip(jnp.split(found, last), drawn, strict=True)]


def _sample_ranks(
    request: Request, span: Int[Array, ""], newest: Int[Array, ""] | None
) -> Int[Array, "..."]:
    """Sample ranks below `span`, uniformly or by age from the rank of the newest transition."""
    key = jax.random.split(request.key)[0]
    if newest is None or request.age_decay == 1:
        return jax.random.randint(key, request.shape, 0, span)
    return (newest - _sample_ages(key, request.shape, span, request.age_decay)) % span


def _sample_ages(
    key: Array, shape: tuple[int, ...], span: Int[Array, ""], decay: float
) -> Int[Array, "..."]:
    """Sample ages n in [0, span) with probability proportional to max(decay^n, 0.1) (DR.Q, 2026).

    The distribution function is inverted: a geometric part, then a constant one.
    """
    fading = jnp.minimum(span, math.ceil(math.log(_AGE_FLOOR) / math.log(decay)))
    geometric = (1 - decay ** fading.astype(jnp.float32)) / (1 - decay)
    drawn = jax.random.uniform(key, shape) * (geometric + _AGE_FLOOR * (span - fading))
    in_geometric = jnp.log1p(-jnp.minimum(drawn, geometric) * (1 - decay)) / math.log(decay)
    in_constant = fading + (drawn - geometric) / _AGE_FLOOR
    age = jnp.where(drawn < geometric, in_geometric, in_constant)
    return jnp.minimum(age.astype(jnp.int32), span - 1)


def _pack_flags(flags: Bool[Array, " N"], count: int, in_order: bool) -> UInt32[Array, " W"]:
    """Pack flags into `count` words: flag i is bit i // count of word i % count.

    The bits of a word lie far apart, because vector units handle a short last axis badly. With
    `in_order` ranks have the order of the slots: flag i is bit i % 32 of word i // 32.
    """
    padded = jnp.pad(flags, (0, _BITS * count - flags.size))
    bits = padded.reshape(count, _BITS).T if in_order else padded.reshape(_BITS, count)
    shifts = jnp.arange(_BITS, dtype=jnp.uint32)[:, None]
    return (bits.astype(jnp.uint32) << shifts).sum(0, dtype=jnp.uint32)


def _cumulative_counts(words: UInt32[Array, "X X"]) -> tuple[Int[Array, "X X"], Int[Array, " X"]]:
    """Count set flags from a row's start to the end of each word, and from the start to each row's end."""
    flags = jax.lax.population_count(words).astype(jnp.int32)
    if backend.lowering().use_cumsum:
        within = jnp.cumsum(flags, -1)
        return within, jnp.cumsum(within[:, -1])
    upto = jnp.tri(len(words), dtype=jnp.int32)
    within = (flags[:, None, :] * upto).sum(-1)
    return within, (within[:, -1] * upto).sum(-1)


def _slot_of_rank(words: Array, within: Array, ends: Array, rank: Array, in_order: bool) -> Array:
    """Return the position of the set flag that has each rank, counted word by word.

    Args:
      words: (X, X), see `_pack_flags`.
      within, ends: see `_cumulative_counts`.
      rank: (...) int.
      in_order: see `_pack_flags`.
    """
    row, left = _first_beyond(ends, rank)
    column, left = _first_beyond(within[row], left)
    at = row * len(words) + column
    word, bit = words.reshape(-1)[at], jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        low = jax.lax.population_count(word & jnp.uint32((1 << half) - 1)).astype(jnp.int32)
        above = left >= low
        left = jnp.where(above, left - low, left)
        word = jnp.where(above, word >> half, word)
        bit += jnp.where(above, half, 0)
    return at * _BITS + bit if in_order else at + bit * words.size


def _first_beyond(ends: Array, rank: Array) -> tuple[Array, Array]:
    """Return the first index whose cumulative count (..., X) exceeds each rank, at most X - 1, and
    the rank minus the count before it."""
    passed = ends <= rank[..., None]
    before = jnp.where(passed, ends, 0).max(-1)
    return jnp.minimum(passed.sum(-1), ends.shape[-1] - 1), rank - before


def gather(buffer: PackedTransitions, indices: Int[Array, "*B"]) -> PackedTransitions:
    """Return the transitions in these slots, leaves (*B, ...)."""
    weight = None if buffer.weight is None else buffer.weight[indices]
    return PackedTransitions(
        buffer.packed[indices], buffer.valid[indices], weight, buffer.obs_dim, buffer.action_dim
    )


def to_minibatch(block: PackedTransitions) -> Minibatch:
    """Unpack transitions into a minibatch."""
    return Minibatch(block.unpack(), block.valid, block.weight)


def concatenate(real: _Batch, synthetic: _Batch) -> _Batch:
    """Return one batch of both, leaves (B, ...); real transitions have weight 1."""
    if synthetic.weight is not None:
        real = dataclasses.replace(real, weight=jnp.ones(real.valid.shape))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), real, synthetic)
