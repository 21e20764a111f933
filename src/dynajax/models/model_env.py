"""The learned model as a batch of environments: short rollouts of a policy in the ensemble."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dynajax.config import Config
from dynajax.models import ensemble, targets
from dynajax.models.base import DynamicsModel, Gaussian, replace_reward
from dynajax.trust import (
    Predictions,
    TrustOutput,
    TrustRule,
    Values,
    standard_units,
    to_normalized,
    to_standard_units,
)
from dynajax.types import EnvSpec, Metrics, Minibatch, ModelState, Transition

#: (observations (B, D), noise) -> actions (B, A) and their log-densities (B,)
Policy = Callable[[Array, Any], tuple[Array, Array]]


class Critic(NamedTuple):
    """The agent's values, for trust rules that compare them."""

    q: Callable[[Array, Array], Array]  # observations (B, D), actions (B, A) -> (B,)
    v: Callable[[Array], Array]  # observations (B, D) -> values of the policy (B,)


class StepNoise(NamedTuple):
    """Random numbers of one step of B rollouts."""

    key: Array  # of the trust rule
    action_key: Array  # of random actions
    action: Any  # of the policy
    order: UInt32[Array, " K"]  # of the elites, see `_assign_members`
    prediction: Float[Array, "B Z"]  # standard normal


class ModelStep(NamedTuple):
    """One step of B rollouts."""

    transition: Transition  # leaves (B, ...)
    continue_mask: Bool[Array, " B"]  # finite and trusted, so the rollout may continue
    keep_mask: Bool[Array, " B"]  # may be learned from
    weight: Float[Array, " B"] | None  # in the critic's loss; None if the trust rule sets none
    penalty: Float[Array, " B"] | None  # what the trust rule subtracted from the reward
    log_prob: Float[Array, " B"]  # of the policy's action


class RolloutCarry(NamedTuple):
    """What changes from step to step of B rollouts."""

    output: Any  # what `visit` collects
    trust: Any  # the trust rule's state
    obs: Float[Array, "B D"]
    active: Bool[Array, " B"]  # rollouts that have not ended
    metrics: Metrics


#: (step h from 0, the carry with the new trust state, step h) -> the carry
Visit = Callable[[Array | int, RolloutCarry, ModelStep], RolloutCarry]

#: (step h from 0, what is stored so far, the transitions of step h) -> what is stored then
Store = Callable[[Array | int, Any, Minibatch], Any]


@dataclass(frozen=True)
class ModelEnv:
    """The model and the policy of one learner.

    Attributes:
      config: the learner's; traced fields may be arrays.
      spec: the task.
      rule: the trust rule.
      dynamics: the dynamics model.
      state: its ensemble; the members that predictions need, see `select_members`.
      policy: acts in the rollouts.
      critic: its values.
      action_noise: draws the policy's noise from a key and the shape (B,).
    """

    config: Config
    spec: EnvSpec
    rule: TrustRule
    dynamics: DynamicsModel
    state: ModelState
    policy: Policy
    critic: Critic | None = None
    action_noise: Callable[[Array, tuple[int, ...]], Any] = lambda key, shape: key

    def select_members(self) -> ModelEnv:
        """Return the environment with the members that predictions need: elites, or all of them.

        Without this, XLA would gather the elites' weights again at every step of every rollout.
        """
        if self.rule.needs_all_members:
            return self
        return dataclasses.replace(self, state=ensemble.select_elites(self.state))

    def with_policy(self, policy: Policy, critic: Critic) -> ModelEnv:
        """Return the environment in which another policy acts."""
        return dataclasses.replace(self, policy=policy, critic=critic)

    def values(self, obs: Float[Array, "B D"], action: Float[Array, "B A"]) -> Values:
        """Return the critic on transitions from B states, in the units of trust rules."""
        assert self.critic is not None
        v, stats = self.critic.v, self.state.stats

        def td_target(sample: Float[Array, "B Z"]) -> Float[Array, " B"]:
            next_obs, reward = targets.decode(stats.transform, obs, to_normalized(stats, sample))
            discount = self.config.learn.discount * self._alive(obs, action, next_obs)
            return reward + discount * v(next_obs)

        return Values(td_target, self.critic.q(obs, action))

    def _with_values(
        self, predictions: Predictions, obs: Float[Array, "B D"], action: Float[Array, "B A"]
    ) -> Predictions:
        """Return predictions with the critic, each member's reward given its own next state.

        A TD target has the member's next state too, so its reward must not be that of another one.
        """
        stats = self.state.stats
        if self.dynamics.reward_from_next_state:
            own = ensemble.predict_all(self.dynamics, self.state, obs, action)
            mean = own.mean * standard_units(stats)
            predictions = predictions._replace(mean=mean)
        return predictions._replace(values=self.values(obs, action))

    def _alive(
        self, obs: Float[Array, "B D"], action: Float[Array, "B A"], next_obs: Float[Array, "B D"]
    ) -> Float[Array, " B"]:
        """Return 0 for transitions that terminate, otherwise 1."""
        if self.spec.termination is None:
            return jnp.ones(obs.shape[0])
        return 1.0 - jax.vmap(self.spec.termination)(obs, action, next_obs).astype(jnp.float32)

    def collect(
        self,
        trust: Any,
        obs: Float[Array, "B D"],
        length: Array | int,
        noise: Array | StepNoise,
        store: Store,
        output: Any,
        *,
        longest: int,
        unroll: bool = False,
    ) -> tuple[Any, Any, Metrics]:
        """Roll out the policy for `length` steps, and `store` the transitions of every step.

        A rollout ends at a termination, where the model leaves the finite numbers, or where the
        trust rule ends it; its later transitions are invalid.

        Args:
          trust: the trust rule's state.
          obs: where the rollouts start.
          noise, unroll: as for `rollout`.
          output: what is stored before the first step.
          longest: an upper bound of `length`, for the metrics of single steps.

        Returns:
          The trust rule's state, what is stored, and metrics.
        """

        def visit(h: Array | int, carry: RolloutCarry, step: ModelStep) -> RolloutCarry:
            keep, active, obs = _update_masks(carry, step)
            stored = store(h, carry.output, Minibatch(step.transition, keep, step.weight))
            metrics = _accumulate_metrics(carry.metrics, h, keep, step)
            return RolloutCarry(stored, carry.trust, obs, active, metrics)

        active = jnp.ones(obs.shape[0], bool)
        carry = RolloutCarry(output, trust, obs, active, _init_metrics(self.rule, longest))
        carry = self.rollout(carry, length, noise, visit, unroll=unroll)
        metrics = rollout_metrics(self.rule, carry.metrics, active.size, length)
        return carry.trust, carry.output, metrics

    def rollout(
        self,
        carry: RolloutCarry,
        length: Array | int,
        noise: Array | StepNoise,
        visit: Visit,
        *,
        valid: Bool[Array, " B"] | None = None,
        unroll: bool = False,
    ) -> RolloutCarry:
        """Roll out the policy for `length` steps from `carry.obs`, and `visit` every step.

        Args:
          carry: before the first step.
          noise: of all steps, leaves (H, ...), or a key, with h folded into it for step h.
          visit: takes each step, and decides which rollouts continue and from where.
          valid: rollouts that count for the trust rule; all if not given.
          unroll: unrolls the steps in the program; `length` must then be a Python number.
        """

        def body(h: Array | int, carry: RolloutCarry) -> RolloutCarry:
            active = carry.active if valid is None else carry.active & valid
            if isinstance(noise, StepNoise):
                drawn: Any = jax.tree.map(lambda x: x[h], noise)
            else:
                drawn = jax.random.fold_in(noise, h)
            trust, step = self.step(carry.trust, carry.obs, active, h, length, drawn)
            return visit(h, carry._replace(trust=trust), step)

        if not unroll:
            return jax.lax.fori_loop(0, length, body, carry)
        for h in range(int(length)):
            carry = body(h, carry)
        return carry

    def draw(self, key: Array, batch: int) -> StepNoise:
        """Draw the random numbers of one step of B rollouts."""
        action_key, order_key, noise_key = jax.random.split(key, 3)
        return StepNoise(
            key=noise_key,
            action_key=action_key,
            action=self.action_noise(action_key, (batch,)),
            order=jax.random.bits(jax.random.split(order_key)[1], self.state.elites.shape),
            prediction=jax.random.normal(noise_key, (batch, self.spec.obs_dim + 1)),
        )

    def draw_rollout(self, key: Array, length: int, batch: int) -> StepNoise:
        """Draw the random numbers of all steps of B rollouts, leaves (H, ...)."""
        steps = jnp.arange(length)
        return jax.vmap(lambda h: self.draw(jax.random.fold_in(key, h), batch))(steps)

    def step(
        self,
        trust: Any,
        obs: Float[Array, "B D"],
        active: Bool[Array, " B"],
        h: Array | int,
        length: Array | int,
        noise: Array | StepNoise,
    ) -> tuple[Any, ModelStep]:
        """Take one step from every state, with state and reward sampled from the model.

        Every elite predicts an equal share of the states (the last one fewer, if they do not divide
        evenly), and the shares are redrawn at each call. The states were drawn independently, so
        this is one random elite per state; and each elite computes only its own share, unless the
        trust rule needs the predictions of all members.

        Args:
          trust: the trust rule's state.
          active: rollouts that have not ended; the others are computed and ignored.
          h, length: this step, from 0, of rollouts of so many steps.
          noise: from `draw`, or the key to draw it from.

        Returns:
          The trust rule's state, and the step.
        """
        chex.assert_shape(obs, (None, self.spec.obs_dim))
        if not isinstance(noise, StepNoise):
            noise = self.draw(noise, obs.shape[0])
        action, log_prob = self._act(obs, noise)
        members = _assign_members(noise.order, self.state.elites, obs.shape[0])
        prediction = self._predict(members, self.dynamics.predict_joint, obs, action)
        step = jnp.asarray(h)
        z, predictions = self._sample(prediction, members, noise, active, step)
        if self.dynamics.reward_from_next_state:
            next_obs, _ = targets.decode(self.state.stats.transform, obs, z)
            reward = self._predict(members, self.dynamics.predict_reward, obs, action, next_obs)
            prediction = prediction.replace_reward(reward)
            z, predictions = self._sample(prediction, members, noise, active, step)
        output = TrustOutput()
        if predictions is not None:
            if self.rule.needs_values:
                predictions = self._with_values(predictions, obs, action)
            rule_key = jax.random.fold_in(noise.key, 2)
            trust, output = self.rule.apply(trust, predictions, step, length, rule_key)
        return trust, self._finish(obs, action, log_prob, z, output)

    def _act(self, obs: Array, noise: StepNoise) -> tuple[Array, Array]:
        """Return the policy's actions, some of them replaced by uniform ones, and log-densities."""
        action, log_prob = self.policy(obs, noise.action)
        share = self.config.rollout.random_action_fraction
        if share:
            which_key, action_key = jax.random.split(jax.random.fold_in(noise.action_key, 1))
            which = jax.random.bernoulli(which_key, share, action.shape[:1])
            uniform = jax.random.uniform(action_key, action.shape, minval=-1, maxval=1)
            action = jnp.where(which[:, None], uniform, action)
        return action, log_prob

    def _noise_scale(self) -> Float[Array, " Z"]:
        """Return how much of the predicted standard deviation is sampled."""
        state = jnp.full(self.spec.obs_dim, self.config.rollout.state_noise)
        return jnp.append(state, self.config.rollout.reward_noise)

    def _predict(
        self, members: _Members, predict: Callable[..., Gaussian], *inputs: Array
    ) -> _Prediction:
        """Return the predictions for B states by the members assigned to them, and by all members
        if the trust rule needs them."""
        if self.rule.needs_all_members:
            stacked = tuple(ensemble.broadcast_to_members(self.state, x) for x in inputs)
            every = ensemble.vmap_members(predict, self.state, *stacked)
            chosen = members.member, jnp.arange(inputs[0].shape[0])
            return _Prediction(jax.tree.map(lambda x: x[chosen], every), every)
        shares = map(members.to_shares, inputs)
        own = ensemble.vmap_members(predict, self.state, *shares)
        return _Prediction(jax.tree.map(members.from_shares, own), None)

    def _sample(
        self,
        prediction: _Prediction,
        members: _Members,
        noise: StepNoise,
        active: Array,
        h: Array,
    ) -> tuple[Array, Predictions | None]:
        """Return samples z (B, Z), and the predictions as the trust rule sees them."""
        z, log_variance = prediction.own
        if log_variance is not None:
            z = z + jnp.exp(0.5 * log_variance) * (noise.prediction * self._noise_scale())
        if prediction.all_members is None:
            return z, None
        stats = self.state.stats
        predictions = to_standard_units(stats, *prediction.all_members, members.member, z, active)
        sample = self.rule.sample(predictions, h, jax.random.fold_in(noise.key, 1))
        if sample is None:
            return z, predictions
        return to_normalized(stats, sample), predictions._replace(sample=sample)

    def _finish(
        self, obs: Array, action: Array, log_prob: Array, z: Array, output: TrustOutput
    ) -> ModelStep:
        """Return the step with reward penalty, termination and masks."""
        stats = self.state.stats
        next_obs, reward = targets.decode(stats.transform, obs, z)
        penalty = None
        if output.reward_penalty is not None:
            penalty = output.reward_penalty * stats.change_std[-1]
            reward = reward - penalty
        finite = jnp.isfinite(next_obs).all(-1) & jnp.isfinite(reward)
        next_obs = jnp.where(finite[:, None], next_obs, obs)
        reward = jnp.where(finite, reward, 0.0)
        discount = self._alive(obs, action, next_obs)
        continues = finite if output.continue_mask is None else finite & output.continue_mask
        keep = continues if output.keep_mask is None else finite & output.keep_mask
        transition = Transition(obs, action, reward, discount, next_obs)
        weight = output.weight if self.rule.uses_weights else None
        if self.rule.uses_weights and weight is None:
            weight = jnp.ones(obs.shape[0])
        return ModelStep(transition, continues, keep, weight, penalty, log_prob)


class _Prediction(NamedTuple):
    """Predictions for B states."""

    own: Gaussian  # (B, X), by the member assigned to each state
    all_members: Gaussian | None  # (E, B, X), if the trust rule needs all members

    def replace_reward(self, reward: _Prediction) -> _Prediction:
        own = replace_reward(self.own, reward.own)
        if self.all_members is None or reward.all_members is None:
            return _Prediction(own, None)
        return _Prediction(own, replace_reward(self.all_members, reward.all_members))


class _Members(NamedTuple):
    """Which elite predicts which of B states."""

    member: Int[Array, " B"]
    elite_of: Int[Array, " K"]  # the elite of each share of states
    share_of: Int[Array, " K"]  # and the share of each elite
    share_size: int

    def to_shares(self, x: Float[Array, "B X"]) -> Float[Array, "K b X"]:
        """Return each elite's share of B rows; rows are repeated to fill the last share."""
        k, size = len(self.elite_of), self.share_size
        x = x if len(x) == k * size else jnp.resize(x, (k * size, x.shape[-1]))
        return x.reshape(k, size, x.shape[-1])[self.share_of]

    def from_shares(self, x: Float[Array, "K b X"]) -> Float[Array, "B X"]:
        """Return the B rows in their order."""
        k, size = len(self.elite_of), self.share_size
        return x[self.elite_of].reshape(k * size, -1)[: len(self.member)]


def _assign_members(bits: UInt32[Array, " K"], elites: Int[Array, " K"], batch: int) -> _Members:
    """Assign B states to the elites, in equal shares and an order that is as random as `bits`."""
    k = len(elites)
    size = -(-batch // k)
    elite_of, share_of = _order(bits)
    return _Members(jnp.repeat(elites[elite_of], size)[:batch], elite_of, share_of, size)


def _order(bits: UInt32[Array, " K"]) -> tuple[Int[Array, " K"], Int[Array, " K"]]:
    """Return the order of numbers and its inverse, without a sort, which is a kernel of its own."""
    place = jnp.arange(len(bits))
    first = (bits < bits[:, None]) | ((bits == bits[:, None]) & (place < place[:, None]))
    at = first.sum(1)
    return jnp.where(at == place[:, None], place, 0).sum(1), at


def _update_masks(
    carry: RolloutCarry, step: ModelStep
) -> tuple[Bool[Array, " B"], Bool[Array, " B"], Float[Array, "B D"]]:
    """Return which transitions to learn from, which rollouts continue, and their observations.

    A rollout that has ended keeps its observation.
    """
    keep = carry.active & step.keep_mask
    active = carry.active & step.continue_mask & (step.transition.discount > 0)
    return keep, active, jnp.where(active[:, None], step.transition.next_obs, carry.obs)


def _init_metrics(rule: TrustRule, longest: int) -> Metrics:
    """Return the sums that `_accumulate_metrics` starts from, for rollouts of at most `longest` steps."""
    return {"kept": jnp.zeros(longest)} | dict.fromkeys(rule.metrics, jnp.zeros(()))


def _accumulate_metrics(
    sums: Metrics, h: Array | int, keep: Bool[Array, " B"], step: ModelStep
) -> Metrics:
    """Add step `h`: the fraction of kept transitions, and sums over them of the rule's outputs."""
    added = {
        name: total + jnp.where(keep, values, 0.0).sum()
        for name, total in sums.items()
        if (values := getattr(step, name, None)) is not None
    }
    return sums | {"kept": sums["kept"].at[h].set(keep.mean())} | added


def rollout_metrics(rule: TrustRule, sums: Metrics, batch: int, length: Array | int) -> Metrics:
    """Return the fraction of valid transitions, the fraction accepted at each step if there is a
    trust rule, and the means over valid transitions of the rule's outputs."""
    kept = sums["kept"]
    count = jnp.maximum(kept.sum() * batch, 1.0)
    by_step = {}
    if rule.needs_all_members:
        by_step = {f"accepted_fraction_{h + 1}": kept[h] for h in range(len(kept))}
    means = {name: sums[name] / count for name in rule.metrics}
    return {"valid_fraction": kept.sum() / length} | by_step | means
