"""SimBa (Lee et al., 2024): SAC with residual networks, on normalised observations."""

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import optax

from dynajax import nets
from dynajax.agents.sac import SAC, ResidualFields, SACState
from dynajax.config import fields, static, traced
from dynajax.types import Array


@fields
@dataclass(frozen=True)
class SimBaFields(ResidualFields):
    """Its authors' numbers for tasks that do not terminate."""

    critics: int = static(1, 1, about="how many critics; two for tasks that terminate")
    learning_rate: float = traced(1e-4, 0, about="of actor, critics and temperature")
    initial_temperature: float = traced(0.01, 1e-8, about="price of a nat of log-density at first")
    normalise: bool = static(True, about="observations by their running mean and variance")
    clip: float = traced(10.0, 1e-3, about="largest normalised observation, in standard deviations")


class SimBa(SAC):
    """SAC with SimBa's networks, statistics of observations, and decoupled weight decay."""

    Fields: ClassVar[type] = SimBaFields

    @property
    def actor_network(self) -> nn.Module:
        """(D,) -> (2A,), which `nets.policy_parameters` reads."""
        config = self.config
        return nets.SimBa(config.actor_width, config.actor_blocks, 2 * self.spec.action_dim)

    @property
    def critic_network(self) -> nn.Module:
        """One of the critics: (D+A,) -> (1,)."""
        return nets.SimBa(self.config.critic_width, self.config.critic_blocks, 1)

    @property
    def optimiser(self) -> optax.GradientTransformation:
        """AdamW (Loshchilov and Hutter, 2019)."""
        return optax.adamw(
            self.config.learning_rate, eps=1e-8, weight_decay=self.config.weight_decay
        )

    def init(self, key: Array) -> SACState:
        """A new agent that has seen nothing."""
        state = super().init(key)
        if not self.config.normalise:
            return state
        return state._replace(observations=nets.init_statistics(self.spec.obs_dim))

    def normalize_obs(self, state: SACState, obs: Array) -> Array:
        """Observations in standard deviations from their mean: (..., D) -> (..., D)."""
        if state.observations is None:
            return obs
        return nets.normalize(state.observations, obs, self.config.clip)

    def update_obs_statistics(self, state: SACState, obs: Array, valid: Array) -> SACState:
        """With one more real observation (D,) in the statistics."""
        if state.observations is None:
            return state
        return state._replace(observations=nets.update_statistics(state.observations, obs, valid))

    def layers(self, state: SACState) -> list[nets.Layer]:
        """`greedy` as layers in a row."""
        layers, seen = super().layers(state), state.observations
        if seen is None:
            return layers
        arrays = seen.mean, nets.spread(seen), self.config.clip
        return [nets.Layer("standardise", arrays), *layers]
