"""The transitions on which the members agree most: M2AC."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from dynajax.config import Config, fields, traced
from dynajax.trust.base import Predictions, TrustOutput, TrustRule, apart
from dynajax.types import Array, UsageError


def _normal_kl(mean: Array, variance: Array, other: Array, other_variance: Array) -> Array:
    """KL(N(mean, variance) | N(other, other_variance)) of diagonal normals: (..., X) -> (...)."""
    terms = jnp.log(other_variance) - jnp.log(variance) - 1
    terms = terms + (variance + jnp.square(mean - other)) / other_variance
    return 0.5 * terms.sum(-1)


@fields
@dataclass(frozen=True)
class M2ACFields:
    """Of `M2AC`."""

    scale: float = traced(1e-3, 0, about="of the penalty, standard deviations of the reward")


class M2AC(TrustRule):
    """The transitions are learned from on which a member agrees most with the others (Pan et al.,
    2020).

    u is the KL divergence of the chosen member from the moments of the others. Of rollouts of H
    steps the lowest (H - h) / (2 (H + 1)) of those that go on are stored at step h, and half where H
    is 1; all go on.
    """

    Fields: ClassVar[type] = M2ACFields
    needs_all_members = True
    figures = ("penalty",)

    @classmethod
    def check(cls, config: Config) -> None:
        """Of one rollout the better half is none."""
        if config.num_parallel_rollouts == 1:
            raise UsageError(
                "--trust=m2ac: it keeps the better half of rollouts beside each other, and here is "
                "one; choose --set rollout.horizon lower, or --set learn.batch higher"
                if config.rollout.fresh
                else "--trust=m2ac: it keeps the better half of rollouts beside each other, and "
                f"--set rollout.batch={config.rollout.batch} is one; choose at least 2"
            )

    @staticmethod
    def divergence(predictions: Predictions) -> Array:
        """u: (B,)."""
        mean, variance = apart(predictions.mean), predictions.variance
        members = jnp.arange(mean.shape[0])[:, None]
        others = (members != predictions.member).astype(mean.dtype)[..., None]
        count = mean.shape[0] - 1
        middle = (others * mean).sum(0) / count
        spread = (others * (variance + jnp.square(mean - middle))).sum(0) / count
        rows = jnp.arange(mean.shape[1])
        chosen = predictions.member, rows
        return _normal_kl(mean[chosen], variance[chosen], middle, spread)

    def apply(
        self, state: Any, predictions: Predictions, h: Array, horizon: Array | int, key: Array
    ) -> tuple[Any, TrustOutput]:
        """Keeps the lowest, and penalises all."""
        u = self.divergence(predictions)
        share = jnp.where(jnp.asarray(horizon) == 1, 0.5, (horizon - h) / (2 * (horizon + 1)))
        counts = jnp.isfinite(u) & predictions.alive
        count = jnp.round(share * counts.sum()).astype(jnp.int32)
        rank = jnp.argsort(jnp.argsort(jnp.where(counts, u, jnp.inf)))
        return state, TrustOutput(keep_mask=rank < count, reward_penalty=self.config.scale * u)
