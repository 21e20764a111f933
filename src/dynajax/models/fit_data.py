"""What a fit reads off a row's real transitions before it begins: their division, their code, their units.

Nothing here looks at a network.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dynajax.config import ModelConfig
from dynajax.models import targets
from dynajax.replay import take
from dynajax.types import Array, ModelState, Replay, TargetTransform, Transition
from dynajax.xla import backend


class DataSplit(NamedTuple):
    """A division of a replay that a fit uses."""

    training: Array  # (N,) slots of the training split first, then filler
    training_size: Array  # ()
    weights: Array  # (N,) 1 where a slot is in the training split
    scored: Transition  # leaves (B, ...) of the holdout, evenly spaced over it
    scored_weights: Array  # (B,) 0 for filler


def split(config: ModelConfig, replay: Replay, holdout_key: Array) -> DataSplit:
    """Training and holdout transitions.

    Whether a slot is held out is a fixed function of the key and the slot, so a transition keeps
    its side for as long as it is stored, and a warm-started fit never sees the holdout. The first
    slot is always held out, so that there is something to score.
    """
    (capacity,) = replay.valid.shape
    held_out = jax.random.bernoulli(holdout_key, config.holdout, (capacity,)).at[0].set(True)
    training = replay.valid & ~held_out
    held = replay.valid & held_out
    (held_slots,) = jnp.nonzero(held, size=capacity, fill_value=0)
    n, scored = held.sum(), min(config.max_holdout, capacity)
    rank = jnp.arange(scored)
    # rank * n / scored in whole numbers, without overflow
    spaced = (n // scored) * rank + (n % scored) * rank // scored
    slots = held_slots[jnp.where(n <= scored, rank, spaced)]
    return DataSplit(
        training=jnp.nonzero(training, size=capacity, fill_value=0)[0],
        training_size=training.sum(),
        weights=training.astype(jnp.float32),
        scored=take(replay, slots).data,
        scored_weights=(rank < n).astype(jnp.float32),
    )


class DataAnalysis(NamedTuple):
    """What a fit has to know of its data."""

    data: DataSplit
    code: TargetTransform
    varied: Array  # (D+1,) bool: channels that have not been constant
    begins: Array  # (D+1,) bool: those of them that had been until now
    input_mean: Array  # (D+A,)
    input_std: Array  # (D+A,)
    unit: Array  # (D+1,) standard deviations of raw targets


def analyze_data(
    config: ModelConfig,
    variants: Sequence[tuple[str, ...]],
    variant: Array,
    model: ModelState,
    replay: Replay,
    holdout_key: Array,
) -> DataAnalysis:
    """The survey of one row's real transitions, from its training split.

    On an accelerator vmapped rows are surveyed one after the other, for the raw targets of all of
    their rings would be most of a fit's memory.

    Args:
      variants: the fixes of every variant of the run (static); `variant` () is this row's.
      model: for its code and channels so far.
      replay, holdout_key: as for `split`.
    """

    def one(
        config: ModelConfig, variant: Array, model: ModelState, replay: Replay, holdout_key: Array
    ) -> DataAnalysis:
        data = split(config, replay, holdout_key)
        real = replay.data
        # Not of one array with both, which would be a copy of the whole replay.
        parts = (real.next_obs, real.reward[:, None])
        varied = model.varied | jnp.concatenate([targets.varies(x, data.weights) for x in parts])
        begins = varied & ~model.varied
        code = targets.fit_transform(
            variants,
            variant,
            model.code,
            begins[:-1] | (model.fits == 0),
            real.obs,
            real.reward,
            real.next_obs,
            data.weights,
        )
        of_parts = [targets.moments(x, data.weights) for x in (real.obs, real.action)]
        mean, std = (jnp.concatenate(x) for x in zip(*of_parts, strict=True))
        raw = targets.raw_target(code.skip, real.obs, real.reward, real.next_obs)
        _, unit = targets.moments(raw, data.weights)
        return DataAnalysis(data, code, varied, begins, mean, std, unit)

    in_turn: Any = one if backend.target_is_cpu() else jax.custom_batching.sequential_vmap(one)
    read = model._replace(params=None, optimiser=None)
    surveyed: DataAnalysis = in_turn(config, variant, read, replay, holdout_key)
    return surveyed
