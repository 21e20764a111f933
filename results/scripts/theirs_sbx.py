"""Train SBX's SAC on a dm_control task in its own environment; started by beside_sbx.py."""

import sys

import gymnasium
import numpy as np
from sbx import SAC

from simulator import Simulator

NAME, STEPS, RANDOM, UPDATES, WIDTH, BATCH, CAPACITY, SEED = sys.argv[1], *map(int, sys.argv[2:])


class Task(gymnasium.Env):
    """A dm_control task with one observation vector."""

    def __init__(self) -> None:
        self._task = Simulator(NAME, SEED)
        size = (self._task.observations,)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, size, np.float32)
        self.action_space = gymnasium.spaces.Box(self._task.low, self._task.high)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._task.reset(), {}

    def step(self, action):
        obs, reward, last = self._task.step(action)
        return obs, reward, False, last, {}


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
