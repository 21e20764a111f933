"""BRO (Nauman et al., 2024): large regularized quantile critics, many updates, and resets.

Its second, optimistic actor is left out, as in the authors' own smaller version.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dynajax.agents.sac import SAC, ResidualFields, masked_mean
from dynajax.config import fields, static, traced
from dynajax.networks import export
from dynajax.networks.dense import dot_general, layer_norm
from dynajax.networks.export import Layer
from dynajax.networks.initializers import orthogonal
from dynajax.types import Params, Transition


@fields
@dataclass(frozen=True)
class BROFields(ResidualFields):
    """The authors' settings; they reset after 15k, 50k, 250k, ... steps (`learn.reset_at`)."""

    actor_width: int = static(256, 1, about="width of the actor's residual stream")
    weight_decay: float = traced(1e-4, 0, about="decoupled weight decay of actor and critics")
    quantiles: int = static(100, 1, about="quantiles that a critic predicts")


class BroNet(nn.Module):
    """x = relu(LN(W x)), blocks x + LN(W2 relu(LN(W1 x))), and a linear head."""

    width: int
    blocks: int
    outputs: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B X"]) -> Float[Array, "*B Y"]:
        dense = functools.partial(
            nn.Dense, dot_general=dot_general, kernel_init=orthogonal(math.sqrt(2))
        )
        x = nn.relu(layer_norm("norm")(dense(self.width, name="embed")(x)))
        for i in range(self.blocks):
            branch = dense(self.width, name=f"first_{i}")(x)
            branch = nn.relu(layer_norm(f"first_norm_{i}")(branch))
            branch = dense(self.width, name=f"second_{i}")(branch)
            x = x + layer_norm(f"second_norm_{i}")(branch)
        return dense(self.outputs, name="head")(x)

    def layers(self, params: Params) -> list[Layer]:
        """Return the network as layers."""
        dense, norm = (
            functools.partial(export.dense, params),
            functools.partial(export.norm, params),
        )
        layers = [dense("embed"), norm("norm"), export.RELU]
        for i in range(self.blocks):
            layers += [export.KEEP, dense(f"first_{i}"), norm(f"first_norm_{i}"), export.RELU]
            layers += [dense(f"second_{i}"), norm(f"second_norm_{i}"), export.ADD]
        return [*layers, dense("head")]


def quantile_loss(
    q: Float[Array, "C B Q"],
    target: Float[Array, "B P"],
    weight: Float[Array, " B"],
    mask: Float[Array, " B"],
) -> Float[Array, ""]:
    """Return the quantile Huber loss (Dabney et al., 2018, equation 10).

    It is the sum over critics and quantiles of the mean over targets and the batch, see `masked_mean`.
    """
    chex.assert_rank([q, target], [3, 2])
    levels = (jnp.arange(q.shape[-1]) + 0.5) / q.shape[-1]
    error = target[None, :, None, :] - q[..., None]
    huber = jnp.where(jnp.abs(error) <= 1, 0.5 * jnp.square(error), jnp.abs(error) - 0.5)
    tilt = jnp.abs(levels[:, None] - jax.lax.stop_gradient(error < 0))
    return masked_mean((tilt * huber).mean(-1).sum((0, 2)), mask, weight)


class BRO(SAC):
    """SAC with BRO's networks, quantile critics, and the mean of the critics."""

    Fields: ClassVar[type] = BROFields

    @property
    def actor_network(self) -> nn.Module:
        """The actor, (D,) -> (2A,), see `sac.policy_parameters`."""
        config = self.config
        return BroNet(config.actor_width, config.actor_blocks, 2 * self.spec.action_dim)

    @property
    def critic_network(self) -> nn.Module:
        """One critic, (D+A,) -> (quantiles,)."""
        config = self.config
        return BroNet(config.critic_width, config.critic_blocks, config.quantiles)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW (Loshchilov and Hutter, 2019)."""
        config = self.config
        return optax.adamw(config.learning_rate, eps=1e-8, weight_decay=config.weight_decay)

    @property
    def temperature_optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the temperature's logarithm."""
        return optax.adam(self.config.learning_rate, b1=0.5, eps=1e-8)

    def aggregate_critics(self, q: Float[Array, " C *B"]) -> Float[Array, "*B"]:
        """Return the mean of the critics."""
        return q.mean(0)

    def q_values(self, q: Float[Array, "*B Q"]) -> Float[Array, "*B"]:
        """Return the mean of the quantiles."""
        return q.mean(-1)

    def target(
        self,
        batch: Transition,
        next_q: Float[Array, "B Q"],
        temperature: Float[Array, ""],
        log_prob: Float[Array, " B"],
    ) -> Float[Array, "B Q"]:
        """Return the TD target of every quantile."""
        entropy = temperature * log_prob
        discount = self.learn.discount * batch.discount
        return batch.reward[:, None] + discount[:, None] * (next_q - entropy[:, None])

    def critic_loss(
        self,
        q: Float[Array, "C B Q"],
        target: Float[Array, "B Q"],
        weight: Float[Array, " B"],
        mask: Float[Array, " B"],
    ) -> Float[Array, ""]:
        """Return the quantile Huber loss of all critics."""
        return quantile_loss(q, target, weight, mask)
