"""A trained policy as a function of observations."""

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dynajax import registry
from dynajax.actions import rescale
from dynajax.agents import Agent, make_agent
from dynajax.networks.export import Layer
from dynajax.policy import selection
from dynajax.runs import policies
from dynajax.runs.policies import Which
from dynajax.settings import agent_from_dict
from dynajax.types import Array, EnvSpec, UsageError
from dynajax.xla import backend


@dataclass(frozen=True, eq=False)
class Policy:
    """A trained policy without exploration: `policy(obs)`, (..., D) -> (..., A).

    Attributes:
      spec: the task's name, sizes and names of observations.
      repeat: simulator steps that an action is to be held for.
      variant, seed: which row of the run it is.
      step: environment steps of training that it had.
      score: the mean return of the run's own evaluation of it. The best of many evaluations is
        flattered by chance; new episodes say what it is worth.
      agent, state: what acts, and what it has learned.
    """

    spec: EnvSpec
    repeat: int
    variant: str
    seed: int
    step: int
    score: float
    agent: Agent
    state: Any

    @property
    def low(self) -> np.ndarray:
        """The least actions, (A,)."""
        return self._bounds[0]

    @property
    def high(self) -> np.ndarray:
        """The largest actions, (A,)."""
        return self._bounds[1]

    @property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        ones = np.ones(self.spec.action_dim)
        low, high = self.spec.bounds or (-ones, ones)
        return np.asarray(low), np.asarray(high)

    @functools.cached_property
    def _greedy(self) -> Any:
        return backend.jit(self.agent.deterministic_action)

    def unit(self, obs: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1], as the environments of `dynajax.envs` take them.

        Args:
          obs: (..., D).

        Returns:
          (..., A) float32.

        Raises:
          UsageError: the last axis is not D.
        """
        obs = np.asarray(obs, np.float32)
        if obs.shape[-1:] != (self.spec.obs_dim,):
            raise UsageError(
                f"the policy of {self.spec.name} takes observations (..., {self.spec.obs_dim}), and "
                f"was given {obs.shape}"
            )
        return np.array(self._greedy(self.state, obs))

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Actions in the task's own bounds: (..., D) -> (..., A) float32; see `unit`."""
        return rescale(self.unit(obs), self.low, self.high).astype(np.float32)

    def layers(self) -> list[Layer]:
        """What `unit` computes, as layers in a row of numpy arrays.

        Raises:
          UsageError: the agent has not been written as such.
        """
        return [
            Layer(kind, tuple(np.asarray(x, np.float32) for x in arrays))
            for kind, arrays in self.agent.layers(self.state)
        ]


def load_policy(folder: str | Path, row: int = 0, which: Which = "best") -> Policy:
    """A policy out of a run's folder; the task's own packages need not be there.

    Args:
      row: which of the run's rows: its variants by their order, the seeds of each beside each other.
      which: "best", at the row's best evaluation, or "last".

    Raises:
      UsageError: with one line that says what is missing.
    """
    chosen = selection.choose(folder, row)
    place = chosen.folder / "policies"
    stored = policies.read(place, chosen.number, which)
    # The task's module may be missing here, but where it is not, it may have the agent.
    if not stored.spec.name.startswith("brax:"):
        with contextlib.suppress(UsageError):
            registry.import_module("--env", stored.spec.name)
    config = agent_from_dict(chosen.plain, chosen.variant)
    agent = make_agent(config, stored.spec)

    def init(key: Array) -> Any:
        return agent.policy(agent.init(key))

    return Policy(
        spec=stored.spec,
        repeat=chosen.plain["task"]["repeat"],
        variant=chosen.variant,
        seed=chosen.seed,
        step=stored.step,
        score=stored.score,
        agent=agent,
        state=jax.device_put(selection.filled(selection.shapes(init), stored.leaves, place)),
    )
