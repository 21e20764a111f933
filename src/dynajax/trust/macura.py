"""Rollouts as far as the members agree: MACURA."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from dynajax.config import fields, traced
from dynajax.trust.base import Predictions, TrustOutput, TrustRule
from dynajax.types import Array


@fields
@dataclass(frozen=True)
class MacuraFields:
    """Of `Macura`; its authors take 0.3 and 90 on hopper, 0.3 and 95 on walker, 5 and 95 on ant and
    humanoid."""

    xi: float = traced(2.0, 0, about="times the percentile is the threshold")
    zeta: float = traced(95.0, 0, 100, about="percentile over the rollouts' first steps")


class MacuraState(NamedTuple):
    """Thresholds of the last calls, a ring."""

    thresholds: Array  # (T,)
    calls: Array  # () int


class Macura(TrustRule):
    """Rollouts go on while the members agree (MACURA; Frauenknecht et al., 2024).

    u is the mean over pairs of members of the geometric Jensen-Shannon divergence. At the first
    step of a call a threshold is set, xi times the zeta-percentile of the finite u, and averaged with
    those of the last 2,000 calls; a rollout lives, and is stored, while u is below it.
    """

    Fields: ClassVar[type] = MacuraFields
    needs_all_members = True
    CALLS: ClassVar[int] = 2000

    def init(self) -> MacuraState:
        """No call yet."""
        return MacuraState(jnp.zeros(self.CALLS), jnp.zeros((), jnp.int32))

    @staticmethod
    def divergence(predictions: Predictions) -> Array:
        """u: (B,). In a form that float32 survives:
        d_ij = sum (m_i - m_j)^2 / (4 (v_i + v_j)) + 1/2 ln((v_i + v_j) / (2 sqrt(v_i v_j))).
        """
        mean, variance = predictions.mean, predictions.variance
        i, j = jnp.triu_indices(mean.shape[0], 1)
        both = variance[i] + variance[j]
        distance = jnp.square(mean[i] - mean[j]) / (4 * both)
        logs = jnp.log(variance)
        spread = 0.5 * (jnp.log(0.5 * both) - 0.5 * (logs[i] + logs[j]))
        return (distance + spread).sum(-1).mean(0)

    def apply(
        self,
        state: MacuraState,
        predictions: Predictions,
        h: Array,
        horizon: Array | int,
        key: Array,
    ) -> tuple[MacuraState, TrustOutput]:
        """Ends rollouts whose members disagree."""
        u = self.divergence(predictions)
        # One infinite or missing u would stay in the thresholds for as many calls.
        counts = jnp.isfinite(u) & predictions.alive
        percentile = jnp.nanpercentile(jnp.where(counts, u, jnp.nan), self.config.zeta)
        begun = MacuraState(
            state.thresholds.at[state.calls % self.CALLS].set(self.config.xi * percentile),
            state.calls + 1,
        )
        first = (h == 0) & counts.any()
        state = MacuraState(*(jnp.where(first, a, b) for a, b in zip(begun, state, strict=True)))
        known = jnp.clip(state.calls, 1, self.CALLS)
        return state, TrustOutput(continue_mask=u < state.thresholds.sum() / known)
