"""Rules of trust: which synthetic transitions are kept, and what they count. For one row.

A rule sees what every member of the ensemble predicts, in units of the targets' standard deviation
over the training split, whatever code they are learned in: so its numbers mean the same on every
task and with every fix. `TRUST` is the one place that lists the rules.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp

from dynajax import registry
from dynajax.config import Config, fields, static, traced
from dynajax.types import Array, EnvSpec, Model, UsageError


class Predictions(NamedTuple):
    """One step of B rollouts: next state (or its change), then reward, in standard units."""

    mean: Array  # (E, B, D+1) of every member
    variance: Array  # (E, B, D+1)
    member: Array  # (B,) which one made each transition
    sample: Array  # (B, D+1) what it made


def in_standard_units(
    model: Model, mean: Array, log_variance: Array, member: Array, z: Array
) -> Predictions:
    """Predictions in the code's z as a rule sees them; arguments as the fields of `Predictions`."""
    ratio = model.code.scale / model.unit
    return Predictions(mean * ratio, jnp.exp(log_variance) * jnp.square(ratio), member, z * ratio)


def in_code(model: Model, sample: Array) -> Array:
    """A sample (B, D+1) in standard units as one in the code's z."""
    return sample * model.unit / model.code.scale


class Verdict(NamedTuple):
    """What a rule says of B transitions; None: nothing."""

    alive: Array | None = None  # (B,) bool: the rollout goes on
    store: Array | None = None  # (B,) bool: the transition is learned from
    penalty: Array | None = None  # (B,) off the reward, in its standard deviations
    weight: Array | None = None  # (B,) in the critic's loss
    sample: Array | None = None  # (B, D+1) in place of the given one


@fields
@dataclass(frozen=True)
class NoFields:
    """Of a rule that has nothing to set."""


@dataclass(frozen=True)
class Rule:
    """A rule of one row: pure methods on a state of its own, which lives in the `Row`.

    The base class trusts everything, and asks for nothing.

    Attributes:
      own: the rule's own fields, a `Fields`, set as `--set trust.FIELD`.
      spec: the task; batch: B, rollouts beside each other.
    """

    own: Any
    spec: EnvSpec
    batch: int

    #: A dataclass made by `config.fields`, every field with a default.
    Fields: ClassVar[type] = NoFields
    #: Whether all members are evaluated, and `apply` is called.
    asks: ClassVar[bool] = False
    #: Whether its verdicts have weights, for which the synthetic ring then has a column.
    weighs: ClassVar[bool] = False
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

    def apply(
        self, state: Any, predictions: Predictions, h: Array, horizon: Array | int, key: Array
    ) -> tuple[Any, Verdict]:
        """What is said of step h, from 0, of rollouts of `horizon` steps."""
        return state, Verdict()


@fields
@dataclass(frozen=True)
class PenaltyFields:
    """Of `Penalty`."""

    kind: Literal["noise", "spread"] = static("noise")
    scale: float = traced(1.0)  # lambda, standard deviations of the reward


class Penalty(Rule):
    """The reward less lambda u (MOPO; Yu et al., 2020).

    u is `noise`, max_e ||sqrt v_e||, or `spread`, the norm of the members' standard deviation of
    their means. With `spread` lambda may be negative: a bonus for what members disagree on.
    """

    Fields = PenaltyFields
    asks = True
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
    ) -> tuple[Any, Verdict]:
        """Penalises every transition, and keeps all."""
        if self.own.kind == "noise":
            u = jnp.sqrt(predictions.variance.sum(-1)).max(0)
        else:
            u = jnp.sqrt(predictions.mean.var(0).sum(-1))
        return state, Verdict(penalty=self.own.scale * u)


#: By the name that `--trust` takes; a module of one's own adds what it has.
TRUST: dict[str, type[Rule]] = {"none": Rule, "penalty": Penalty}


def rule_class(name: str) -> type[Rule]:
    """The rule called `name`, or `module:name`.

    Raises:
      UsageError: there is none.
    """
    return registry.lookup("--trust", TRUST, name)


def rule_of(config: Config, spec: EnvSpec) -> Rule:
    """The rule of a configuration, for one row: its traced fields may be arrays."""
    return rule_class(config.trust_name)(config.trust, spec, config.rollout.batch)
