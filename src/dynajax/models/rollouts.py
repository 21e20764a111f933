"""Synthetic transitions: short rollouts of a policy in the ensemble. For one row."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dynajax import trust
from dynajax.config import Config
from dynajax.models import ensemble, targets
from dynajax.types import Array, EnvSpec, Metrics, Minibatch, ModelState, Transition

#: (observations (B, D), key) -> actions (B, A) and their log-densities (B,)
Policy = Callable[[Array, Array], tuple[Array, Array]]


def horizon(config: Config, step: Array) -> Array | int:
    """The rollouts' length at an environment step, linear between two steps (Janner et al., 2019).

    A constant horizon stays a Python number, so its loop has a known length.
    """
    h = config.rollout.horizon
    if len(h) == 1:
        return h[0]
    first_step, last_step, first, last = h
    # In whole numbers: a float32's share of the way falls short of whole horizons.
    passed = jnp.clip(step - first_step, 0, last_step - first_step)
    return first + passed * (last - first) // (last_step - first_step)


class ModelStep(NamedTuple):
    """One step of B rollouts."""

    transition: Transition  # leaves (B, ...)
    continue_mask: Array  # (B,) bool: finite, and trusted so far, so the rollout may go on
    keep_mask: Array  # (B,) bool: may be learned from
    weight: Array | None  # (B,) in the critic's loss; None where the rule of trust gives none
    penalty: Array | None  # (B,) what the rule took off the reward
    log_prob: Array  # (B,) of the policy's action


#: (the rule's state, observations (B, D), which go on (B,), h) -> the rule's state and step h of B
#: rollouts
Step = Callable[[Any, Array, Array, int], tuple[Any, ModelStep]]


def _some_uniform(share: float, action: Array, key: Array) -> Array:
    """Actions (B, A) of which a share is uniform in [-1, 1]."""
    which_key, action_key = jax.random.split(key)
    which = jax.random.bernoulli(which_key, share, action.shape[:1])
    uniform = jax.random.uniform(action_key, action.shape, minval=-1, maxval=1)
    return jnp.where(which[:, None], uniform, action)


def _noise(config: Config, outputs: int) -> Array:
    """How much of the predicted standard deviation is sampled: (D+1,)."""
    state = jnp.full(outputs - 1, config.rollout.state_noise)
    return jnp.append(state, config.rollout.reward_noise)


def _sample(moments: tuple[Array, Array], noise: Array) -> Array:
    """mean + std noise, of moments (B, X)."""
    mean, log_variance = moments
    return mean + jnp.exp(0.5 * log_variance) * noise


def _order(key: Array, count: int) -> tuple[Array, Array]:
    """A random order of `count` things and its inverse, (count,) int each; no sorts, which are kernels."""
    bits, place = jax.random.bits(jax.random.split(key)[1], (count,)), jnp.arange(count)
    first = (bits < bits[:, None]) | ((bits == bits[:, None]) & (place < place[:, None]))
    at = first.sum(1)
    return jnp.where(at == place[:, None], place, 0).sum(1), at


def asked(rule: trust.TrustRule, model: ModelState) -> ModelState:
    """The members that rollouts ask: the elites, or all where the rule does.

    Taken once for many rollouts; a compiler takes them at every one, if it is left to it.
    """
    return model if rule.needs_all_members else ensemble.elites(model)


def model_step(
    config: Config,
    spec: EnvSpec,
    rule: trust.TrustRule,
    policy: Policy,
    model: ModelState,
    trusted: Any,
    obs: Array,
    alive: Array,
    h: Array | int,
    length: Array | int,
    key: Array,
) -> tuple[Any, ModelStep]:
    """One step from every state by the policy in the model, state and reward sampled.

    Every elite takes an equal share of the states (the last one less, where they do not divide),
    which one being redrawn at each call. The states were drawn independently, so this is one random
    elite a state; and each elite computes its own share alone, unless the rule asks what the others
    say.

    Args:
      model: what `asked` takes of it.
      trusted: the rule's state.
      obs: (B, D).
      alive: (B,) bool, which of the rollouts came so far; the others are imagined for nothing.
      h, length: the step's number, from 0, of rollouts of so many.

    Returns:
      The rule's state, and what was imagined.
    """
    chex.assert_shape(obs, (None, spec.obs_dim))
    batch, k = obs.shape[0], config.model.elites
    each = -(-batch // k)
    action_key, order_key, noise_key = jax.random.split(key, 3)
    action, log_prob = policy(obs, action_key)
    if config.rollout.random_action_fraction:
        action = _some_uniform(
            config.rollout.random_action_fraction, action, jax.random.fold_in(action_key, 1)
        )
    elite_of, share_of = _order(order_key, k)
    member = jnp.repeat(model.elites[elite_of], each)[:batch]

    def shares(x: Array) -> Array:
        # Some once more, where there are too few for equal shares.
        x = x if batch == k * each else jnp.resize(x, (k * each, x.shape[-1]))
        return x.reshape(k, each, x.shape[-1])[share_of]

    def predicted(predict: ensemble.Prediction, *inputs: Array) -> list[tuple[Array, Array]]:
        """Moments (B, X), each by its elite; and (E, B, X) where the rule asks."""
        if rule.needs_all_members:
            inputs = tuple(ensemble.broadcast_to_members(model, x) for x in inputs)
            means, log_variances = ensemble.each(predict, config.model, model, *inputs)
            chosen = member, jnp.arange(batch)
            return [(means[chosen], log_variances[chosen]), (means, log_variances)]
        moments = ensemble.each(predict, config.model, model, *map(shares, inputs))
        mean, log_variance = (x[elite_of].reshape(k * each, -1)[:batch] for x in moments)
        return [(mean, log_variance)]

    says = predicted(ensemble.from_inputs, obs, action)
    step = jnp.asarray(h)
    noise = jax.random.normal(noise_key, says[0][0].shape) * _noise(config, says[0][0].shape[-1])

    def sampled(says: list[tuple[Array, Array]]) -> tuple[Array, trust.Predictions | None]:
        """z (B, D+1) of what is said, and that as the rule sees it."""
        z = _sample(says[0], noise)
        if not rule.needs_all_members:
            return z, None
        predictions = trust.to_standard_units(model, *says[1], member, z, alive)
        sample = rule.sample(predictions, step, jax.random.fold_in(noise_key, 1))
        if sample is None:
            return z, predictions
        return trust.to_normalized(model, sample), predictions._replace(sample=sample)

    z, predictions = sampled(says)
    if config.model.reward_from == "next_state":
        following, _ = targets.decode(model.code, obs, z)
        rewards = predicted(ensemble.from_next_state, obs, action, following)
        says = [ensemble.with_reward(*both) for both in zip(says, rewards, strict=True)]
        z, predictions = sampled(says)
    verdict = trust.TrustOutput()
    if predictions is not None:
        rule_key = jax.random.fold_in(noise_key, 2)
        trusted, verdict = rule.apply(trusted, predictions, step, length, rule_key)
    next_obs, reward = targets.decode(model.code, obs, z)
    penalty = None
    if verdict.reward_penalty is not None:
        penalty = verdict.reward_penalty * model.unit[-1]
        reward = reward - penalty
    finite = jnp.isfinite(next_obs).all(-1) & jnp.isfinite(reward)
    next_obs = jnp.where(finite[:, None], next_obs, obs)
    reward = jnp.where(finite, reward, 0.0)
    if spec.termination is None:
        discount = jnp.ones(batch)
    else:
        ended = jax.vmap(spec.termination)(obs, action, next_obs)
        discount = 1.0 - ended.astype(jnp.float32)
    on = finite if verdict.continue_mask is None else finite & verdict.continue_mask
    store = on if verdict.keep_mask is None else finite & verdict.keep_mask
    transition = Transition(obs, action, reward, discount, next_obs)
    weight = verdict.weight if rule.uses_weights else None
    if rule.uses_weights and weight is None:
        weight = jnp.ones(batch)
    return trusted, ModelStep(transition, on, store, weight, penalty, log_prob)


def update_masks(alive: Array, obs: Array, imagined: ModelStep) -> tuple[Array, Array, Array]:
    """What of a step of rollouts is learned from, which of them go on, and from where.

    Args:
      alive: (B,) which came so far; obs: (B, D), from where.

    Returns:
      (B,) bool, (B,) bool and (B, D); a rollout that has ended keeps its observation.
    """
    store = alive & imagined.keep_mask
    alive = alive & imagined.continue_mask & (imagined.transition.discount > 0)
    return store, alive, jnp.where(alive[:, None], imagined.transition.next_obs, obs)


def init_metrics(rule: trust.TrustRule, longest: int) -> Metrics:
    """What `count_in` begins with, of rollouts of at most `longest` steps."""
    return {"kept": jnp.zeros(longest)} | dict.fromkeys(rule.figures, jnp.zeros(()))


def accumulate_metrics(
    totals: Metrics, h: Array | int, store: Array, imagined: ModelStep
) -> Metrics:
    """The totals with step `h` of B rollouts, of which `store` (B,) is learned from: the share that
    it is, and sums over it of what the rule says.
    """
    sums = {
        name: total + jnp.where(store, values, 0.0).sum()
        for name, total in totals.items()
        if (values := getattr(imagined, name, None)) is not None
    }
    return totals | {"kept": totals["kept"].at[h].set(store.mean())} | sums


def figures(rule: trust.TrustRule, totals: Metrics, batch: int, length: Array | int) -> Metrics:
    """What is logged of B = `batch` rollouts of `length`: the share that was kept, and with a rule of
    trust that by step, and means over it of what the rule says.
    """
    kept = totals["kept"]
    count = jnp.maximum(kept.sum() * batch, 1.0)
    by_step = (
        {f"accepted_fraction_{h + 1}": kept[h] for h in range(len(kept))}
        if rule.needs_all_members
        else {}
    )
    means = {name: totals[name] / count for name in rule.figures}
    return {"valid_fraction": kept.sum() / length} | by_step | means


def fresh(
    step: Step, rule: trust.TrustRule, trusted: Any, obs: Array, length: int, size: int
) -> tuple[Any, Minibatch, Metrics]:
    """Rollouts of `length` steps from obs (B, D) as the synthetic part of a minibatch, of `size`.

    All steps of a rollout are learned from, of its later ones only those that go on so far.
    """
    alive, steps = jnp.ones(obs.shape[0], bool), []
    totals = init_metrics(rule, length)
    for h in range(length):
        trusted, imagined = step(trusted, obs, alive, h)
        store, alive, obs = update_masks(alive, obs, imagined)
        # Not packed: what is put together to be taken apart again cost a CPU 6 % of a step.
        steps.append(Minibatch(imagined.transition, store, imagined.weight))
        totals = accumulate_metrics(totals, h, store, imagined)
    # Rollout by rollout, so that what is cut off is whole rollouts.
    batch = jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:])[:size], *steps)
    metrics = figures(rule, totals, alive.size, length)
    return trusted, batch, {**metrics, "synthetic_reward_mean": batch.data.reward.mean()}


def expand(
    step: Step,
    trusted: Any,
    batch: Minibatch,
    length: int,
    discount: Array | float,
    temperature: Array,
) -> tuple[Any, Minibatch, Metrics]:
    """A minibatch whose critic's targets reach up to `length` imagined steps further.

    Model-based value expansion (Feinberg et al., 2018) with SAC's price of actions: a transition
    (s, a, r, d, s') becomes (s, a, r + g d (r_0 - alpha log pi(a_0|s')), g d d_0, s_0) for the
    imagined (s', a_0, r_0, d_0, s_0), g the discount, and so on for the next step. It is as it was
    where the episode ended, and goes no further than the rule of trust lets it; a weight that the
    rule gives an imagined step counts for the whole.

    Args:
      batch: leaves (B, ...).
    """
    data, weight = batch.data, batch.weight
    going, steps = data.discount > 0, jnp.zeros(batch.valid.shape)
    for h in range(length):
        trusted, imagined = step(trusted, data.next_obs, going & batch.valid, h)
        further = imagined.transition
        goes = going & imagined.keep_mask
        ahead = discount * data.discount
        gained = data.reward + ahead * (further.reward - temperature * imagined.log_prob)
        data = data._replace(
            reward=jnp.where(goes, gained, data.reward),
            discount=jnp.where(goes, ahead * further.discount, data.discount),
            next_obs=jnp.where(goes[:, None], further.next_obs, data.next_obs),
        )
        if imagined.weight is not None:
            counts = jnp.where(goes, imagined.weight, 1.0)
            weight = counts if weight is None else weight * counts
        steps += goes
        going = goes & imagined.continue_mask & (further.discount > 0)
    expanded = dataclasses.replace(batch, data=data, weight=weight)
    return trusted, expanded, {"expanded_steps": steps.mean()}
