"""Soft Actor-Critic (Haarnoja et al., 2018): losses, one update, acting."""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dynajax import nets
from dynajax.agents.base import Agent
from dynajax.config import Config, fields, static, traced
from dynajax.types import Array, Metrics, Params, Transition, UsageError
from dynajax.xla import backend


@fields
@dataclass(frozen=True)
class LossFields:
    """What every agent with SAC's loss is told, whatever its networks are."""

    critics: int = static(2, 1, about="how many critics")
    learning_rate: float = traced(3e-4, 0, about="of actor, critics and temperature")
    polyak: float = traced(
        0.005, 0, 1, about="share of the new critics that the target critics take in an update"
    )
    initial_temperature: float = traced(1.0, 1e-8, about="price of a nat of log-density at first")
    target_entropy: float = traced(-0.5, about="of the policy, per action entry")
    log_std_min: float = traced(
        nets.LOG_STD_MIN, about="least log standard deviation of the policy"
    )
    log_std_max: float = traced(
        nets.LOG_STD_MAX, about="largest log standard deviation of the policy"
    )


@fields
@dataclass(frozen=True)
class SACFields(LossFields):
    """Numbers of the preset `paper`; BUILD_NOTES.md has their source."""

    hidden: tuple[int, ...] = static(
        (256, 256), 1, about="widths of the hidden layers of actor and critics"
    )
    critic_layer_norm: bool = static(False, about="a LayerNorm in each hidden layer of the critics")


@fields
@dataclass(frozen=True)
class ResidualFields(LossFields):
    """Of agents with residual networks."""

    actor_width: int = static(128, 1, about="width of the residual stream of the actor")
    actor_blocks: int = static(1, 0, about="residual blocks of the actor")
    critic_width: int = static(512, 1, about="width of the residual stream of a critic")
    critic_blocks: int = static(2, 0, about="residual blocks of a critic")
    weight_decay: float = traced(
        1e-2, 0, about="decoupled decay of the weights of actor and critics"
    )


class SACState(NamedTuple):
    """All of Soft Actor-Critic that changes."""

    actor: Params
    critic: Params  # leaves (C, ...)
    target_critic: Params  # leaves (C, ...)
    log_temperature: Array  # ()
    actor_optimiser: optax.OptState
    critic_optimiser: optax.OptState
    temperature_optimiser: optax.OptState
    observations: nets.Statistics | None = None  # where the agent normalises by them


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


def _descend(
    optimiser: optax.GradientTransformation, gradient: Params, state: Any, params: Params
) -> tuple[Params, Any]:
    """Parameters and optimiser's state after one step."""
    updates, state = optimiser.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


class SAC(Agent):
    """Soft Actor-Critic as published, with the networks of its authors."""

    Fields: ClassVar[type] = SACFields

    @classmethod
    def check(cls, config: Config) -> None:
        """The policy's standard deviation needs a range."""
        low, high = config.agent.log_std_min, config.agent.log_std_max
        if not low < high:
            raise UsageError(
                f"--set agent.log_std_min={low:g}: it must be under agent.log_std_max={high:g}"
            )

    @property
    def actor_network(self) -> nn.Module:
        """(D,) -> (2A,), which `nets.policy_parameters` reads."""
        return nets.actor(self.config.hidden, self.spec.action_dim)

    @property
    def critic_network(self) -> nn.Module:
        """One of the critics: (D+A,) -> (1,)."""
        return nets.critic(self.config.hidden, self.config.critic_layer_norm)

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """Of actor and critics, each with a state of its own."""
        return self.temperature_optimiser

    @property
    def temperature_optimiser(self) -> optax.GradientTransformation:
        """Of the logarithm of the temperature."""
        return optax.adam(self.config.learning_rate, eps=1e-8)

    def normalize_obs(self, state: SACState, obs: Array) -> Array:
        """Observations as the networks get them: (..., D) -> (..., D)."""
        return obs

    def aggregate_critics(self, q: Array) -> Array:
        """One value of C critics: (C, ...) -> (...); the smallest (Fujimoto et al., 2018)."""
        # By comparisons: the gradient of `min` looks for the smallest by equality and divides by how many
        # it finds, which are none where a compiler computes the same q twice and rounds it otherwise.
        return functools.reduce(lambda a, b: jnp.where(a <= b, a, b), q)

    def q_values(self, q: Array) -> Array:
        """The values that the critics' outputs stand for: (..., outputs of one) -> (...)."""
        return q[..., 0]

    def target(
        self, batch: Transition, next_q: Array, temperature: Array, log_prob: Array
    ) -> Array:
        """What the critics are trained on, from what `combine` made at s': (B, 1) -> (B,)."""
        return td_target(self.learn.discount, batch, next_q[..., 0], temperature, log_prob)

    def critic_loss(self, q: Array, target: Array, weight: Array | None) -> Array:
        """Of outputs (C, B, 1) against targets (B,), each counting `weight` (B,)."""
        return critic_loss(q[..., 0], target, weight)

    def init(self, key: Array) -> SACState:
        """A new agent; the target critics start as copies of the critics."""
        actor_key, critic_key = jax.random.split(key)
        spec = self.spec
        actor = self.actor_network.init(actor_key, jnp.zeros(spec.obs_dim))["params"]
        inputs = spec.obs_dim + spec.action_dim
        critic = nets.stacked_init(self.critic_network, critic_key, self.config.critics, inputs)
        log_temperature = jnp.log(jnp.asarray(self.config.initial_temperature, jnp.float32))
        return SACState(
            actor=actor,
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic),
            log_temperature=log_temperature,
            actor_optimiser=self.optimiser.init(actor),
            critic_optimiser=self.optimiser.init(critic),
            temperature_optimiser=self.temperature_optimiser.init(log_temperature),
        )

    def _policy(self, actor: Params, seen: Array) -> tuple[Array, Array]:
        """Mean and log std of the Gaussian before tanh: (..., D) -> (..., A) twice."""
        output = nets.apply(self.actor_network, actor, seen)
        return nets.policy_parameters(output, self.config.log_std_min, self.config.log_std_max)

    def _q(self, critic: Params, seen: Array, action: Array) -> Array:
        """Outputs of every critic: (..., D), (..., A) -> (C, ..., outputs of one)."""
        inputs = jnp.concatenate([seen, action], -1)
        if backend.target_is_cpu():
            return jax.vmap(self._one_q, (0, None))(critic, inputs)
        # A product for each critic. JAX makes one of all first layers, and turns them for it: on an
        # accelerator that is eleven more kernels an update (BUILD_NOTES.md).
        each = jnp.broadcast_to(inputs, (self.config.critics, *inputs.shape))
        return jax.vmap(self._one_q)(critic, each)

    def _one_q(self, critic: Params, inputs: Array) -> Array:
        """Outputs of one critic: (..., D+A) -> (..., outputs)."""
        return nets.apply(self.critic_network, critic, inputs)

    def act(self, state: SACState, obs: Array, key: Array) -> tuple[Array, Array]:
        """A sample of the policy and its log-density: (..., D) -> (..., A), (...)."""
        mean, log_std = self._policy(state.actor, self.normalize_obs(state, obs))
        return tanh_gaussian(mean, log_std, jax.random.normal(key, mean.shape))

    def deterministic_action(self, state: SACState, obs: Array) -> Array:
        """The deterministic action, tanh of the mean: (..., D) -> (..., A)."""
        return jnp.tanh(self._policy(state.actor, self.normalize_obs(state, obs))[0])

    def value(self, state: SACState, obs: Array, action: Array) -> Array:
        """Every critic's value: (..., D), (..., A) -> (C, ...)."""
        return self.q_values(self._q(state.critic, self.normalize_obs(state, obs), action))

    def noise(self, key: Array, updates: int) -> Array:
        """(U, 2, B, A) standard normal, for the policy's actions at s' and at s."""
        shape = updates, 2, self.learn.batch, self.spec.action_dim
        # As one line, whose counters are a kernel less; the numbers are the same.
        return jax.random.normal(key, (math.prod(shape),)).reshape(shape)

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
        config, action_dim = self.config, self.spec.action_dim
        temperature = jnp.exp(state.log_temperature)
        obs, next_obs = (
            self.normalize_obs(state, batch.obs),
            self.normalize_obs(state, batch.next_obs),
        )

        next_policy = self._policy(state.actor, next_obs)
        next_action, next_log_prob = tanh_gaussian(*next_policy, noise[0])
        next_q = self.aggregate_critics(self._q(state.target_critic, next_obs, next_action))
        target = self.target(batch, next_q, temperature, next_log_prob)

        def loss_of_critic(critic: Params) -> tuple[Array, Array]:
            q = self._q(critic, obs, batch.action)
            return self.critic_loss(q, target, critic_weight), self.q_values(q).mean()

        (loss_q, q_mean), gradient = jax.value_and_grad(loss_of_critic, has_aux=True)(state.critic)
        critic, critic_optimiser = _descend(
            self.optimiser, gradient, state.critic_optimiser, state.critic
        )
        target_critic = jax.tree.map(
            lambda slow, fast: slow + config.polyak * (fast - slow), state.target_critic, critic
        )

        def loss_of_actor(actor: Params) -> tuple[Array, Array]:
            action, log_prob = tanh_gaussian(*self._policy(actor, obs), noise[1])
            q = self.aggregate_critics(self.q_values(self._q(critic, obs, action)))
            entropy = -weighted_mean(log_prob, actor_weight)
            return actor_loss(temperature, log_prob, q, actor_weight), entropy

        (loss_pi, entropy), gradient = jax.value_and_grad(loss_of_actor, has_aux=True)(state.actor)
        actor, actor_optimiser = _descend(
            self.optimiser, gradient, state.actor_optimiser, state.actor
        )

        loss_alpha, gradient = jax.value_and_grad(temperature_loss)(
            state.log_temperature, entropy, config.target_entropy * action_dim
        )
        log_temperature, temperature_optimiser = _descend(
            self.temperature_optimiser,
            gradient,
            state.temperature_optimiser,
            state.log_temperature,
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
            state.observations,
        )
        return after, metrics

    def reset(self, state: SACState, key: Array) -> SACState:
        """Fresh networks, temperature and optimisers; statistics of observations stay."""
        return self.init(key)._replace(observations=state.observations)

    def temperature(self, state: SACState) -> Array:
        """alpha, ()."""
        return jnp.exp(state.log_temperature)

    def policy(self, state: SACState) -> SACState:
        """The actor alone."""
        empty = SACState(*cast(Any, [None] * len(SACState._fields)))
        return empty._replace(actor=state.actor, observations=state.observations)

    def layers(self, state: SACState) -> list[nets.Layer]:
        """`greedy` as layers in a row; of the head only the means are needed."""
        network: Any = self.actor_network
        *body, head = network.layers(state.actor)
        kernel, bias = (array[..., : self.spec.action_dim] for array in head.arrays)
        return [*body, nets.Layer("dense", (kernel, bias)), nets.Layer("tanh")]

    def networks(self, state: SACState) -> dict[str, Params]:
        """Actor and critics."""
        return {"actor": state.actor, "critic": state.critic}
