"""MOPO: rewards less a penalty for uncertainty; or a bonus for it."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from dynajax.config import Config, fields, static, traced
from dynajax.trust.base import Predictions, TrustOutput, TrustRule, relative_to_first
from dynajax.types import UsageError


@fields
@dataclass(frozen=True)
class PenaltyFields:
    """Settings of `Penalty`."""

    kind: Literal["aleatoric", "epistemic"] = static(
        "aleatoric", about="uncertainty: largest predicted deviation, or disagreement of members"
    )
    scale: float = traced(1.0, about="penalty coefficient, standard deviations of the reward")


class Penalty(TrustRule):
    """Subtract lambda u from the reward (MOPO; Yu et al., 2020).

    u is max_e ||sqrt v_e|| (`aleatoric`), or the norm of the standard deviation of the members'
    means (`epistemic`). With `epistemic`, a negative lambda is a bonus for disagreement.
    """

    Fields: ClassVar[type] = PenaltyFields
    needs_all_members = True
    metrics = ("penalty",)

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a bonus for noise, and predicted variances of a model that has none."""
        if config.trust.kind == "epistemic":
            return
        if config.trust.scale < 0:
            raise UsageError(
                f"--set trust.scale={config.trust.scale:g}: a negative one is a bonus, which needs "
                "--set trust.kind=epistemic"
            )
        if config.model.likelihood == "deterministic":
            raise UsageError(
                "--set trust.kind=aleatoric: a deterministic model predicts no variance; choose "
                "--set trust.kind=epistemic, or --set model.likelihood=gaussian"
            )

    @classmethod
    def reads_variance(cls, config: Config) -> bool:
        """Return whether the penalty is for predicted noise."""
        return config.trust.kind == "aleatoric"

    def apply(
        self,
        state: Any,
        predictions: Predictions,
        h: Int[Array, ""],
        horizon: Array | int,
        key: Array,
    ) -> tuple[Any, TrustOutput]:
        """Penalize every transition, and keep all."""
        if self.config.kind == "aleatoric":
            u = jnp.sqrt(predictions.variance.sum(-1)).max(0)
        else:
            u = jnp.sqrt(relative_to_first(predictions.mean).var(0).sum(-1))
        return state, TrustOutput(reward_penalty=self.config.scale * u)
