"""M2AC: learn from the transitions on which the members agree most."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynajax.config import Config, fields, traced
from dynajax.trust.base import Predictions, TrustOutput, TrustRule, relative_to_first
from dynajax.types import UsageError


def _normal_kl(mean: Array, variance: Array, other: Array, other_variance: Array) -> Array:
    """Return KL(N(mean, variance) | N(other, other_variance)) of diagonal normals, (..., X) -> (...)."""
    terms = jnp.log(other_variance) - jnp.log(variance) - 1
    terms = terms + (variance + jnp.square(mean - other)) / other_variance
    return 0.5 * terms.sum(-1)


@fields
@dataclass(frozen=True)
class M2ACFields:
    """Settings of `M2AC`."""

    scale: float = traced(1e-3, 0, about="penalty coefficient, standard deviations of the reward")


class M2AC(TrustRule):
    """Keep the transitions whose member agrees best with the others (Pan et al., 2020).

    u is the KL divergence of the chosen member from the moments of the others. In rollouts of H
    steps, the lowest (H - h) / (2 (H + 1)) of the running rollouts are kept at step h (half of them
    if H is 1); all continue. The reward loses `scale` u.
    """

    Fields: ClassVar[type] = M2ACFields
    needs_all_members = True
    needs_variance = True
    metrics = ("penalty",)

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a single rollout, whose better half is empty."""
        if config.num_parallel_rollouts == 1:
            raise UsageError(
                "--trust=m2ac: it keeps the better half of the parallel rollouts, and there is only "
                "one; choose --set rollout.horizon lower, or --set learn.batch higher"
                if not config.is_buffered
                else "--trust=m2ac: it keeps the better half of the parallel rollouts, and "
                f"--set rollout.batch={config.rollout.batch} is only one; choose at least 2"
            )

    @staticmethod
    def divergence(predictions: Predictions) -> Float[Array, " B"]:
        """Return u."""
        mean, variance = relative_to_first(predictions.mean), predictions.variance
        members = jnp.arange(mean.shape[0])[:, None]
        others = (members != predictions.member).astype(mean.dtype)[..., None]
        count = mean.shape[0] - 1
        middle = (others * mean).sum(0) / count
        total = (others * (variance + jnp.square(mean - middle))).sum(0) / count
        rollouts = jnp.arange(mean.shape[1])
        chosen = predictions.member, rollouts
        return _normal_kl(mean[chosen], variance[chosen], middle, total)

    def apply(
        self,
        state: Any,
        predictions: Predictions,
        h: Int[Array, ""],
        horizon: Array | int,
        key: Array,
    ) -> tuple[Any, TrustOutput]:
        """Keep the transitions with the lowest u, and penalize all of them."""
        u = self.divergence(predictions)
        share = jnp.where(jnp.asarray(horizon) == 1, 0.5, (horizon - h) / (2 * (horizon + 1)))
        valid = jnp.isfinite(u) & predictions.active
        count = jnp.round(share * valid.sum()).astype(jnp.int32)
        rank = jnp.argsort(jnp.argsort(jnp.where(valid, u, jnp.inf)))
        return state, TrustOutput(keep_mask=rank < count, reward_penalty=self.config.scale * u)
