"""What an agent is: pure methods on a state of its own, written for one row.

An agent acts, says what its critics expect, and learns from minibatches. It knows nothing of where
transitions come from. Its state is any pytree, which lives in the `Row` and in checkpoints. To add
one, subclass `Agent` and put the class into `AGENTS`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dynajax.config import Config, LearnConfig, NoFields
from dynajax.nets import Layer
from dynajax.types import Array, EnvSpec, Metrics, Params, Transition, UsageError


@dataclass(frozen=True)
class Agent:
    """An agent of one row.

    Attributes:
      learn: what every agent is told.
      own: the agent's own fields, a `Fields`, set as `--set agent.FIELD`.
      spec: the task.
    """

    learn: LearnConfig
    config: Any
    spec: EnvSpec

    #: A dataclass made by `config.fields`, every field with a default.
    Fields: ClassVar[type] = NoFields

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuses a configuration that the agent cannot work with.

        Raises:
          UsageError: with what would be right.
        """

    def init(self, key: Array) -> Any:
        """A fresh agent's state."""
        raise NotImplementedError

    def act(self, state: Any, obs: Array, key: Array) -> tuple[Array, Array]:
        """Exploring actions in [-1, 1] and their log-densities: (..., D) -> (..., A), (...)."""
        raise NotImplementedError

    def deterministic_action(self, state: Any, obs: Array) -> Array:
        """The actions that it is judged by: (..., D) -> (..., A)."""
        raise NotImplementedError

    def value(self, state: Any, obs: Array, action: Array) -> Array:
        """What each of C critics expects, the discounted return: (..., D), (..., A) -> (C, ...)."""
        raise NotImplementedError

    def update(
        self,
        state: Any,
        batch: Transition,
        critic_weight: Array | None,
        actor_weight: Array | None,
        noise: Any,
    ) -> tuple[Any, Metrics]:
        """One gradient update.

        Args:
          batch: leaves (B, ...).
          critic_weight, actor_weight: (B,) what each transition counts in a loss, 0 for a hole;
            None: all alike.
          noise: one of the U that `noise` drew.

        Returns:
          The new state, and scalars by name.
        """
        raise NotImplementedError

    def noise(self, key: Array, updates: int) -> Any:
        """What `updates` updates draw with: leaves (U, ...), one of them for each.

        Drawn at once, for many small draws take longer than the arithmetic around them.
        """
        return jax.random.split(key, updates)

    def update_obs_statistics(self, state: Any, obs: Array, valid: Array) -> Any:
        """The state once a real observation (D,) was made; `valid` () is whether it counts.

        It is called once an environment step, the random ones included, and never in updates.
        """
        return state

    def reset(self, state: Any, key: Array) -> Any:
        """Fresh networks (Nikishin et al., 2022). What was learned of observations should stay."""
        return self.init(key)

    def temperature(self, state: Any) -> Array:
        """The price of a nat of log-density in the agent's return, (); 0 without one."""
        return jnp.zeros(())

    def policy(self, state: Any) -> Any:
        """The state with what `greedy` reads alone, for an exported policy; None for the rest."""
        return state

    def layers(self, state: Any) -> list[Layer]:
        """`greedy` as layers in a row, (..., D) -> (..., A), for use without JAX.

        Raises:
          UsageError: it has not been written as such.
        """
        raise UsageError(
            f"{type(self).__name__}: this agent cannot be exported yet; give its class a method "
            "layers(state), see dynajax.nets.Layer"
        )

    def networks(self, state: Any) -> dict[str, Params]:
        """Parameters by the network's name, such as actor and critic."""
        return {"agent": state}
