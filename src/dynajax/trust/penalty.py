"""Rewards less what is uncertain: MOPO, and a bonus."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from dynajax.config import Config, fields, static, traced
from dynajax.trust.base import Predictions, TrustOutput, TrustRule, apart
from dynajax.types import Array, UsageError


@fields
@dataclass(frozen=True)
class PenaltyFields:
    """Of `Penalty`."""

    kind: Literal["noise", "spread"] = static(
        "noise", about="the largest predicted deviation, or how much the members disagree"
    )
    scale: float = traced(1.0, about="lambda, standard deviations of the reward")


class Penalty(TrustRule):
    """The reward less lambda u (MOPO; Yu et al., 2020).

    u is `noise`, max_e ||sqrt v_e||, or `spread`, the norm of the members' standard deviation of
    their means. With `spread` lambda may be negative: a bonus for what members disagree on.
    """

    Fields: ClassVar[type] = PenaltyFields
    needs_all_members = True
    figures = ("penalty",)

    @classmethod
    def check(cls, config: Config) -> None:
        """A bonus is for what members disagree on."""
        if config.trust.scale < 0 and config.trust.kind == "noise":
            raise UsageError(
                f"--set trust.scale={config.trust.scale:g}: a negative one is a bonus, which goes "
                "with --set trust.kind=spread only"
            )

    def apply(
        self, state: Any, predictions: Predictions, h: Array, horizon: Array | int, key: Array
    ) -> tuple[Any, TrustOutput]:
        """Penalises every transition, and keeps all."""
        if self.config.kind == "noise":
            u = jnp.sqrt(predictions.variance.sum(-1)).max(0)
        else:
            u = jnp.sqrt(apart(predictions.mean).var(0).sum(-1))
        return state, TrustOutput(reward_penalty=self.config.scale * u)
