"""What a fit reads from one learner's real transitions before it trains: split, transform, scales."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynajax.config import ModelConfig
from dynajax.models import targets
from dynajax.replay import gather
from dynajax.types import DataStats, ReplayBuffer, Transition
from dynajax.xla import backend


class DataSplit(NamedTuple):
    """Training and holdout transitions of a replay buffer."""

    training: Int[Array, " N"]  # slots of the training split, then padding
    training_size: Int[Array, ""]
    weights: Float[Array, " N"]  # 1 if a slot is in the training split
    holdout: Transition  # B holdout transitions, evenly spaced, leaves (B, ...)
    holdout_mask: Float[Array, " B"]  # 0 for padding


def split(config: ModelConfig, buffer: ReplayBuffer, holdout_key: Array) -> DataSplit:
    """Divide the real transitions into training and holdout.

    Whether a slot is held out is a fixed function of the key and the slot. So a transition stays on
    its side as long as it is stored, and a warm-started fit never trains on the holdout. The first
    slot is always held out, so the holdout is never empty.
    """
    capacity = buffer.capacity
    held_out = jax.random.bernoulli(holdout_key, config.holdout, (capacity,)).at[0].set(True)
    training = buffer.valid & ~held_out
    held = buffer.valid & held_out
    (held_slots,) = jnp.nonzero(held, size=capacity, fill_value=0)
    n, size = held.sum(), min(config.max_holdout, capacity)
    rank = jnp.arange(size)
    # rank * n / size in integers, without overflow.
    spaced = (n // size) * rank + (n % size) * rank // size
    slots = held_slots[jnp.where(n <= size, rank, spaced)]
    return DataSplit(
        training=jnp.nonzero(training, size=capacity, fill_value=0)[0],
        training_size=training.sum(),
        weights=training.astype(jnp.float32),
        holdout=gather(buffer, slots).unpack(),
        holdout_mask=(rank < n).astype(jnp.float32),
    )


class DataAnalysis(NamedTuple):
    """The result of `analyze`."""

    data: DataSplit
    stats: DataStats
    new_dims: Bool[Array, " Z"]  # targets that were constant until now


def analyze(
    config: ModelConfig,
    variants: Sequence[tuple[str, ...]],
    variant: Int[Array, ""],
    stats: DataStats,
    num_fits: Int[Array, ""],
    buffer: ReplayBuffer,
    holdout_key: Array,
) -> DataAnalysis:
    """Split the real transitions of one learner and compute its scales from the training split.

    Args:
      variants: the fixes of every variant of the run (static); `variant` is this learner's.
      stats: those of the previous fit.
      num_fits: fits so far.
      buffer, holdout_key: see `split`.
    """

    def one(
        config: ModelConfig,
        variant: Array,
        stats: DataStats,
        num_fits: Array,
        buffer: ReplayBuffer,
        holdout_key: Array,
    ) -> DataAnalysis:
        data = split(config, buffer, holdout_key)
        real = buffer.unpack()
        # Separately: one array with both would be a copy of the whole buffer.
        parts = (real.next_obs, real.reward[:, None])
        has_varied = stats.has_varied | jnp.concatenate(
            [targets.varies(x, data.weights) for x in parts]
        )
        new_dims = has_varied & ~stats.has_varied
        transform = targets.fit_transform(
            variants,
            variant,
            stats.transform,
            new_dims[:-1] | (num_fits == 0),
            real.obs,
            real.reward,
            real.next_obs,
            data.weights,
        )
        of_inputs = [targets.moments(x, data.weights) for x in (real.obs, real.action)]
        mean, std = (jnp.concatenate(x) for x in zip(*of_inputs, strict=True))
        change = targets.resolved_target(
            jnp.ones_like(transform.skip), real.obs, real.reward, real.next_obs, data.weights
        )
        _, change_std = targets.moments(change, data.weights)
        new_stats = DataStats(transform, mean, std, change_std, has_varied)
        return DataAnalysis(data, new_stats, new_dims)

    function: Any = one
    if backend.lowering().buffers_in_turn:
        function = jax.custom_batching.sequential_vmap(one)
    analysis: DataAnalysis = function(config, variant, stats, num_fits, buffer, holdout_key)
    return analysis
