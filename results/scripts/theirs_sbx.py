"""Train SBX's SAC on a dm_control task in its own environment; started by beside_sbx.py."""

import sys

import gymnasium
import numpy as np
from dm_control import suite
from sbx import SAC

NAME, STEPS, RANDOM, UPDATES, WIDTH, BATCH, CAPACITY, SEED = sys.argv[1], *map(int, sys.argv[2:])


class Task(gymnasium.Env):
    """A dm_control task with one observation vector."""

    def __init__(self) -> None:
        self._env = suite.load(*NAME.split("-"), task_kwargs={"random": SEED})
        actions = self._env.action_spec()
        size = len(self._observation(self._env.reset()))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gymnasium.spaces.Box(
            actions.minimum.astype(np.float32), actions.maximum.astype(np.float32)
        )

    def _observation(self, step) -> np.ndarray:
        return np.concatenate([np.ravel(x) for x in step.observation.values()]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observation(self._env.reset()), {}

    def step(self, action):
        step = self._env.step(action)
        return self._observation(step), float(step.reward), False, step.last(), {}


def main() -> None:
    agent = SAC(
        "MlpPolicy",
        Task(),
        learning_rate=3e-4,
        buffer_size=CAPACITY,
        learning_starts=RANDOM,
        batch_size=BATCH,
        tau=0.005,
        gamma=0.99,
        train_freq=1,
        gradient_steps=UPDATES,
        policy_kwargs={"net_arch": [WIDTH, WIDTH], "n_critics": 2},
        seed=SEED,
    )
    agent.learn(STEPS)


if __name__ == "__main__":
    main()
