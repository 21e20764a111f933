"""What an agent is: pure methods on its own state, written for one learner.

An agent acts, estimates values and learns from minibatches. It does not know where transitions come
from. Its state is any pytree; it is kept in the `LearnerState` and in checkpoints. To add an agent,
subclass `Agent` in one file and add the class to `AGENTS`, or name it as `--agent=module:name`.
"""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dynajax.config import Config, LearnConfig, NoFields
from dynajax.networks.export import Layer
from dynajax.types import EnvSpec, Metrics, Params, Transition, UsageError


@dataclass(frozen=True)
class Agent(metaclass=abc.ABCMeta):
    """An agent of one learner.

    Attributes:
      learn: settings that all agents share.
      config: the agent's own settings, a `Fields`, set as `--set agent.FIELD`.
      spec: the task.
    """

    learn: LearnConfig
    config: Any
    spec: EnvSpec

    #: A dataclass decorated with `config.fields`, with a default for every field.
    Fields: ClassVar[type] = NoFields

    @classmethod  # noqa: B027 -- an extension may leave it out
    def check(cls, config: Config) -> None:
        """Refuse a configuration that the agent cannot work with.

        Raises:
          UsageError: one line that names the setting and the remedy.
        """

    @abc.abstractmethod
    def init(self, key: Array) -> Any:
        """Return the state of a new agent."""

    @abc.abstractmethod
    def act(
        self, state: Any, obs: Float[Array, "*B D"], noise: Any
    ) -> tuple[Float[Array, "*B A"], Float[Array, "*B"]]:
        """Sample exploring actions in [-1, 1] and return them with their log-densities.

        Args:
          noise: what `action_noise` returned, by default a PRNG key.
        """

    @abc.abstractmethod
    def deterministic_action(self, state: Any, obs: Float[Array, "*B D"]) -> Float[Array, "*B A"]:
        """Return the actions that evaluations take."""

    @abc.abstractmethod
    def value(
        self, state: Any, obs: Float[Array, "*B D"], action: Float[Array, "*B A"]
    ) -> Float[Array, " C *B"]:
        """Return each critic's estimate of the discounted return."""

    @abc.abstractmethod
    def update(
        self,
        state: Any,
        batch: Transition,
        weight: Float[Array, " B"],
        mask: Float[Array, " B"],
        noise: Any,
    ) -> tuple[Any, Metrics]:
        """Take one gradient step on a minibatch.

        Args:
          batch: leaves (B, ...).
          weight: of each transition in the critic's loss, which is the sum of weight times loss,
            divided by the sum of `mask`; 0 for an invalid transition.
          mask: 1 for a valid and 0 for an invalid transition; the weight in all other losses.
          noise: one of the U elements that `noise` returned.

        Returns:
          The new state, and scalars by name.
        """

    def noise(self, key: Array, updates: int) -> Any:
        """Draw the random numbers of `updates` updates at once, leaves (U, ...).

        Many small draws would take longer than the arithmetic around them.
        """
        return jax.random.split(key, updates)

    def action_noise(self, key: Array, shape: tuple[int, ...]) -> Any:
        """Return the random numbers with which `act` samples actions, by default the key itself.

        Where rollouts are made within updates, those of all updates are drawn at once.

        Args:
          shape: of the observations, without their last axis.
        """
        return key

    def update_obs_statistics(
        self, state: Any, obs: Float[Array, " D"], valid: Bool[Array, ""]
    ) -> Any:
        """Return the state after one real observation, if it is valid.

        Called once per agent step, including the random ones, and never in updates.
        """
        return state

    def reset(self, state: Any, key: Array) -> Any:
        """Return new networks (Nikishin et al., 2022); statistics of observations should stay."""
        return self.init(key)

    def temperature(self, state: Any) -> Float[Array, ""]:
        """Return the entropy coefficient alpha; 0 if the agent has none."""
        return jnp.zeros(())

    def policy(self, state: Any) -> Any:
        """Return the part of the state that `deterministic_action` reads, None for the rest."""
        return state

    def acting_part(self, state: Any) -> Any:
        """Return the part that `act` and `deterministic_action` read, None for the rest.

        By default it is the whole state. A smaller part makes an agent step faster.
        """
        return state

    def layers(self, state: Any) -> list[Layer]:
        """Return `deterministic_action` as a sequence of layers, for use without JAX.

        Raises:
          UsageError: the agent does not implement it.
        """
        raise UsageError(
            f"{type(self).__name__}: this agent cannot be exported yet; give its class a method "
            "layers(state), see dynajax.networks.export.Layer"
        )

    def networks(self, state: Any) -> dict[str, Params]:
        """Return parameters by the network's name, such as actor and critic."""
        return {"agent": state}
