"""MACURA: rollouts continue as long as the members agree."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynajax.config import fields, traced
from dynajax.trust.base import Predictions, TrustOutput, TrustRule


@fields
@dataclass(frozen=True)
class MacuraFields:
    """Settings of `Macura`; the authors' code has 30 and 90 for hopper, 0.3 and 95 for walker, 5 and
    95 for ant and humanoid."""

    xi: float = traced(2.0, 0, about="factor between the percentile and the threshold")
    zeta: float = traced(95.0, 0, 100, about="percentile over the rollouts' first steps")


class MacuraState(NamedTuple):
    """The thresholds of the last calls, in a circular buffer."""

    thresholds: Float[Array, " T"]
    calls: Int[Array, ""]


class Macura(TrustRule):
    """Continue rollouts while the members agree (Frauenknecht et al., 2024).

    u is the mean over pairs of members of the geometric Jensen-Shannon divergence. The first step of
    each call sets a threshold, xi times the zeta-percentile of the finite u, which is averaged with
    those of the last 2,000 calls. A rollout continues, and its transition is kept, while u is below
    the average.
    """

    Fields: ClassVar[type] = MacuraFields
    needs_all_members = True
    needs_variance = True
    CALLS: ClassVar[int] = 2000

    def init(self) -> MacuraState:
        """Return a state without thresholds."""
        return MacuraState(jnp.zeros(self.CALLS), jnp.zeros((), jnp.int32))

    @staticmethod
    def divergence(predictions: Predictions) -> Float[Array, " B"]:
        """Return u, in a form that is accurate in float32:
        d_ij = sum (m_i - m_j)^2 / (4 (v_i + v_j)) + 1/2 ln((v_i + v_j) / (2 sqrt(v_i v_j))).
        """
        mean, variance = predictions.mean, predictions.variance
        i, j = jnp.triu_indices(mean.shape[0], 1)
        both = variance[i] + variance[j]
        distance = jnp.square(mean[i] - mean[j]) / (4 * both)
        logs = jnp.log(variance)
        ratio = 0.5 * (jnp.log(0.5 * both) - 0.5 * (logs[i] + logs[j]))
        return (distance + ratio).sum(-1).mean(0)

    def apply(
        self,
        state: MacuraState,
        predictions: Predictions,
        h: Int[Array, ""],
        horizon: Array | int,
        key: Array,
    ) -> tuple[MacuraState, TrustOutput]:
        """End rollouts whose members disagree."""
        u = self.divergence(predictions)
        # A single infinite u would stay in the thresholds for 2,000 calls.
        valid = jnp.isfinite(u) & predictions.active
        percentile = jnp.nanpercentile(jnp.where(valid, u, jnp.nan), self.config.zeta)
        updated = MacuraState(
            state.thresholds.at[state.calls % self.CALLS].set(self.config.xi * percentile),
            state.calls + 1,
        )
        first = (h == 0) & valid.any()
        state = MacuraState(*(jnp.where(first, a, b) for a, b in zip(updated, state, strict=True)))
        known = jnp.clip(state.calls, 1, self.CALLS)
        return state, TrustOutput(continue_mask=u < state.thresholds.sum() / known)
