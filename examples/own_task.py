"""A task of your own: a Gymnasium environment, and when its episodes terminate.

Run it in the folder of this file, or with that folder on PYTHONPATH:

    dynajax train --env=own_task:Cart-v0 --fix=scale,target --steps=4000
"""

import gymnasium
import numpy as np
from gymnasium import spaces

import dynajax


class Cart(gymnasium.Env):
    """Push a cart to the origin; the episode terminates once it is 2 away."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))  # position, velocity
    action_space = spaces.Box(-1.0, 1.0, (1,))  # must be bounded

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.velocity = self.np_random.uniform(-0.5, 0.5, 2)
        return self._observe(), {}

    def step(self, action):
        self.velocity += 0.1 * float(action[0])
        self.position += 0.1 * self.velocity
        return self._observe(), -abs(self.position), abs(self.position) > 2, False, {}

    def _observe(self):
        return np.array([self.position, self.velocity], np.float32)


gymnasium.register("Cart-v0", Cart, max_episode_steps=200)
# The model's rollouts have to know it too: observation, action and next observation of one step.
dynajax.register_termination("Cart-v0", lambda obs, action, next_obs: abs(next_obs[0]) > 2)
