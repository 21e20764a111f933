"""Rules of trust: which synthetic transitions are kept, and what they count. For one row.

A rule sees what every member of the ensemble predicts, in units of the targets' standard deviation
over the training split, whatever code they are learned in: so its numbers mean the same on every
task and with every fix. `TRUST` is the one place that lists the rules.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dynajax import registry
from dynajax.config import Config, NoFields, fields, static, traced
from dynajax.types import Array, EnvSpec, Model, UsageError


class Predictions(NamedTuple):
    """One step of B rollouts: next state (or its change), then reward, in standard units."""

    mean: Array  # (E, B, D+1) of every member
    variance: Array  # (E, B, D+1)
    member: Array  # (B,) which one made each transition
    sample: Array  # (B, D+1) what it made
    alive: Array | bool = True  # (B,) which of the rollouts go on; True: all


def in_standard_units(
    model: Model,
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


def in_code(model: Model, sample: Array) -> Array:
    """A sample (B, D+1) in standard units as one in the code's z."""
    return sample * model.unit / model.code.scale


class Verdict(NamedTuple):
    """What a rule says of B transitions; None: nothing."""

    alive: Array | None = None  # (B,) bool: the rollout goes on
    store: Array | None = None  # (B,) bool: the transition is learned from
    penalty: Array | None = None  # (B,) off the reward, in its standard deviations
    weight: Array | None = None  # (B,) in the critic's loss


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
    #: Whether its state has a part for each of the rollouts beside each other.
    remembers: ClassVar[bool] = False
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
    ) -> tuple[Any, Verdict]:
        """What is said of step h, from 0, of rollouts of `horizon` steps."""
        return state, Verdict()


@fields
@dataclass(frozen=True)
class PenaltyFields:
    """Of `Penalty`."""

    kind: Literal["noise", "spread"] = static(
        "noise", about="the largest predicted deviation, or how much the members disagree"
    )
    scale: float = traced(1.0, about="lambda, standard deviations of the reward")


class Penalty(Rule):
    """The reward less lambda u (MOPO; Yu et al., 2020).

    u is `noise`, max_e ||sqrt v_e||, or `spread`, the norm of the members' standard deviation of
    their means. With `spread` lambda may be negative: a bonus for what members disagree on.
    """

    Fields: ClassVar[type] = PenaltyFields
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
            u = jnp.sqrt(_apart(predictions.mean).var(0).sum(-1))
        return state, Verdict(penalty=self.own.scale * u)


def _apart(mean: Array) -> Array:
    """Means (E, ...) from the first member's, so that what all agree on is no rounding of float32."""
    return mean - mean[0]


def _normal_kl(mean: Array, variance: Array, other: Array, other_variance: Array) -> Array:
    """KL(N(mean, variance) | N(other, other_variance)) of diagonal normals: (..., X) -> (...)."""
    terms = jnp.log(other_variance) - jnp.log(variance) - 1
    terms = terms + (variance + jnp.square(mean - other)) / other_variance
    return 0.5 * terms.sum(-1)


@fields
@dataclass(frozen=True)
class MacuraFields:
    """Of `Macura`; its authors take 0.3 and 90 on hopper, 0.3 and 95 on walker, 5 and 95 on ant and
    humanoid."""

    xi: float = traced(2.0, 0, about="times the percentile is the threshold")
    zeta: float = traced(95.0, 0, 100, about="percentile over the rollouts' first steps")


class MacuraState(NamedTuple):
    """Thresholds of the last calls, a ring."""

    thresholds: Array  # (T,)
    calls: Array  # () int


class Macura(Rule):
    """Rollouts go on while the members agree (MACURA; Frauenknecht et al., 2024).

    u is the mean over pairs of members of the geometric Jensen-Shannon divergence. At the first
    step of a call a threshold is set, xi times the zeta-percentile of the finite u, and averaged with
    those of the last 2,000 calls; a rollout lives, and is stored, while u is below it.
    """

    Fields: ClassVar[type] = MacuraFields
    asks = True
    CALLS: ClassVar[int] = 2000

    def init(self) -> MacuraState:
        """No call yet."""
        return MacuraState(jnp.zeros(self.CALLS), jnp.zeros((), jnp.int32))

    @staticmethod
    def divergence(predictions: Predictions) -> Array:
        """u: (B,). In a form that float32 survives:
        d_ij = sum (m_i - m_j)^2 / (4 (v_i + v_j)) + 1/2 ln((v_i + v_j) / (2 sqrt(v_i v_j))).
        """
        mean, variance = predictions.mean, predictions.variance
        i, j = jnp.triu_indices(mean.shape[0], 1)
        both = variance[i] + variance[j]
        distance = jnp.square(mean[i] - mean[j]) / (4 * both)
        logs = jnp.log(variance)
        spread = 0.5 * (jnp.log(0.5 * both) - 0.5 * (logs[i] + logs[j]))
        return (distance + spread).sum(-1).mean(0)

    def apply(
        self,
        state: MacuraState,
        predictions: Predictions,
        h: Array,
        horizon: Array | int,
        key: Array,
    ) -> tuple[MacuraState, Verdict]:
        """Ends rollouts whose members disagree."""
        u = self.divergence(predictions)
        # One infinite or missing u would stay in the thresholds for as many calls.
        counts = jnp.isfinite(u) & predictions.alive
        percentile = jnp.nanpercentile(jnp.where(counts, u, jnp.nan), self.own.zeta)
        begun = MacuraState(
            state.thresholds.at[state.calls % self.CALLS].set(self.own.xi * percentile),
            state.calls + 1,
        )
        first = (h == 0) & counts.any()
        state = MacuraState(*(jnp.where(first, a, b) for a, b in zip(begun, state, strict=True)))
        known = jnp.clip(state.calls, 1, self.CALLS)
        return state, Verdict(alive=u < state.thresholds.sum() / known)


@fields
@dataclass(frozen=True)
class M2ACFields:
    """Of `M2AC`."""

    scale: float = traced(1e-3, 0, about="of the penalty, standard deviations of the reward")


class M2AC(Rule):
    """The transitions are learned from on which a member agrees most with the others (Pan et al.,
    2020).

    u is the KL divergence of the chosen member from the moments of the others. Of rollouts of H
    steps the lowest (H - h) / (2 (H + 1)) of those that go on are stored at step h, and half where H
    is 1; all go on.
    """

    Fields: ClassVar[type] = M2ACFields
    asks = True
    figures = ("penalty",)

    @classmethod
    def check(cls, config: Config) -> None:
        """Of one rollout the better half is none."""
        if config.rollouts_beside == 1:
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
        mean, variance = _apart(predictions.mean), predictions.variance
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
    ) -> tuple[Any, Verdict]:
        """Keeps the lowest, and penalises all."""
        u = self.divergence(predictions)
        share = jnp.where(jnp.asarray(horizon) == 1, 0.5, (horizon - h) / (2 * (horizon + 1)))
        counts = jnp.isfinite(u) & predictions.alive
        count = jnp.round(share * counts.sum()).astype(jnp.int32)
        rank = jnp.argsort(jnp.argsort(jnp.where(counts, u, jnp.inf)))
        return state, Verdict(store=rank < count, penalty=self.own.scale * u)


@fields
@dataclass(frozen=True)
class InfopropFields:
    """Of `Infoprop`; its authors' numbers."""

    high: float = traced(
        0.9999, 0, 1, about="quantile of a channel's loss that ends a rollout at once"
    )
    low: float = traced(0.01, 0, 1, about="quantile that, `longest` times, ends it in sum")
    longest: float = traced(100.0, 1, about="steps that the sum is for")


class InfopropState(NamedTuple):
    """What real data say of the losses, and what the running rollouts have lost."""

    high: Array  # (D+1,)
    low: Array  # (D+1,)
    spent: Array  # (B, D+1)


class Infoprop(Rule):
    """Rollouts of the members' common knowledge, while little information is lost (Frauenknecht et
    al., 2025).

    With v = 1 / mean(1/v_e), m = v mean(m_e / v_e), eps = mean((m_e - m)^2) and x a sample of the
    chosen member, the sample is N(m + G (x - m), v eps / (v + eps)), G = v / (v + eps); the loss of
    a channel is max(0, 1/2 log2(2 pi e v eps / (v + eps)) - log2 1e-6) bits.
    """

    Fields: ClassVar[type] = InfopropFields
    asks = True
    remembers = True

    @classmethod
    def check(cls, config: Config) -> None:
        """A loss that is small must not be more than one that is large."""
        if not config.trust.low < config.trust.high:
            raise UsageError(
                f"--set trust.low={config.trust.low:g}: it must be under "
                f"trust.high={config.trust.high:g}"
            )

    RESOLUTION: ClassVar[float] = 1e-6

    def init(self) -> InfopropState:
        """Before the first fit nothing ends a rollout."""
        channels = self.spec.obs_dim + 1
        never = jnp.full(channels, jnp.inf)
        return InfopropState(never, never, jnp.zeros((self.batch, channels)))

    def _common(self, predictions: Predictions) -> tuple[Array, Array, Array, Array]:
        """m, gain, variance of the sample, and loss: (B, D+1) each."""
        mean, variance = predictions.mean, predictions.variance
        v, apart = 1 / (1 / variance).mean(0), _apart(mean)
        m = v * (apart / variance).mean(0)
        epsilon = jnp.square(apart - m).mean(0)
        gain = v / (v + epsilon)
        left = gain * epsilon
        bits = 0.5 * jnp.log2(2 * math.pi * math.e * jnp.maximum(left, 1e-30))
        return mean[0] + m, gain, left, jnp.maximum(0.0, bits - math.log2(self.RESOLUTION))

    def sample(self, predictions: Predictions, h: Array, key: Array) -> Array:
        """What the members have in common of the chosen one's sample."""
        m, gain, left, _ = self._common(predictions)
        noise = jax.random.normal(key, m.shape)
        return m + gain * (predictions.sample - m) + jnp.sqrt(left) * noise

    def calibrate(
        self, state: InfopropState, predictions: Predictions, counts: Array
    ) -> InfopropState:
        """Takes the quantiles of the losses on real data."""
        loss = jnp.where(counts[:, None] > 0, self._common(predictions)[-1], jnp.nan)
        high, low = (jnp.nanquantile(loss, q, axis=0) for q in (self.own.high, self.own.low))
        return state._replace(high=high, low=low)

    def apply(
        self,
        state: InfopropState,
        predictions: Predictions,
        h: Array,
        horizon: Array | int,
        key: Array,
    ) -> tuple[InfopropState, Verdict]:
        """Ends rollouts that lose too much."""
        loss = self._common(predictions)[-1]
        spent = jnp.where(h == 0, 0.0, state.spent) + loss
        lost = (loss > state.high) | (spent > self.own.longest * state.low)
        return state._replace(spent=spent), Verdict(alive=~lost.any(-1))


class Weight(Rule):
    """What members agree on counts more for the critic (WIMLE, 2026).

    w = 1 / (1 + sigma), sigma being the standard deviation of the members' means, of the reward and
    on average over the state's channels. The transition is their mean, without noise.
    """

    asks = True
    weighs = True
    figures = ("weight",)

    def sample(self, predictions: Predictions, h: Array, key: Array) -> Array:
        """The members' mean."""
        return predictions.mean[0] + _apart(predictions.mean).mean(0)

    def apply(
        self, state: Any, predictions: Predictions, h: Array, horizon: Array | int, key: Array
    ) -> tuple[Any, Verdict]:
        """Weighs every transition, and keeps all."""
        std = _apart(predictions.mean).std(0)
        sigma = std[:, -1] + std[:, :-1].mean(-1)
        return state, Verdict(weight=1 / (1 + sigma))


#: By the name that `--trust` takes; a module of one's own adds what it has.
TRUST: dict[str, type[Rule]] = {
    "none": Rule,
    "macura": Macura,
    "m2ac": M2AC,
    "infoprop": Infoprop,
    "penalty": Penalty,
    "weight": Weight,
}


def rule_class(name: str) -> type[Rule]:
    """The rule called `name`, or `module:name`.

    Raises:
      UsageError: there is none.
    """
    return registry.lookup("--trust", TRUST, name)


def rule_of(config: Config, spec: EnvSpec) -> Rule:
    """The rule of a configuration, for one row: its traced fields may be arrays."""
    return rule_class(config.trust_name)(config.trust, spec, config.rollouts_beside)
