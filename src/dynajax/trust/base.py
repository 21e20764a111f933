"""What a rule of trust is: which synthetic transitions are kept, and what they count. For one row.

A rule sees what every member of the ensemble predicts, in units of the targets' standard deviation
over the training split, whatever code they are learned in: so its numbers mean the same on every
task and with every fix.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from dynajax.config import Config, NoFields
from dynajax.types import Array, EnvSpec, ModelState


class Predictions(NamedTuple):
    """One step of B rollouts: next state (or its change), then reward, in standard units."""

    mean: Array  # (E, B, D+1) of every member
    variance: Array  # (E, B, D+1)
    member: Array  # (B,) which one made each transition
    sample: Array  # (B, D+1) what it made
    alive: Array | bool = True  # (B,) which of the rollouts go on; True: all


def to_standard_units(
    model: ModelState,
    mean: Array,
    log_variance: Array,
    member: Array,
    z: Array,
    alive: Array | bool = True,
) -> Predictions:
    """Predictions in the code's z as a rule sees them; arguments as the fields of `Predictions`."""
    ratio = model.code.scale / model.unit
    variance = jnp.exp(log_variance) * jnp.square(ratio)
    return Predictions(mean * ratio, variance, member, z * ratio, alive)


def to_normalized(model: ModelState, sample: Array) -> Array:
    """A sample (B, D+1) in standard units as one in the code's z."""
    return sample * model.unit / model.code.scale


class TrustOutput(NamedTuple):
    """What a rule says of B transitions; None: nothing."""

    continue_mask: Array | None = None  # (B,) bool: the rollout goes on
    keep_mask: Array | None = None  # (B,) bool: the transition is learned from
    reward_penalty: Array | None = None  # (B,) off the reward, in its standard deviations
    weight: Array | None = None  # (B,) in the critic's loss


def apart(mean: Array) -> Array:
    """Means (E, ...) from the first member's, so that what all agree on is no rounding of float32."""
    return mean - mean[0]


@dataclass(frozen=True)
class TrustRule:
    """A rule of one row: pure methods on a state of its own, which lives in the `Row`.

    The base class trusts everything, and asks for nothing.

    Attributes:
      own: the rule's own fields, a `Fields`, set as `--set trust.FIELD`.
      spec: the task; batch: B, rollouts beside each other.
    """

    config: Any
    spec: EnvSpec
    batch: int

    #: A dataclass made by `config.fields`, every field with a default.
    Fields: ClassVar[type] = NoFields
    #: Whether all members are evaluated, and `apply` is called.
    needs_all_members: ClassVar[bool] = False
    #: Whether its verdicts have weights, for which the synthetic ring then has a column.
    uses_weights: ClassVar[bool] = False
    #: Whether its state has a part for each of the rollouts beside each other.
    per_rollout_state: ClassVar[bool] = False
    #: Which of its verdicts' means are logged, of penalty and weight.
    figures: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuses a configuration that the rule cannot work with.

        Raises:
          UsageError: with what would be right.
        """

    def init(self) -> Any:
        """The state before the first fit."""
        return None

    def calibrate(self, state: Any, predictions: Predictions, counts: Array) -> Any:
        """The state after a fit.

        Args:
          predictions: of B transitions of the holdout, `sample` being the truth.
          counts: (B,) 1 for a transition, 0 for filler.
        """
        return state

    def sample(self, predictions: Predictions, h: Array, key: Array) -> Array | None:
        """What takes the sample's place at step h, from 0: (B, D+1), or None: nothing.

        Each channel's by that channel alone: where the reward is read from the next state, the
        reward's is asked for when the state has been sampled, with the same key.
        """
        return None

    def apply(
        self, state: Any, predictions: Predictions, h: Array, horizon: Array | int, key: Array
    ) -> tuple[Any, TrustOutput]:
        """What is said of step h, from 0, of rollouts of `horizon` steps."""
        return state, TrustOutput()
