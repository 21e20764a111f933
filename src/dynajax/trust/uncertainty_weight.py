"""WIMLE: transitions on which the members agree count more."""

from typing import Any

from jaxtyping import Array, Float, Int

from dynajax.config import Config
from dynajax.trust.base import Predictions, TrustOutput, TrustRule, relative_to_first
from dynajax.types import UsageError


class UncertaintyWeight(TrustRule):
    """Weight transitions in the critic's loss by the members' agreement (WIMLE, 2026).

    w = 1 / (1 + sigma), where sigma is the standard deviation of the members' means, that of the
    reward plus the average over the state's dimensions. The transition is the mean of the members'
    means, without noise.
    """

    needs_all_members = True
    uses_weights = True
    metrics = ("weight",)

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse variants that differ in the noise only, because transitions have none."""
        varied = {path for variant in config.variants for path, _ in variant.values}
        for path in sorted(varied & {"rollout.state_noise", "rollout.reward_noise"}):
            raise UsageError(
                f"--vary {path}: with --trust=uncertainty_weight a transition is the members' mean, "
                "without noise; leave it out, or choose another rule"
            )

    def sample(
        self, predictions: Predictions, h: Int[Array, ""], key: Array
    ) -> Float[Array, "B Z"]:
        """Return the members' mean."""
        return predictions.mean[0] + relative_to_first(predictions.mean).mean(0)

    def apply(
        self,
        state: Any,
        predictions: Predictions,
        h: Int[Array, ""],
        horizon: Array | int,
        key: Array,
    ) -> tuple[Any, TrustOutput]:
        """Weight every transition, and keep all."""
        std = relative_to_first(predictions.mean).std(0)
        sigma = std[:, -1] + std[:, :-1].mean(-1)
        return state, TrustOutput(weight=1 / (1 + sigma))
