"""A dm_control task for other packages' environments; used by theirs_sbx.py and theirs_cleanrl.py."""

import numpy as np
from dm_control import suite


class Simulator:
    """A dm_control task with one observation vector, for any version of Gym."""

    def __init__(self, name: str, seed: int) -> None:
        self._env = suite.load(*name.split("-"), task_kwargs={"random": seed})
        actions = self._env.action_spec()
        self.low, self.high = (
            bound.astype(np.float32) for bound in (actions.minimum, actions.maximum)
        )
        self.observations = len(self.reset())

    def _observation(self, step) -> np.ndarray:
        return np.concatenate([np.ravel(x) for x in step.observation.values()]).astype(np.float32)

    def reset(self) -> np.ndarray:
        """Return the first observation of an episode."""
        return self._observation(self._env.reset())

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Return the observation, the reward, and whether the episode has ended."""
        step = self._env.step(action)
        return self._observation(step), float(step.reward), step.last()
