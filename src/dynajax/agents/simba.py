"""SimBa (Lee et al., 2024): SAC with residual networks, on normalized observations."""

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import optax
from jaxtyping import Array, Bool, Float

from dynajax.agents.sac import SAC, ResidualFields, SACState
from dynajax.config import fields, static, traced
from dynajax.networks import normalization
from dynajax.networks.export import Layer
from dynajax.networks.resnet import ResNet


@fields
@dataclass(frozen=True)
class SimBaFields(ResidualFields):
    """The authors' settings for tasks that do not terminate."""

    critics: int = static(1, 1, about="number of critics; use two for tasks that terminate")
    learning_rate: float = traced(1e-4, 0, about="learning rate of actor, critics, temperature")
    initial_temperature: float = traced(0.01, 1e-8, about="initial entropy coefficient")
    normalise: bool = static(True, about="normalize observations by running mean and variance")
    clip: float = traced(10.0, 1e-3, about="largest normalized observation, standard deviations")


class SimBa(SAC):
    """SAC with SimBa's networks, observation statistics and decoupled weight decay."""

    Fields: ClassVar[type] = SimBaFields

    @property
    def actor_network(self) -> nn.Module:
        """The actor, (D,) -> (2A,), see `sac.policy_parameters`."""
        config = self.config
        return ResNet(config.actor_width, config.actor_blocks, 2 * self.spec.action_dim)

    @property
    def critic_network(self) -> nn.Module:
        """One critic, (D+A,) -> (1,)."""
        return ResNet(self.config.critic_width, self.config.critic_blocks, 1)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW (Loshchilov and Hutter, 2019)."""
        config = self.config
        return optax.adamw(config.learning_rate, eps=1e-8, weight_decay=config.weight_decay)

    def init(self, key: Array) -> SACState:
        """Return a new agent without observation statistics."""
        state = super().init(key)
        if not self.config.normalise:
            return state
        return state._replace(observations=normalization.init(self.spec.obs_dim))

    def normalize_obs(self, state: SACState, obs: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Return observations in standard deviations from their mean."""
        if state.observations is None:
            return obs
        return normalization.normalize(state.observations, obs, self.config.clip)

    def update_obs_statistics(
        self, state: SACState, obs: Float[Array, " D"], valid: Bool[Array, ""]
    ) -> SACState:
        """Add one real observation to the statistics."""
        if state.observations is None:
            return state
        return state._replace(observations=normalization.update(state.observations, obs, valid))

    def layers(self, state: SACState) -> list[Layer]:
        """Return `deterministic_action` as a sequence of layers."""
        layers, statistics = super().layers(state), state.observations
        if statistics is None:
            return layers
        arrays = statistics.mean, normalization.std(statistics), self.config.clip
        return [Layer("standardise", arrays), *layers]
