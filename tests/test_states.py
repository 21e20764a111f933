"""Simulators set to a stored state: the same step again, bit for bit."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from dynajax import envs
from dynajax.envs import states

#: One task of each kind: sensors, contacts, targets drawn into the model, Gymnasium's stale
#: positions, Runge-Kutta, classic control.
TASKS = [
    "cheetah-run",
    "hopper-hop",
    "humanoid-stand",
    "quadruped-run",
    "finger-turn_hard",
    "reacher-easy",
    "point_mass-hard",
    "acrobot-swingup",
    "Hopper-v4",
    "Humanoid-v4",
    "Ant-v4",
    "Pendulum-v1",
    "MountainCarContinuous-v0",
]


class Counter(gymnasium.Env):
    """Adds up its actions; its state is its own to give away."""

    action_space = spaces.Box(-1.0, 1.0, (1,))
    observation_space = spaces.Box(-np.inf, np.inf, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.total = self.np_random.random()
        return np.array([self.total]), {}

    def step(self, action):
        self.total += float(action[0])
        return np.array([self.total]), self.total, False, False, {}


class Settable(Counter):
    def snapshot(self):
        return np.array([self.total])

    def restore(self, values):
        self.total = float(values[0])


gymnasium.register("Counter-v0", Counter, max_episode_steps=20)
gymnasium.register("Settable-v0", Settable, max_episode_steps=20)


def bits(obs):
    return np.asarray(obs, np.float32).view(np.uint32)


@pytest.mark.parametrize("name", [*TASKS, "Settable-v0"])
def test_a_stored_transition_follows_its_state_again(name):
    env, other = envs.make(name), envs.make(name)
    rng = np.random.default_rng(0)
    stored = []
    for episode in (5, 6):
        env.reset(seed=episode)
        for _ in range(15):
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            state = env.snapshot()
            assert state.dtype == np.float64 and state.ndim == 1
            after = env.step(action)
            stored.append((state, action, after))
            if after[2]:
                break
    # In any order, in another simulator, which is in an episode of its own.
    other.reset(seed=99)
    for i in rng.permutation(len(stored)):
        state, action, (obs, reward, terminated, truncated, _) = stored[i]
        other.restore(state)
        np.testing.assert_array_equal(bits(other.snapshot()), bits(state))
        again = other.step(action)
        np.testing.assert_array_equal(bits(again[0]), bits(obs))
        assert again[1:4] == (reward, terminated, truncated)


@pytest.mark.parametrize("name", ["cheetah-run", "Hopper-v4"])
def test_a_restored_episode_keeps_or_forgets_its_age(name):
    env = envs.make(name)
    env.reset(seed=0)
    quiet = np.zeros(env.action_space.shape, np.float32)
    state = env.snapshot()
    state[-2 if name == "cheetah-run" else -1 :] = env.time_limit - 1
    env.restore(state)
    assert env.step(quiet)[3]
    env.restore(state, steps=0)
    assert not env.step(quiet)[3] and not env.step(quiet)[3]


def test_a_task_that_cannot_be_set_says_so():
    assert not envs.make("Counter-v0").can_restore
    assert envs.make("Settable-v0").can_restore
    assert states.setter(gymnasium.make("Pendulum-v1")) is not None
