"""Soft Actor-Critic (Haarnoja et al., 2018): losses, one update, acting."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dynajax import nets
from dynajax.agents.base import Agent
from dynajax.config import fields, static, traced
from dynajax.types import Array, Metrics, Params, Transition


@fields
@dataclass(frozen=True)
class SACFields:
    """Numbers of the preset `paper`; BUILD_NOTES.md has their source."""

    hidden: tuple[int, ...] = static((256, 256), 1)
    critic_layer_norm: bool = static(False)
    learning_rate: float = traced(3e-4, 0)
    polyak: float = traced(0.005, 0, 1)
    initial_temperature: float = traced(1.0, 1e-8)
    target_entropy: float = traced(-0.5)  # per action entry


class SACState(NamedTuple):
    """All of Soft Actor-Critic that changes."""

    actor: Params
    critic: Params  # leaves (C, ...)
    target_critic: Params  # leaves (C, ...)
    log_temperature: Array  # ()
    actor_optimiser: optax.OptState
    critic_optimiser: optax.OptState
    temperature_optimiser: optax.OptState


def tanh_gaussian(mean: Array, log_std: Array, noise: Array) -> tuple[Array, Array]:
    """The action tanh(u), u = mean + std * noise, and its log-density.

    log pi = sum_A [log N(u; mean, std) - log(1 - tanh(u)^2)] (Haarnoja et al., 2018, appendix C),
    the last term as 2 (log 2 - u - softplus(-2u)), which stays finite for large u.

    Args:
      mean, log_std, noise: (..., A); noise from a standard normal.

    Returns:
      action (..., A), log-density (...).
    """
    chex.assert_equal_shape([mean, log_std, noise])
    u = mean + jnp.exp(log_std) * noise
    gaussian = -0.5 * jnp.square(noise) - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), (gaussian - squash).sum(-1)


def weighted_mean(values: Array, weight: Array | None) -> Array:
    """sum w x / sum w of (B,), and the plain mean where no weight is given."""
    if weight is None:
        return values.mean()
    chex.assert_equal_shape([values, weight])
    return (weight * values).sum() / jnp.maximum(weight.sum(), 1e-8)


def td_target(
    discount: Array | float,
    batch: Transition,
    next_q: Array,
    temperature: Array,
    log_prob: Array,
) -> Array:
    """y = r + gamma discount (Q(s', a') - alpha log pi(a'|s')): (B,) each -> (B,)."""
    chex.assert_equal_shape([batch.reward, batch.discount, next_q, log_prob])
    return batch.reward + discount * batch.discount * (next_q - temperature * log_prob)


def critic_loss(q: Array, target: Array, weight: Array | None = None) -> Array:
    """mean_B sum_i (Q_i - y)^2: (C, B), (B,) -> ()."""
    chex.assert_equal_shape_suffix([q, target], 1)
    return weighted_mean(jnp.square(q - target).sum(0), weight)


def actor_loss(temperature: Array, log_prob: Array, q: Array, weight: Array | None = None) -> Array:
    """mean_B (alpha log pi - Q): (B,), (B,) -> ()."""
    chex.assert_equal_shape([log_prob, q])
    return weighted_mean(temperature * log_prob - q, weight)


def temperature_loss(log_temperature: Array, entropy: Array, target_entropy: Array) -> Array:
    """alpha (entropy - target entropy), for the gradient in log alpha: () -> ()."""
    return jnp.exp(log_temperature) * (entropy - target_entropy)


class SAC(Agent):
    """Soft Actor-Critic as published, with the networks of its authors."""

    Fields = SACFields
    own: SACFields

    @property
    def actor_network(self) -> nn.Module:
        """(D,) -> (2A,), which `nets.policy_parameters` reads."""
        return nets.actor(self.own.hidden, self.spec.action_dim)

    @property
    def critic_network(self) -> nn.Module:
        """One of the critics: (D+A,) -> (1,)."""
        return nets.critic(self.own.hidden, self.own.critic_layer_norm)

    @property
    def critics(self) -> int:
        """C, how many there are."""
        return 2

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """Of actor, critics and temperature, each with a state of its own."""
        return optax.adam(self.own.learning_rate, eps=1e-8)

    def new(self, key: Array) -> SACState:
        """A new agent; the target critics start as copies of the critics."""
        actor_key, critic_key = jax.random.split(key)
        spec = self.spec
        actor = self.actor_network.init(actor_key, jnp.zeros(spec.obs_dim))["params"]
        inputs = spec.obs_dim + spec.action_dim
        critic = nets.stacked_init(self.critic_network, critic_key, self.critics, inputs)
        log_temperature = jnp.log(jnp.asarray(self.own.initial_temperature, jnp.float32))
        return SACState(
            actor=actor,
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic),
            log_temperature=log_temperature,
            actor_optimiser=self.optimiser.init(actor),
            critic_optimiser=self.optimiser.init(critic),
            temperature_optimiser=self.optimiser.init(log_temperature),
        )

    def _policy(self, actor: Params, obs: Array) -> tuple[Array, Array]:
        """Mean and log std of the Gaussian before tanh: (..., D) -> (..., A) twice."""
        return nets.policy_parameters(nets.apply(self.actor_network, actor, obs))

    def _q(self, critic: Params, obs: Array, action: Array) -> Array:
        """(..., D), (..., A) -> (C, ...)."""
        inputs = jnp.concatenate([obs, action], -1)

        def one(params: Params) -> Array:
            return nets.apply(self.critic_network, params, inputs)[..., 0]

        return jax.vmap(one)(critic)

    def act(self, state: SACState, obs: Array, key: Array) -> tuple[Array, Array]:
        """A sample of the policy and its log-density: (..., D) -> (..., A), (...)."""
        mean, log_std = self._policy(state.actor, obs)
        return tanh_gaussian(mean, log_std, jax.random.normal(key, mean.shape))

    def greedy(self, state: SACState, obs: Array) -> Array:
        """The deterministic action, tanh of the mean: (..., D) -> (..., A)."""
        return jnp.tanh(self._policy(state.actor, obs)[0])

    def value(self, state: SACState, obs: Array, action: Array) -> Array:
        """Every critic's value: (..., D), (..., A) -> (C, ...)."""
        return self._q(state.critic, obs, action)

    def noise(self, key: Array, updates: int) -> Array:
        """(U, 2, B, A) standard normal, for the policy's actions at s' and at s."""
        return jax.random.normal(key, (updates, 2, self.learn.batch, self.spec.action_dim))

    def update(
        self,
        state: SACState,
        batch: Transition,
        critic_weight: Array | None,
        actor_weight: Array | None,
        noise: Array,
    ) -> tuple[SACState, Metrics]:
        """The critics, their targets, the actor against the new critics, the temperature."""
        chex.assert_shape(batch.reward, (self.learn.batch,))
        own, action_dim = self.own, self.spec.action_dim
        temperature = jnp.exp(state.log_temperature)

        def descend(gradient: Params, optimiser: Any, params: Params) -> tuple[Params, Any]:
            updates, optimiser = self.optimiser.update(gradient, optimiser, params)
            return optax.apply_updates(params, updates), optimiser

        next_policy = self._policy(state.actor, batch.next_obs)
        next_action, next_log_prob = tanh_gaussian(*next_policy, noise[0])
        next_q = self._q(state.target_critic, batch.next_obs, next_action).min(0)
        target = td_target(self.learn.discount, batch, next_q, temperature, next_log_prob)

        def loss_of_critic(critic: Params) -> tuple[Array, Array]:
            q = self._q(critic, batch.obs, batch.action)
            return critic_loss(q, target, critic_weight), q.mean()

        (loss_q, q_mean), gradient = jax.value_and_grad(loss_of_critic, has_aux=True)(state.critic)
        critic, critic_optimiser = descend(gradient, state.critic_optimiser, state.critic)
        target_critic = jax.tree.map(
            lambda slow, fast: slow + own.polyak * (fast - slow), state.target_critic, critic
        )

        def loss_of_actor(actor: Params) -> tuple[Array, Array]:
            action, log_prob = tanh_gaussian(*self._policy(actor, batch.obs), noise[1])
            q = self._q(critic, batch.obs, action).min(0)
            entropy = -weighted_mean(log_prob, actor_weight)
            return actor_loss(temperature, log_prob, q, actor_weight), entropy

        (loss_pi, entropy), gradient = jax.value_and_grad(loss_of_actor, has_aux=True)(state.actor)
        actor, actor_optimiser = descend(gradient, state.actor_optimiser, state.actor)

        loss_alpha, gradient = jax.value_and_grad(temperature_loss)(
            state.log_temperature, entropy, own.target_entropy * action_dim
        )
        log_temperature, temperature_optimiser = descend(
            gradient, state.temperature_optimiser, state.log_temperature
        )
        metrics = {
            "critic_loss": loss_q,
            "actor_loss": loss_pi,
            "temperature_loss": loss_alpha,
            "q_mean": q_mean,
            "target_mean": target.mean(),
            "temperature": temperature,
            "entropy": entropy,
        }
        after = SACState(
            actor,
            critic,
            target_critic,
            log_temperature,
            actor_optimiser,
            critic_optimiser,
            temperature_optimiser,
        )
        return after, metrics

    def temperature(self, state: SACState) -> Array:
        """alpha, ()."""
        return jnp.exp(state.log_temperature)

    def policy(self, state: SACState) -> SACState:
        """The actor alone."""
        return jax.tree.map(lambda _: None, state)._replace(actor=state.actor)

    def networks(self, state: SACState) -> dict[str, Params]:
        """Actor and critics."""
        return {"actor": state.actor, "critic": state.critic}
