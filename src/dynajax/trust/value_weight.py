"""Value weight: transitions count as far as the model predicts the critic's targets."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynajax.config import Config, fields, static
from dynajax.trust.base import Predictions, TrustOutput, TrustRule
from dynajax.types import UsageError


@fields
@dataclass(frozen=True)
class ValueWeightFields:
    """Settings of `ValueWeight`."""

    form: Literal["inverse", "linear"] = static(
        "inverse", about="weight of a relative error e: inverse 1/(1 + e), linear max(0, 1 - e)"
    )
    per_transition: bool = static(
        False, about="weight by the members' disagreement about each TD target, not by the holdout"
    )


class ValueWeightState(NamedTuple):
    """What the last fit has shown on the holdout."""

    error: Float[Array, ""]  # variance of the TD targets' errors, relative to that of the targets
    td_variance: Float[Array, ""]  # of the TD errors


class ValueWeight(TrustRule):
    """Weight synthetic transitions by the model's error in units of value (this project).

    With y = r + gamma d V(s') of the present critic, the error is e = Var(y_model - y) / Var(y) over
    the holdout, the mean over members. With `per_transition` it is that of each transition, the
    variance of y over the members relative to the variance of TD errors y - Q(s, a) on the holdout.
    Real transitions have weight 1.
    """

    Fields: ClassVar[type] = ValueWeightFields
    needs_all_members = True
    needs_values = True
    uses_weights = True
    metrics = ("weight",)

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a configuration in which all transitions of a minibatch share one weight.

        Adam is invariant to the scale of a loss.
        """
        # A buffer that is not cleared has the weights of several fits.
        several = config.is_buffered and not getattr(config.source, "regenerate_every", 0)
        if config.trust.per_transition or several:
            return
        causes = {
            f"rollout.source={config.rollout.source}": not config.has_rollouts,
            f"rollout.real_fraction={config.rollout.real_fraction:g}": not config.real_batch,
        }
        setting = next((name for name, holds in causes.items() if holds), None)
        if setting is not None:
            raise UsageError(
                f"--trust=value_weight: with --set {setting} all transitions have the same weight, "
                "which changes nothing; choose --set trust.per_transition=true, or --set "
                "rollout.source=on_the_fly with --set rollout.real_fraction=0.5"
            )

    def init(self) -> ValueWeightState:
        """Return the state before the first fit."""
        return ValueWeightState(jnp.zeros(()), jnp.ones(()))

    def calibrate(
        self, state: Any, predictions: Predictions, mask: Float[Array, " B"]
    ) -> ValueWeightState:
        """Compare TD targets of the members' means with those of real transitions."""
        values = predictions.values
        assert values is not None
        real = values.td_target(predictions.sample)
        # One member after the other, because the critics' hidden layers of all are much memory.
        model = jax.lax.map(values.td_target, predictions.mean)
        errors = jax.vmap(_variance, (0, None))(model - real, mask)
        error = _ratio(errors.mean(), _variance(real, mask))
        return ValueWeightState(error, _variance(real - values.current, mask))

    def apply(
        self,
        state: Any,
        predictions: Predictions,
        h: Int[Array, ""],
        horizon: Array | int,
        key: Array,
    ) -> tuple[Any, TrustOutput]:
        """Weight every transition, and keep all."""
        error = jnp.broadcast_to(state.error, predictions.member.shape)
        if self.config.per_transition:
            assert predictions.values is not None
            targets = jax.vmap(predictions.values.td_target)(predictions.mean)
            error = _ratio((targets - targets[0]).var(0), state.td_variance)
        weight = 1 / (1 + error)
        if self.config.form == "linear":
            weight = jnp.maximum(0.0, 1 - error)
        # A member may have left the finite numbers where the others have not.
        return state, TrustOutput(weight=jnp.where(jnp.isfinite(error), weight, 0.0))


def _variance(values: Float[Array, " B"], mask: Float[Array, " B"]) -> Float[Array, ""]:
    """Return the variance over transitions that count."""
    total = jnp.maximum(mask.sum(), 1.0)
    mean = (mask * values).sum() / total
    return (mask * jnp.square(values - mean)).sum() / total


def _ratio(error: Float[Array, "*B"], variance: Float[Array, ""]) -> Float[Array, "*B"]:
    """Return the relative error: 0 without an error, whatever the variance."""
    return jnp.where(error == 0, 0.0, error / variance)
