"""Register user-defined tasks with Gymnasium, and define when their episodes end.

  PYTHONPATH=results/scripts python experiments/run.py --env=own_tasks:PendulumMilli-v0 --fix=scale,target

`PendulumMilli-v0` and `CartpoleMilli-v0` are well-known tasks in other units. The physics and the
optimal policy are the same, but the ratio between the scales of the state's and the reward's targets
differs. They show the scale mismatch of Barkley and Fridovich-Keil (2025) on tasks that two CPU cores
can learn. `Cart-v0` has sensors in mixed units: one in metres, one in encoder ticks.
"""

import gymnasium
import numpy as np

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


class Cart(gymnasium.Env):
    """A motor has to pull a cart to the middle of a rail.

    The observation is the position in metres and the speed in encoder ticks per second (some
    thousands). The reward of a step of 0.05 s is 1 in the middle and 1/2 at a distance of 0.1 m.
    """

    TICKS = 4096  # per metre
    STEP, PULL, FRICTION, RAIL = 0.05, 4.0, 1.0, 2.0  # s, m/s^2, 1/s, m

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def _observe(self):
        return np.array([self._position, self._speed * self.TICKS], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._position = self.np_random.choice([-1.0, 1.0]) * self.np_random.uniform(0.5, 1.5)
        self._speed = 0.0
        return self._observe(), {}

    def step(self, action):
        pull = self.PULL * float(action[0]) - self.FRICTION * self._speed
        self._speed += self.STEP * pull
        self._position += self.STEP * self._speed
        if abs(self._position) > self.RAIL:
            self._position, self._speed = np.clip(self._position, -self.RAIL, self.RAIL), 0.0
        reward = 1 / (1 + (self._position / 0.1) ** 2)
        return self._observe(), float(reward), False, False, {}


def _register(name: str, task: str, steps: int, observation: float, reward: float) -> None:
    gymnasium.register(
        name,
        lambda **_: OtherUnits(task, observation, reward),
        max_episode_steps=steps,
    )
    dynajax.register_termination(name, never)


_register("PendulumMilli-v0", "Pendulum-v1", 200, 1.0, 1e-3)
_register("CartpoleMilli-v0", "cartpole-swingup", 1000, 1.0, 1e-3)

gymnasium.register("Cart-v0", lambda **_: Cart(), max_episode_steps=200)
dynajax.register_termination("Cart-v0", never)
