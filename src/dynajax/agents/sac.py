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
from jaxtyping import Array, Float

from dynajax.agents.base import Agent
from dynajax.config import Config, fields, static, traced
from dynajax.networks import params as network_params
from dynajax.networks.export import TANH, Layer
from dynajax.networks.initializers import orthogonal
from dynajax.networks.mlp import MLP
from dynajax.networks.normalization import Statistics
from dynajax.types import Metrics, Params, Transition, UsageError
from dynajax.xla import backend

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0


@fields
@dataclass(frozen=True)
class LossFields:
    """Settings of every agent with SAC's losses, whatever its networks."""

    critics: int = static(2, 1, about="number of critics")
    learning_rate: float = traced(3e-4, 0, about="learning rate of actor, critics, temperature")
    polyak: float = traced(
        0.005, 0, 1, about="share of the new critics in the target critics at each update"
    )
    initial_temperature: float = traced(1.0, 1e-8, about="initial entropy coefficient")
    target_entropy: float = traced(-0.5, about="target entropy per action dimension")
    log_std_min: float = traced(LOG_STD_MIN, about="smallest log standard deviation of the policy")
    log_std_max: float = traced(LOG_STD_MAX, about="largest log standard deviation of the policy")


@fields
@dataclass(frozen=True)
class SACFields(LossFields):
    """Settings of the preset `paper`."""

    hidden: tuple[int, ...] = static(
        (256, 256), 1, about="widths of the hidden layers of actor and critics"
    )
    critic_layer_norm: bool = static(False, about="LayerNorm in each hidden layer of the critics")


@fields
@dataclass(frozen=True)
class ResidualFields(LossFields):
    """Settings of agents with residual networks."""

    actor_width: int = static(128, 1, about="width of the actor's residual stream")
    actor_blocks: int = static(1, 0, about="residual blocks of the actor")
    critic_width: int = static(512, 1, about="width of a critic's residual stream")
    critic_blocks: int = static(2, 0, about="residual blocks of a critic")
    weight_decay: float = traced(1e-2, 0, about="decoupled weight decay of actor and critics")


class SACState(NamedTuple):
    """All of Soft Actor-Critic that changes."""

    actor: Params
    critic: Params  # leaves (C, ...)
    target_critic: Params  # leaves (C, ...)
    log_temperature: Float[Array, ""]
    actor_opt_state: optax.OptState
    critic_opt_state: optax.OptState
    temperature_opt_state: optax.OptState
    observations: Statistics | None = None  # of agents that normalize observations


def policy_parameters(
    output: Float[Array, "*B 2*A"],
    low: Array | float = LOG_STD_MIN,
    high: Array | float = LOG_STD_MAX,
) -> tuple[Float[Array, "*B A"], Float[Array, "*B A"]]:
    """Return mean and log standard deviation of the Gaussian before tanh.

    log std = low + (high - low)/2 (1 + tanh x), so a new policy is narrow (std e^-4 with the usual
    bounds).
    """
    mean, x = jnp.split(output, 2, -1)
    return mean, low + 0.5 * (high - low) * (1 + jnp.tanh(x))


def tanh_gaussian(
    mean: Float[Array, "*B A"], log_std: Float[Array, "*B A"], noise: Float[Array, "*B A"]
) -> tuple[Float[Array, "*B A"], Float[Array, "*B"]]:
    """Return the action tanh(u), u = mean + std * noise, and its log-density.

    log pi = sum_A [log N(u; mean, std) - log(1 - tanh(u)^2)] (Haarnoja et al., 2018, appendix C).
    The last term is computed as 2 (log 2 - u - softplus(-2u)), which stays finite for large u.
    """
    chex.assert_equal_shape([mean, log_std, noise])
    u = mean + jnp.exp(log_std) * noise
    gaussian = -0.5 * jnp.square(noise) - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), (gaussian - squash).sum(-1)


def masked_mean(
    values: Float[Array, " B"],
    mask: Float[Array, " B"],
    weight: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Return the mean of the values whose mask is 1, each times its weight if there are weights.

    Args:
      weight: 0 where the mask is 0.
    """
    chex.assert_equal_shape([values, mask])
    weight = mask if weight is None else weight
    return (weight * values).sum() / jnp.maximum(mask.sum(), 1e-8)


def td_target(
    discount: Array | float,
    batch: Transition,
    next_q: Float[Array, " B"],
    temperature: Float[Array, ""],
    log_prob: Float[Array, " B"],
) -> Float[Array, " B"]:
    """Return y = r + gamma d (Q(s', a') - alpha log pi(a'|s'))."""
    chex.assert_equal_shape([batch.reward, batch.discount, next_q, log_prob])
    return batch.reward + discount * batch.discount * (next_q - temperature * log_prob)


def critic_loss(
    q: Float[Array, "C B"],
    target: Float[Array, " B"],
    weight: Float[Array, " B"],
    mask: Float[Array, " B"],
) -> Float[Array, ""]:
    """Return mean_B w sum_C (Q - y)^2, see `masked_mean`."""
    chex.assert_equal_shape_suffix([q, target], 1)
    return masked_mean(jnp.square(q - target).sum(0), mask, weight)


def actor_loss(
    temperature: Float[Array, ""],
    log_prob: Float[Array, " B"],
    q: Float[Array, " B"],
    mask: Float[Array, " B"],
) -> Float[Array, ""]:
    """Return mean_B (alpha log pi - Q), see `masked_mean`."""
    chex.assert_equal_shape([log_prob, q])
    return masked_mean(temperature * log_prob - q, mask)


def temperature_loss(
    log_temperature: Float[Array, ""], entropy: Float[Array, ""], target_entropy: Array | float
) -> Float[Array, ""]:
    """Return alpha (entropy - target entropy), to be differentiated by log alpha."""
    return jnp.exp(log_temperature) * (entropy - target_entropy)


def _descend(
    optimizer: optax.GradientTransformation, gradient: Params, opt_state: Any, params: Params
) -> tuple[Params, Any]:
    """Take one step and return the parameters and the optimizer's state."""
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


class SAC(Agent):
    """Soft Actor-Critic with a learned temperature (Haarnoja et al., 2018, arXiv:1812.05905).

    As in the code of FTFL's authors, the standard deviation is bounded by a tanh, the entropy target
    is -A/2, and the actor's step uses the critics that the same update has changed.
    """

    Fields: ClassVar[type] = SACFields

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse an empty range of the policy's standard deviation."""
        low, high = config.agent.log_std_min, config.agent.log_std_max
        if not low < high:
            raise UsageError(
                f"--set agent.log_std_min={low:g}: it must be under agent.log_std_max={high:g}"
            )

    @property
    def actor_network(self) -> nn.Module:
        """The actor, (D,) -> (2A,), see `policy_parameters`."""
        init = orthogonal(math.sqrt(2))
        return MLP(self.config.hidden, 2 * self.spec.action_dim, nn.relu, init)

    @property
    def critic_network(self) -> nn.Module:
        """One critic, (D+A,) -> (1,)."""
        init = orthogonal(math.sqrt(2))
        return MLP(self.config.hidden, 1, nn.relu, init, self.config.critic_layer_norm)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of actor and critics."""
        return self.temperature_optimizer

    @property
    def temperature_optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the temperature's logarithm."""
        return optax.adam(self.config.learning_rate, eps=1e-8)

    def normalize_obs(self, state: SACState, obs: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Return observations as the networks read them."""
        return obs

    def aggregate_critics(self, q: Float[Array, " C *B"]) -> Float[Array, "*B"]:
        """Return the smallest of the critics' outputs (Fujimoto et al., 2018)."""
        # `min` finds the smallest by equality and divides its gradient by how many it finds: none,
        # if the compiler computes the same q twice with different rounding. Comparisons are safe.
        return functools.reduce(lambda a, b: jnp.where(a <= b, a, b), q)

    def q_values(self, q: Float[Array, "*B X"]) -> Float[Array, "*B"]:
        """Return values from a critic's outputs."""
        return q[..., 0]

    def target(
        self,
        batch: Transition,
        next_q: Float[Array, "B X"],
        temperature: Float[Array, ""],
        log_prob: Float[Array, " B"],
    ) -> Float[Array, "B ..."]:
        """Return the critics' targets from their aggregated outputs at s'."""
        return td_target(self.learn.discount, batch, next_q[..., 0], temperature, log_prob)

    def critic_loss(
        self,
        q: Float[Array, "C B X"],
        target: Float[Array, "B ..."],
        weight: Float[Array, " B"],
        mask: Float[Array, " B"],
    ) -> Float[Array, ""]:
        """Return the loss of the critics' outputs."""
        return critic_loss(q[..., 0], target, weight, mask)

    def init(self, key: Array) -> SACState:
        """Return a new agent; the target critics start as copies of the critics."""
        actor_key, critic_key = jax.random.split(key)
        spec = self.spec
        actor = self.actor_network.init(actor_key, jnp.zeros(spec.obs_dim))["params"]
        inputs = spec.obs_dim + spec.action_dim
        critic = network_params.init_stacked(
            self.critic_network, critic_key, self.config.critics, inputs
        )
        log_temperature = jnp.log(jnp.asarray(self.config.initial_temperature, jnp.float32))
        return SACState(
            actor=actor,
            critic=critic,
            target_critic=jax.tree.map(jnp.copy, critic),
            log_temperature=log_temperature,
            actor_opt_state=self.optimizer.init(actor),
            critic_opt_state=self.optimizer.init(critic),
            temperature_opt_state=self.temperature_optimizer.init(log_temperature),
        )

    def _policy(self, actor: Params, obs: Array) -> tuple[Array, Array]:
        """Return mean and log std of the policy for normalized observations."""
        output = network_params.apply(self.actor_network, actor, obs)
        return policy_parameters(output, self.config.log_std_min, self.config.log_std_max)

    def _q(self, critic: Params, obs: Array, action: Array) -> Array:
        """Return the outputs of every critic, (C, ..., X), for normalized observations."""
        inputs = jnp.concatenate([obs, action], -1)
        if backend.lowering().join_critics:
            return jax.vmap(self._one_q, (0, None))(critic, inputs)
        # Copies of the inputs keep one matmul per critic. JAX would join the first layers of all
        # critics and transpose them, which is eleven more kernels per update on an accelerator.
        inputs = jnp.broadcast_to(inputs, (self.config.critics, *inputs.shape))
        return jax.vmap(self._one_q)(critic, inputs)

    def _one_q(self, critic: Params, inputs: Array) -> Array:
        """Return the outputs of one critic, (..., X)."""
        return network_params.apply(self.critic_network, critic, inputs)

    def act(
        self, state: SACState, obs: Float[Array, "*B D"], noise: Float[Array, "*B A"]
    ) -> tuple[Float[Array, "*B A"], Float[Array, "*B"]]:
        """Sample the policy and return actions with their log-densities."""
        mean, log_std = self._policy(state.actor, self.normalize_obs(state, obs))
        return tanh_gaussian(mean, log_std, noise)

    def action_noise(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "*B A"]:
        """Draw standard normal noise for actions."""
        return jax.random.normal(key, (*shape, self.spec.action_dim))

    def deterministic_action(
        self, state: SACState, obs: Float[Array, "*B D"]
    ) -> Float[Array, "*B A"]:
        """Return tanh of the policy's mean."""
        return jnp.tanh(self._policy(state.actor, self.normalize_obs(state, obs))[0])

    def value(
        self, state: SACState, obs: Float[Array, "*B D"], action: Float[Array, "*B A"]
    ) -> Float[Array, " C *B"]:
        """Return each critic's value."""
        return self.q_values(self._q(state.critic, self.normalize_obs(state, obs), action))

    def noise(self, key: Array, updates: int) -> Float[Array, "U 2 B A"]:
        """Draw standard normal noise for the policy's actions at s' and at s."""
        shape = updates, 2, self.learn.batch, self.spec.action_dim
        # One-dimensional draws take a kernel less on a GPU; the numbers are the same.
        return jax.random.normal(key, (math.prod(shape),)).reshape(shape)

    def update(
        self,
        state: SACState,
        batch: Transition,
        weight: Float[Array, " B"],
        mask: Float[Array, " B"],
        noise: Float[Array, "2 B A"],
    ) -> tuple[SACState, Metrics]:
        """Update critics, target critics, the actor against the new critics, and the temperature."""
        chex.assert_shape(batch.reward, (self.learn.batch,))
        temperature = self.temperature(state)
        batch = batch._replace(
            obs=self.normalize_obs(state, batch.obs),
            next_obs=self.normalize_obs(state, batch.next_obs),
        )
        state, metrics = self._update_critics(state, batch, temperature, weight, mask, noise[0])
        state, of_actor = self._update_actor(state, batch.obs, temperature, mask, noise[1])
        state, of_temperature = self._update_temperature(state, of_actor["entropy"])
        return state, {**metrics, **of_actor, **of_temperature, "temperature": temperature}

    def _update_critics(
        self,
        state: SACState,
        batch: Transition,
        temperature: Float[Array, ""],
        weight: Float[Array, " B"],
        mask: Float[Array, " B"],
        noise: Float[Array, "B A"],
    ) -> tuple[SACState, Metrics]:
        """Move the critics towards the TD targets, and the target critics towards the critics."""
        next_policy = self._policy(state.actor, batch.next_obs)
        next_action, next_log_prob = tanh_gaussian(*next_policy, noise)
        next_q = self.aggregate_critics(self._q(state.target_critic, batch.next_obs, next_action))
        target = self.target(batch, next_q, temperature, next_log_prob)

        def loss_of_critic(critic: Params) -> tuple[Array, Array]:
            q = self._q(critic, batch.obs, batch.action)
            return self.critic_loss(q, target, weight, mask), self.q_values(q).mean()

        (loss, q_mean), gradient = jax.value_and_grad(loss_of_critic, has_aux=True)(state.critic)
        critic, opt_state = _descend(self.optimizer, gradient, state.critic_opt_state, state.critic)
        target_critic = jax.tree.map(
            lambda slow, fast: slow + self.config.polyak * (fast - slow),
            state.target_critic,
            critic,
        )
        state = state._replace(
            critic=critic, target_critic=target_critic, critic_opt_state=opt_state
        )
        return state, {"critic_loss": loss, "q_mean": q_mean, "target_mean": target.mean()}

    def _update_actor(
        self,
        state: SACState,
        obs: Float[Array, "B D"],
        temperature: Float[Array, ""],
        mask: Float[Array, " B"],
        noise: Float[Array, "B A"],
    ) -> tuple[SACState, Metrics]:
        """Move the actor towards actions of higher value and entropy."""

        def loss_of_actor(actor: Params) -> tuple[Array, Array]:
            action, log_prob = tanh_gaussian(*self._policy(actor, obs), noise)
            q = self.aggregate_critics(self.q_values(self._q(state.critic, obs, action)))
            entropy = -masked_mean(log_prob, mask)
            return actor_loss(temperature, log_prob, q, mask), entropy

        (loss, entropy), gradient = jax.value_and_grad(loss_of_actor, has_aux=True)(state.actor)
        actor, opt_state = _descend(self.optimizer, gradient, state.actor_opt_state, state.actor)
        state = state._replace(actor=actor, actor_opt_state=opt_state)
        return state, {"actor_loss": loss, "entropy": entropy}

    def _update_temperature(
        self, state: SACState, entropy: Float[Array, ""]
    ) -> tuple[SACState, Metrics]:
        """Move the temperature towards the one at which the policy has the target entropy."""
        target_entropy = self.config.target_entropy * self.spec.action_dim
        loss, gradient = jax.value_and_grad(temperature_loss)(
            state.log_temperature, entropy, target_entropy
        )
        log_temperature, opt_state = _descend(
            self.temperature_optimizer,
            gradient,
            state.temperature_opt_state,
            state.log_temperature,
        )
        state = state._replace(log_temperature=log_temperature, temperature_opt_state=opt_state)
        return state, {"temperature_loss": loss}

    def reset(self, state: SACState, key: Array) -> SACState:
        """Return new networks, temperature and optimizers; observation statistics stay."""
        return self.init(key)._replace(observations=state.observations)

    def temperature(self, state: SACState) -> Float[Array, ""]:
        """Return the entropy coefficient alpha."""
        return jnp.exp(state.log_temperature)

    def policy(self, state: SACState) -> SACState:
        """Return the actor and the observation statistics, None for the rest."""
        empty = SACState(*cast(Any, [None] * len(SACState._fields)))
        return empty._replace(actor=state.actor, observations=state.observations)

    def acting_part(self, state: SACState) -> SACState:
        """Return the actor and the observation statistics, None for the rest."""
        # A subclass's own `act` may read more.
        return self.policy(state) if type(self).act is SAC.act else state

    def layers(self, state: SACState) -> list[Layer]:
        """Return `deterministic_action` as a sequence of layers; of the head only the means."""
        network: Any = self.actor_network
        *body, head = network.layers(state.actor)
        kernel, bias = (array[..., : self.spec.action_dim] for array in head.arrays)
        return [*body, Layer("dense", (kernel, bias)), TANH]

    def networks(self, state: SACState) -> dict[str, Params]:
        """Return actor and critics."""
        return {"actor": state.actor, "critic": state.critic}
