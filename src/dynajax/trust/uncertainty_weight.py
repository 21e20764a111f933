"""What members agree on counts more: WIMLE."""

from typing import Any

from dynajax.trust.base import Predictions, TrustOutput, TrustRule, apart
from dynajax.types import Array


class UncertaintyWeight(TrustRule):
    """What members agree on counts more for the critic (WIMLE, 2026).

    w = 1 / (1 + sigma), sigma being the standard deviation of the members' means, of the reward and
    on average over the state's channels. The transition is their mean, without noise.
    """

    needs_all_members = True
    uses_weights = True
    figures = ("weight",)

    def sample(self, predictions: Predictions, h: Array, key: Array) -> Array:
        """The members' mean."""
        return predictions.mean[0] + apart(predictions.mean).mean(0)

    def apply(
        self, state: Any, predictions: Predictions, h: Array, horizon: Array | int, key: Array
    ) -> tuple[Any, TrustOutput]:
        """Weighs every transition, and keeps all."""
        std = apart(predictions.mean).std(0)
        sigma = std[:, -1] + std[:, :-1].mean(-1)
        return state, TrustOutput(weight=1 / (1 + sigma))
