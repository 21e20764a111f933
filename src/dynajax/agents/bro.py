"""BRO (Nauman et al., 2024): large regularised quantile critics, trained often, with resets.

Its second, optimistic actor is left out: its authors' own smaller version does without it too.
"""

from dataclasses import dataclass
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dynajax import nets
from dynajax.agents.sac import SAC, ResidualFields, weighted_mean
from dynajax.config import fields, static, traced
from dynajax.types import Array, Transition


@fields
@dataclass(frozen=True)
class BROFields(ResidualFields):
    """Its authors' numbers; they reset it after 15k, 50k, 250k, ... steps (`learn.reset_at`)."""

    actor_width: int = static(256, 1, about="width of the residual stream of the actor")
    weight_decay: float = traced(
        1e-4, 0, about="decoupled decay of the weights of actor and critics"
    )
    quantiles: int = static(100, 1, about="outputs of a critic")


def quantile_loss(q: Array, target: Array, weight: Array | None = None) -> Array:
    """Quantile regression with Huber's loss (Dabney et al., 2018): (C, B, Q), (B, P) -> ().

    The sum over critics and quantiles, the mean over targets and the batch.
    """
    chex.assert_rank([q, target], [3, 2])
    levels = (jnp.arange(q.shape[-1]) + 0.5) / q.shape[-1]
    error = target[None, :, None, :] - q[..., None]
    huber = jnp.where(jnp.abs(error) <= 1, 0.5 * jnp.square(error), jnp.abs(error) - 0.5)
    tilt = jnp.abs(levels[:, None] - jax.lax.stop_gradient(error < 0))
    return weighted_mean((tilt * huber).mean(-1).sum((0, 2)), weight)


class BRO(SAC):
    """SAC with BRO's networks, quantile critics, and the mean of the critics."""

    Fields: ClassVar[type] = BROFields

    @property
    def actor_network(self) -> nn.Module:
        """(D,) -> (2A,), which `nets.policy_parameters` reads."""
        config = self.config
        return nets.BroNet(config.actor_width, config.actor_blocks, 2 * self.spec.action_dim)

    @property
    def critic_network(self) -> nn.Module:
        """One of the critics: (D+A,) -> (quantiles,)."""
        config = self.config
        return nets.BroNet(config.critic_width, config.critic_blocks, config.quantiles)

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """AdamW (Loshchilov and Hutter, 2019)."""
        return optax.adamw(
            self.config.learning_rate, eps=1e-8, weight_decay=self.config.weight_decay
        )

    @property
    def temperature_optimiser(self) -> optax.GradientTransformation:
        """Of the logarithm of the temperature."""
        return optax.adam(self.config.learning_rate, b1=0.5, eps=1e-8)

    def aggregate_critics(self, q: Array) -> Array:
        """The mean of C critics: (C, ...) -> (...)."""
        return q.mean(0)

    def q_values(self, q: Array) -> Array:
        """The mean of a distribution's quantiles: (..., Q) -> (...)."""
        return q.mean(-1)

    def target(
        self, batch: Transition, next_q: Array, temperature: Array, log_prob: Array
    ) -> Array:
        """y of every quantile at s': (B, Q) -> (B, Q)."""
        entropy = temperature * log_prob
        discount = self.learn.discount * batch.discount
        return batch.reward[:, None] + discount[:, None] * (next_q - entropy[:, None])

    def critic_loss(self, q: Array, target: Array, weight: Array | None) -> Array:
        """Of quantiles (C, B, Q) against quantiles (B, Q)."""
        return quantile_loss(q, target, weight)
