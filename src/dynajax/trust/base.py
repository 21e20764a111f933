"""What a trust rule is: which synthetic transitions are kept, and how much they count.

A rule sees the predictions of every member of the ensemble in units of the standard deviation of
s' - s and of the reward over the training split, whatever target transform the model learns with.
So disagreement has one unit on every task and with every fix; predicted variances have it too, but
the bounds of the log-variance are those of the model's own targets. Rules are written for one
learner. To add one, subclass `TrustRule` in one file and add it to `TRUST`, or name it as
`--trust=module:name`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynajax.config import Config, NoFields
from dynajax.types import DataStats, EnvSpec


class Values(NamedTuple):
    """The agent's critic on B transitions, for rules with `needs_values`."""

    #: (transitions (B, Z) in standard units) -> TD targets r + gamma d V(s') (B,)
    td_target: Callable[[Array], Array]
    current: Float[Array, " B"]  # Q(s, a)


class Predictions(NamedTuple):
    """Predictions for one step of B rollouts: next state (or its change), then reward."""

    mean: Float[Array, "E B Z"]
    variance: Any  # (E, B, Z); None if the model predicts no variance
    member: Int[Array, " B"]  # the member that made each transition
    sample: Float[Array, "B Z"]  # the transition that it made
    active: Bool[Array, " B"] | bool = True  # rollouts that have not ended; True: all
    values: Values | None = None  # None unless the rule needs them


def standard_units(stats: DataStats) -> Float[Array, " Z"]:
    """Return the factor from model targets z to standard units."""
    return stats.transform.scale / stats.change_std


def to_standard_units(
    stats: DataStats,
    mean: Float[Array, "E B Z"],
    log_variance: Float[Array, "E B Z"] | None,
    member: Int[Array, " B"],
    z: Float[Array, "B Z"],
    active: Bool[Array, " B"] | bool = True,
) -> Predictions:
    """Return predictions of model targets z in standard units."""
    ratio = standard_units(stats)
    variance = None if log_variance is None else jnp.exp(log_variance) * jnp.square(ratio)
    return Predictions(mean * ratio, variance, member, z * ratio, active)


def to_normalized(stats: DataStats, sample: Float[Array, "B Z"]) -> Float[Array, "B Z"]:
    """Return a sample in standard units as model targets z."""
    return sample * stats.change_std / stats.transform.scale


class TrustOutput(NamedTuple):
    """Decisions about B transitions; None leaves them as they are."""

    continue_mask: Bool[Array, " B"] | None = None  # the rollout continues
    keep_mask: Bool[Array, " B"] | None = None  # the transition is learned from
    reward_penalty: Float[Array, " B"] | None = None  # subtracted, in standard deviations
    weight: Float[Array, " B"] | None = None  # in the critic's loss


def relative_to_first(mean: Float[Array, " E *X"]) -> Float[Array, " E *X"]:
    """Subtract the first member's means, so that float32 rounding is no disagreement."""
    return mean - mean[0]


@dataclass(frozen=True)
class TrustRule:
    """A trust rule of one learner: pure methods on its own state in the `LearnerState`.

    The base class keeps every transition and needs no predictions.

    Attributes:
      config: the rule's own settings, a `Fields`, set as `--set trust.FIELD`.
      spec: the task.
      batch: B, rollouts that run in parallel.
    """

    config: Any
    spec: EnvSpec
    batch: int

    #: A dataclass decorated with `config.fields`, with a default for every field.
    Fields: ClassVar[type] = NoFields
    #: Whether all members are evaluated, and `apply` is called.
    needs_all_members: ClassVar[bool] = False
    #: Whether the rule reads predicted variances, which a deterministic model does not have.
    needs_variance: ClassVar[bool] = False
    #: Whether it compares values, see `Predictions.values`.
    needs_values: ClassVar[bool] = False
    #: Whether its output has weights, for which the synthetic buffer then has a column.
    uses_weights: ClassVar[bool] = False
    #: Whether its state has a part for each parallel rollout.
    per_rollout_state: ClassVar[bool] = False
    #: Outputs whose means over kept transitions are logged: "penalty", "weight".
    metrics: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a configuration that the rule cannot work with.

        Raises:
          UsageError: one line that names the setting and the remedy.
        """

    @classmethod
    def reads_variance(cls, config: Config) -> bool:
        """Return whether the rule reads predicted variances with this configuration."""
        return cls.needs_variance

    def init(self) -> Any:
        """Return the state before the first fit."""
        return None

    def calibrate(self, state: Any, predictions: Predictions, mask: Float[Array, " B"]) -> Any:
        """Return the state after a fit.

        Args:
          predictions: for B holdout transitions, `sample` being the truth.
          mask: 1 for a transition, 0 for padding.
        """
        return state

    def sample(
        self, predictions: Predictions, h: Int[Array, ""], key: Array
    ) -> Float[Array, "B Z"] | None:
        """Return a sample that replaces the chosen member's at step h, from 0, or None.

        Each dimension must depend on predictions of that dimension only: with
        `model.reward_from=next_state` the reward is sampled after the state, with the same key.
        """
        return None

    def apply(
        self,
        state: Any,
        predictions: Predictions,
        h: Int[Array, ""],
        horizon: Array | int,
        key: Array,
    ) -> tuple[Any, TrustOutput]:
        """Decide about step h, from 0, of rollouts of `horizon` steps."""
        return state, TrustOutput()
