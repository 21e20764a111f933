"""What the members know in common, while little of it is lost: Infoprop."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from dynajax.config import Config, fields, traced
from dynajax.trust.base import Predictions, TrustOutput, TrustRule, apart
from dynajax.types import Array, UsageError


@fields
@dataclass(frozen=True)
class InfopropFields:
    """Of `Infoprop`; its authors' numbers."""

    high: float = traced(
        0.9999, 0, 1, about="quantile of a channel's loss that ends a rollout at once"
    )
    low: float = traced(0.01, 0, 1, about="quantile that, `longest` times, ends it in sum")
    longest: float = traced(100.0, 1, about="steps that the sum is for")


class InfopropState(NamedTuple):
    """What real data say of the losses, and what the running rollouts have lost."""

    high: Array  # (D+1,)
    low: Array  # (D+1,)
    spent: Array  # (B, D+1)


class Infoprop(TrustRule):
    """Rollouts of the members' common knowledge, while little information is lost (Frauenknecht et
    al., 2025).

    With v = 1 / mean(1/v_e), m = v mean(m_e / v_e), eps = mean((m_e - m)^2) and x a sample of the
    chosen member, the sample is N(m + G (x - m), v eps / (v + eps)), G = v / (v + eps); the loss of
    a channel is max(0, 1/2 log2(2 pi e v eps / (v + eps)) - log2 1e-6) bits.
    """

    Fields: ClassVar[type] = InfopropFields
    needs_all_members = True
    per_rollout_state = True

    @classmethod
    def check(cls, config: Config) -> None:
        """A loss that is small must not be more than one that is large."""
        if not config.trust.low < config.trust.high:
            raise UsageError(
                f"--set trust.low={config.trust.low:g}: it must be under "
                f"trust.high={config.trust.high:g}"
            )

    RESOLUTION: ClassVar[float] = 1e-6

    def init(self) -> InfopropState:
        """Before the first fit nothing ends a rollout."""
        channels = self.spec.obs_dim + 1
        never = jnp.full(channels, jnp.inf)
        return InfopropState(never, never, jnp.zeros((self.batch, channels)))

    def _common(self, predictions: Predictions) -> tuple[Array, Array, Array, Array]:
        """m, gain, variance of the sample, and loss: (B, D+1) each."""
        mean, variance = predictions.mean, predictions.variance
        v, moved = 1 / (1 / variance).mean(0), apart(mean)
        m = v * (moved / variance).mean(0)
        epsilon = jnp.square(moved - m).mean(0)
        gain = v / (v + epsilon)
        left = gain * epsilon
        bits = 0.5 * jnp.log2(2 * math.pi * math.e * jnp.maximum(left, 1e-30))
        return mean[0] + m, gain, left, jnp.maximum(0.0, bits - math.log2(self.RESOLUTION))

    def sample(self, predictions: Predictions, h: Array, key: Array) -> Array:
        """What the members have in common of the chosen one's sample."""
        m, gain, left, _ = self._common(predictions)
        noise = jax.random.normal(key, m.shape)
        return m + gain * (predictions.sample - m) + jnp.sqrt(left) * noise

    def calibrate(
        self, state: InfopropState, predictions: Predictions, counts: Array
    ) -> InfopropState:
        """Takes the quantiles of the losses on real data."""
        loss = jnp.where(counts[:, None] > 0, self._common(predictions)[-1], jnp.nan)
        high, low = (jnp.nanquantile(loss, q, axis=0) for q in (self.config.high, self.config.low))
        return state._replace(high=high, low=low)

    def apply(
        self,
        state: InfopropState,
        predictions: Predictions,
        h: Array,
        horizon: Array | int,
        key: Array,
    ) -> tuple[InfopropState, TrustOutput]:
        """Ends rollouts that lose too much."""
        loss = self._common(predictions)[-1]
        spent = jnp.where(h == 0, 0.0, state.spent) + loss
        lost = (loss > state.high) | (spent > self.config.longest * state.low)
        return state._replace(spent=spent), TrustOutput(continue_mask=~lost.any(-1))
