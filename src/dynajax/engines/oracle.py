"""Oracles: half of a synthetic transition is the simulator's word, to tell which half does harm.

For every rollout start, which is a state of the real replay, the simulator is set to that physics
state and takes the policy's action. `reward` keeps the model's next state and takes the
simulator's reward; `state` takes the simulator's next state and keeps the model's reward; `both`
takes both, so that nothing of the model is left. Rollouts have one step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynajax import envs
from dynajax.config import Config
from dynajax.mbpo import ModelTransitions
from dynajax.types import Transition, UsageError


class Oracle:
    """The simulators beside a run, and the physics state of every real transition.

    Args:
      config: a run's configuration, with an oracle.
      row_seeds: S seeds, those of the training environments.

    Raises:
      UsageError: the task's simulator cannot be set to a state.
    """

    def __init__(self, config: Config, row_seeds: Sequence[int]):
        self._which = config.oracle
        self._envs: list[Any] = [
            envs.make(config.env, **config.stepping, seed=seed) for seed in row_seeds
        ]
        if (reason := self._envs[0].unrestorable) is not None:
            raise UsageError(
                f"--oracle={config.oracle}: {config.env} cannot be set to a stored state: {reason}, "
                "or leave --oracle out"
            )
        for env in self._envs:
            env.reset(seed=0)
        self._capacity = min(config.replay.real, config.steps)
        self._states = np.zeros((len(self._envs), 0, 0))
        self._count = 0

    def record(self, states: np.ndarray) -> None:
        """Keeps the states (S, L) that all rows' next transitions begin in."""
        if not self._states.size:
            self._states = np.zeros((len(states), self._capacity, states.shape[1]))
        self._states[:, self._count % self._capacity] = states
        self._count += 1

    def correct(self, proposal: ModelTransitions) -> ModelTransitions:
        """Puts the simulator's word into synthetic transitions, leaves (S, B, ...).

        Where the simulator gives no finite number, or the model alone does not, a transition is not
        stored.
        """
        slots = np.asarray(proposal.slots)
        changed = Transition(*(np.array(x) for x in proposal.transition))
        good = np.array(proposal.store)
        for row, env in enumerate(self._envs):
            for i, slot in enumerate(slots[row]):
                env.restore(self._states[row, slot], steps=0)
                new, reward, terminated, _, _ = env.step(changed.action[row, i])
                if not (np.isfinite(new).all() and np.isfinite(reward)):
                    good[row, i] = False
                    continue
                if self._which != "state":
                    changed.reward[row, i] = reward
                if self._which != "reward":
                    changed.next_obs[row, i] = new
                    changed.discount[row, i] = 1.0 - terminated
                    # The model may have left the numbers where the simulator has not.
                    good[row, i] |= self._which == "both"
        return ModelTransitions(slots, changed, good)

    def progress(self) -> dict[str, np.ndarray]:
        """All that it takes to go on from here."""
        filled = min(self._count, self._capacity)
        return {
            "oracle.states": self._states[:, :filled].copy(),
            "oracle.count": np.array([self._count]),
        }

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Goes back to an earlier `progress`."""
        states = progress["oracle.states"]
        self._count = int(progress["oracle.count"][0])
        self._states = np.zeros((len(states), self._capacity, states.shape[2]))
        self._states[:, : states.shape[1]] = states

    def close(self) -> None:
        """Ends the simulators."""
        for env in self._envs:
            env.close()
