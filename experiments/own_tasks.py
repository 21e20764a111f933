"""Tasks of one's own: register them with Gymnasium, and say when their episodes end.

  python experiments/run.py --env=own_tasks:PendulumMilli-v0 --fix=scale,target

These are well-known tasks in other units. The physics and the optimal policy are the same; only the
ratio between the scales of the state's and the reward's targets is not. They show the mismatch of
Barkley and Fridovich-Keil (2025) on tasks that two CPU cores can learn.
"""

import gymnasium

import dynajax
from dynajax import envs
from dynajax.envs.terminations import never


class OtherUnits(gymnasium.Wrapper):
    """A task with observations and reward multiplied by constants."""

    def __init__(self, name: str, observation: float, reward: float) -> None:
        super().__init__(envs.make(name))
        self._observation, self._reward = observation, reward

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return obs * self._observation, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs * self._observation, float(reward) * self._reward, terminated, truncated, info


def _register(name: str, task: str, steps: int, observation: float, reward: float) -> None:
    gymnasium.register(
        name,
        lambda **_: OtherUnits(task, observation, reward),
        max_episode_steps=steps,
    )
    dynajax.register_termination(name, never)


_register("PendulumMilli-v0", "Pendulum-v1", 200, 1.0, 1e-3)
_register("CartpoleMilli-v0", "cartpole-swingup", 1000, 1.0, 1e-3)
