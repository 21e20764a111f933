"""Infoprop: the members' common knowledge, while little information is lost."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynajax.config import Config, fields, traced
from dynajax.trust.base import Predictions, TrustOutput, TrustRule, relative_to_first
from dynajax.types import UsageError


@fields
@dataclass(frozen=True)
class InfopropFields:
    """Settings of `Infoprop`; the defaults are its authors'."""

    high: float = traced(
        0.9999, 0, 1, about="quantile of a dimension's information loss that ends a rollout at once"
    )
    low: float = traced(
        0.01, 0, 1, about="quantile of the loss that ends a rollout when `longest` times is summed"
    )
    longest: float = traced(100.0, 1, about="multiple of the low quantile that ends a rollout")


class InfopropState(NamedTuple):
    """Loss thresholds from real data, and the losses of the running rollouts."""

    high: Float[Array, " Z"]
    low: Float[Array, " Z"]
    spent: Float[Array, "B Z"]


class Infoprop(TrustRule):
    """Sample the members' common knowledge; end rollouts that lose information (Frauenknecht et al.,
    2025).

    With v = 1 / mean(1/v_e), m = v mean(m_e / v_e), eps = mean((m_e - m)^2) and x a sample of the
    chosen member, the sample is N(m + G (x - m), v eps / (v + eps)), G = v / (v + eps). The loss of
    a dimension is max(0, 1/2 log2(2 pi e v eps / (v + eps)) - log2 1e-6) bits.
    """

    Fields: ClassVar[type] = InfopropFields
    needs_all_members = True
    needs_variance = True
    per_rollout_state = True

    RESOLUTION: ClassVar[float] = 1e-6

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a low quantile above the high one, and noise that does not scale the sample."""
        for path in ("state_noise", "reward_noise"):
            if (factor := getattr(config.rollout, path)) != 1:
                raise UsageError(
                    f"--set rollout.{path}={factor:g}: --trust=infoprop has a variance of its own; "
                    "leave it out, or choose another rule"
                )
        if not config.trust.low < config.trust.high:
            raise UsageError(
                f"--set trust.low={config.trust.low:g}: it must be under "
                f"trust.high={config.trust.high:g}"
            )

    def init(self) -> InfopropState:
        """Return thresholds that end no rollout before the first fit."""
        dims = self.spec.obs_dim + 1
        never = jnp.full(dims, jnp.inf)
        return InfopropState(never, never, jnp.zeros((self.batch, dims)))

    def _common(self, predictions: Predictions) -> tuple[Array, Array, Array, Array]:
        """Return m, gain, variance of the sample, and loss, each (B, Z)."""
        mean, variance = predictions.mean, predictions.variance
        v, moved = 1 / (1 / variance).mean(0), relative_to_first(mean)
        m = v * (moved / variance).mean(0)
        epsilon = jnp.square(moved - m).mean(0)
        gain = v / (v + epsilon)
        left = gain * epsilon
        bits = 0.5 * jnp.log2(2 * math.pi * math.e * jnp.maximum(left, 1e-30))
        return mean[0] + m, gain, left, jnp.maximum(0.0, bits - math.log2(self.RESOLUTION))

    def sample(
        self, predictions: Predictions, h: Int[Array, ""], key: Array
    ) -> Float[Array, "B Z"]:
        """Return the members' common knowledge about the chosen member's sample."""
        m, gain, left, _ = self._common(predictions)
        noise = jax.random.normal(key, m.shape)
        return m + gain * (predictions.sample - m) + jnp.sqrt(left) * noise

    def calibrate(
        self, state: InfopropState, predictions: Predictions, mask: Float[Array, " B"]
    ) -> InfopropState:
        """Take the quantiles of the losses on real data."""
        loss = jnp.where(mask[:, None] > 0, self._common(predictions)[-1], jnp.nan)
        high, low = (jnp.nanquantile(loss, q, axis=0) for q in (self.config.high, self.config.low))
        return state._replace(high=high, low=low)

    def apply(
        self,
        state: InfopropState,
        predictions: Predictions,
        h: Int[Array, ""],
        horizon: Array | int,
        key: Array,
    ) -> tuple[InfopropState, TrustOutput]:
        """End rollouts that lose too much information."""
        loss = self._common(predictions)[-1]
        spent = jnp.where(h == 0, 0.0, state.spent) + loss
        lost = (loss > state.high) | (spent > self.config.longest * state.low)
        return state._replace(spent=spent), TrustOutput(continue_mask=~lost.any(-1))
