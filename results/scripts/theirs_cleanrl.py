"""Train CleanRL's SAC on a dm_control task in its own environment; started by beside_cleanrl.py."""

import runpy
import sys

import gym
import numpy as np
import torch

from simulator import Simulator

NAME, STEPS, RANDOM, UPDATES, WIDTH, BATCH, CAPACITY, SEED = sys.argv[1], *map(int, sys.argv[2:])


class Task(gym.Env):
    """A dm_control task with one observation vector."""

    def __init__(self) -> None:
        self._task = Simulator(NAME, SEED)
        size = (self._task.observations,)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, size, np.float32)
        self.action_space = gym.spaces.Box(self._task.low, self._task.high)

    def seed(self, seed=None):
        return [seed]

    def reset(self, **options):
        return self._task.reset()

    def step(self, action):
        return *self._task.step(action), {}


def main() -> None:
    torch.set_num_threads(1)
    gym.register("task-v0", entry_point=Task)
    values = {
        "env-id": "task-v0",
        "total-timesteps": STEPS,
        "learning-starts": RANDOM,
        "buffer-size": CAPACITY,
        "batch-size": BATCH,
        "q-lr": 3e-4,
        "policy-lr": 3e-4,
        # An update of the actor in each step, as in the other packages.
        "policy-frequency": 1,
        "seed": SEED,
    }
    sys.argv = ["sac", *(f"--{name}={value}" for name, value in values.items())]
    runpy.run_module("cleanrl.sac_continuous_action", run_name="__main__")


if __name__ == "__main__":
    main()
