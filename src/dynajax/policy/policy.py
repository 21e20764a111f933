"""Trained policy as a function of observations."""

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from dynajax import registry
from dynajax.actions import rescale
from dynajax.agents import Agent, make_agent
from dynajax.networks.export import Layer
from dynajax.policy import selection
from dynajax.runs import policies
from dynajax.runs.directory import reading_config
from dynajax.runs.policies import Which
from dynajax.settings import agent_from_dict
from dynajax.types import Array, EnvSpec, UsageError
from dynajax.xla import backend


@dataclass(frozen=True, eq=False, repr=False)
class Policy(selection.Loaded):
    """Trained policy without exploration: `policy(obs)`, (..., D) -> (..., A).

    It also takes observations as the task returns them, and returns actions as the task takes them;
    leading axes are a batch.

    Attributes:
      spec: name and sizes of the task, and names of the observation's dimensions.
      repeat: number of frames that an action must be repeated for.
      variant, seed: learner of the run.
      step: agent steps of training.
      score: mean return of the run's evaluation of this policy. For the best policy it is biased
        upwards, because it is a maximum over evaluations; use new episodes for an unbiased estimate.
      agent, state: agent, and its learned parameters.
      evaluate_on: the run's setting `host.evaluate_on`.
    """

    noun: ClassVar[str] = "policy"

    spec: EnvSpec
    repeat: int
    variant: str
    seed: int
    step: int
    score: float
    agent: Agent
    state: Any
    evaluate_on: str = "copies"

    @property
    def low(self) -> np.ndarray:
        """Return the lower bounds of the actions, (A,)."""
        return self._bounds[0]

    @property
    def high(self) -> np.ndarray:
        """Return the upper bounds of the actions, (A,)."""
        return self._bounds[1]

    @property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        ones = np.ones(self.spec.action_dim)
        low, high = self.spec.bounds or (-ones, ones)
        return np.asarray(low), np.asarray(high)

    @functools.cached_property
    def float32_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds rounded inwards to float32, so that no action exceeds the task's."""
        low, high = (bound.astype(np.float32) for bound in self._bounds)
        low = np.where(low < self.low, np.nextafter(low, np.float32(np.inf)), low)
        high = np.where(high > self.high, np.nextafter(high, np.float32(-np.inf)), high)
        return low, high

    @functools.cached_property
    def _deterministic_action(self) -> Any:
        return backend.jit(self.agent.deterministic_action)

    def normalized_action(self, obs: np.ndarray) -> np.ndarray:
        """Return actions in [-1, 1], the range of the environments of `dynajax.envs`.

        Args:
          obs: (..., D).

        Returns:
          (..., A) float32.

        Raises:
          UsageError: the last axis of `obs` is not D.
        """
        obs = np.asarray(obs, np.float32)
        if obs.shape[-1:] != (self.spec.obs_dim,):
            raise UsageError(
                f"the policy of {self.spec.name} takes observations (..., {self.spec.obs_dim}), but "
                f"got {obs.shape}"
            )
        with backend.required_settings():
            return np.array(self._deterministic_action(self.state, obs))

    def __call__(self, obs: Any) -> np.ndarray:
        """Return actions within the task's bounds, which `env.step` takes.

        Args:
          obs: (..., D), or as the task returns them: an array of the task's own shape, a number, or
            a dict or tuple of them, with any leading axes. They are flattened as in training.

        Returns:
          (..., A) float32, or (..., *shape) where the task's actions have another shape.

        Raises:
          UsageError: they are not observations of the task.
        """
        flat = self._flatten(obs)
        action = rescale(self.normalized_action(flat), self.low, self.high)
        action = np.clip(action.astype(np.float32), *self.float32_bounds)
        shape = self.spec.action_shape
        return action if shape is None else action.reshape((*flat.shape[:-1], *shape))

    def layers(self) -> list[Layer]:
        """Return `normalized_action` as a sequence of layers with numpy arrays.

        Raises:
          UsageError: the agent does not implement `layers`.
        """
        with backend.required_settings():
            return [
                Layer(kind, tuple(np.asarray(x, np.float32) for x in arrays))
                for kind, arrays in self.agent.layers(self.state)
            ]


def load_policy(folder: str | Path, learner: int = 0, which: Which = "best") -> Policy:
    """Load a policy of a run. The packages of its task need not be installed.

    Args:
      folder: run directory.
      learner: its index; learners are ordered by variant, then by seed.
      which: "best" for the policy at the learner's best evaluation, or "last".

    Raises:
      UsageError: the policy is missing or cannot be read; the message has one line.
    """
    selected = selection.select_learner(folder, learner)
    policies_folder = selected.folder / "policies"
    stored = policies.read(policies_folder, selected.learner_index, which)
    # The module of the task may register the agent. It may also be missing on this machine.
    if not stored.spec.name.startswith("brax:"):
        with contextlib.suppress(UsageError):
            registry.import_module("--env", stored.spec.name)
    with backend.required_settings(), reading_config(selected.folder):
        agent = make_agent(agent_from_dict(selected.config, selected.variant), stored.spec)
        repeat = selected.config["task"]["repeat"]
        evaluate_on = selected.config["host"].get("evaluate_on", Policy.evaluate_on)

    def init(key: Array) -> Any:
        return agent.policy(agent.init(key))

    with backend.required_settings():
        shapes = selection.init_shapes(init)
        state = jax.device_put(selection.unflatten(shapes, stored.leaves, policies_folder))
    return Policy(
        spec=stored.spec,
        repeat=repeat,
        variant=selected.variant,
        seed=selected.seed,
        step=stored.step,
        score=stored.score,
        agent=agent,
        state=state,
        evaluate_on=evaluate_on,
    )
