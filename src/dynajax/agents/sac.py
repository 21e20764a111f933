"""Soft Actor-Critic (Haarnoja et al., 2018): losses, one update, acting. For one row."""

import math

import jax
import jax.numpy as jnp

from dynajax import nets
from dynajax.config import SACConfig
from dynajax.types import Agent, Array, EnvSpec, Metrics, Params, Transition


def init(config: SACConfig, spec: EnvSpec, key: Array) -> Agent:
    """A new agent; the target critic starts as a copy of the critic."""
    actor_key, critic_key = jax.random.split(key)
    actor = nets.actor(config.hidden, spec.action_dim).init(actor_key, jnp.zeros(spec.obs_dim))[
        "params"
    ]
    critic = nets.stacked_init(
        nets.critic(config.hidden, config.critic_layer_norm),
        critic_key,
        2,
        spec.obs_dim + spec.action_dim,
    )
    log_temperature = jnp.log(jnp.asarray(config.initial_temperature, jnp.float32))
    return Agent(
        actor=actor,
        critic=critic,
        target_critic=jax.tree.map(jnp.copy, critic),
        log_temperature=log_temperature,
        actor_optimiser=nets.adam_init(actor),
        critic_optimiser=nets.adam_init(critic),
        temperature_optimiser=nets.adam_init(log_temperature),
    )


def policy(config: SACConfig, actor: Params, obs: Array, action_dim: int) -> tuple[Array, Array]:
    """Mean and log std of the Gaussian before tanh: (..., D) -> (..., A), (..., A)."""
    network = nets.actor(config.hidden, action_dim)
    return nets.policy_parameters(nets.apply(network, actor, obs))


def greedy(config: SACConfig, actor: Params, obs: Array, action_dim: int) -> Array:
    """The deterministic action, tanh of the mean: (..., D) -> (..., A)."""
    return jnp.tanh(policy(config, actor, obs, action_dim)[0])


def tanh_gaussian(mean: Array, log_std: Array, noise: Array) -> tuple[Array, Array]:
    """The action tanh(u), u = mean + std * noise, and its log-density.

    log pi = sum_A [log N(u; mean, std) - log(1 - tanh(u)^2)] (Haarnoja et al., 2018, appendix C),
    the last term as 2 (log 2 - u - softplus(-2u)), which stays finite for large u.

    Args:
      mean, log_std, noise: (..., A); noise from a standard normal.

    Returns:
      action (..., A), log-density (...).
    """
    u = mean + jnp.exp(log_std) * noise
    gaussian = -0.5 * jnp.square(noise) - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), (gaussian - squash).sum(-1)


def sample(
    config: SACConfig, actor: Params, obs: Array, key: Array, action_dim: int
) -> tuple[Array, Array]:
    """An action of the policy and its log-density: (..., D) -> (..., A), (...)."""
    mean, log_std = policy(config, actor, obs, action_dim)
    return tanh_gaussian(mean, log_std, jax.random.normal(key, mean.shape))


def q_values(config: SACConfig, critic: Params, obs: Array, action: Array) -> Array:
    """Both twins: (..., D), (..., A) -> (2, ...)."""
    network = nets.critic(config.hidden, config.critic_layer_norm)
    inputs = jnp.concatenate([obs, action], -1)
    return jax.vmap(lambda params: nets.apply(network, params, inputs)[..., 0])(critic)


def td_target(
    discount: Array | float, batch: Transition, next_q: Array, temperature: Array, log_prob: Array
) -> Array:
    """y = r + gamma discount (min_i Q_i(s', a') - alpha log pi(a'|s')): (2, B) -> (B,)."""
    return batch.reward + discount * batch.discount * (next_q.min(0) - temperature * log_prob)


def critic_loss(q: Array, target: Array) -> Array:
    """mean_B sum_i (Q_i - y)^2: (2, B), (B,) -> ()."""
    return jnp.square(q - target).sum(0).mean()


def actor_loss(temperature: Array, log_prob: Array, q: Array) -> Array:
    """mean_B (alpha log pi - min_i Q_i): (B,), (2, B) -> ()."""
    return (temperature * log_prob - q.min(0)).mean()


def temperature_loss(log_temperature: Array, entropy: Array, target_entropy: Array) -> Array:
    """alpha (entropy - target entropy), for the gradient in log alpha: () -> ()."""
    return jnp.exp(log_temperature) * (entropy - target_entropy)


def update(
    config: SACConfig, agent: Agent, batch: Transition, noise: Array
) -> tuple[Agent, Metrics]:
    """One gradient update: the critic, its target, the actor against the new critic, the
    temperature.

    Args:
      batch: leaves (B, ...).
      noise: (2, B, A) standard normal, for the policy's actions at s' and at s.

    Returns:
      The new agent, and scalars by name (README, "What is logged").
    """
    action_dim = batch.action.shape[-1]
    temperature = jnp.exp(agent.log_temperature)

    next_policy = policy(config, agent.actor, batch.next_obs, action_dim)
    next_action, next_log_prob = tanh_gaussian(*next_policy, noise[0])
    next_q = q_values(config, agent.target_critic, batch.next_obs, next_action)
    target = td_target(config.discount, batch, next_q, temperature, next_log_prob)

    def loss_of_critic(critic: Params) -> tuple[Array, Array]:
        q = q_values(config, critic, batch.obs, batch.action)
        return critic_loss(q, target), q.mean()

    (loss_q, q_mean), gradient = jax.value_and_grad(loss_of_critic, has_aux=True)(agent.critic)
    critic, critic_optimiser = nets.adam_step(
        agent.critic, gradient, agent.critic_optimiser, config.learning_rate
    )
    target_critic = jax.tree.map(
        lambda slow, fast: slow + config.polyak * (fast - slow), agent.target_critic, critic
    )

    def loss_of_actor(actor: Params) -> tuple[Array, Array]:
        now = policy(config, actor, batch.obs, action_dim)
        action, log_prob = tanh_gaussian(*now, noise[1])
        q = q_values(config, critic, batch.obs, action)
        return actor_loss(temperature, log_prob, q), -log_prob.mean()

    (loss_pi, entropy), gradient = jax.value_and_grad(loss_of_actor, has_aux=True)(agent.actor)
    actor, actor_optimiser = nets.adam_step(
        agent.actor, gradient, agent.actor_optimiser, config.learning_rate
    )

    loss_alpha, gradient = jax.value_and_grad(temperature_loss)(
        agent.log_temperature, entropy, config.target_entropy * action_dim
    )
    log_temperature, temperature_optimiser = nets.adam_step(
        agent.log_temperature, gradient, agent.temperature_optimiser, config.learning_rate
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
    return (
        Agent(
            actor,
            critic,
            target_critic,
            log_temperature,
            actor_optimiser,
            critic_optimiser,
            temperature_optimiser,
        ),
        metrics,
    )
