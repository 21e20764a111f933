"""Restored simulator states: repeated steps are bitwise equal."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces, wrappers
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

from dynajax import envs
from dynajax.envs import states
from dynajax.types import Transition

#: Tasks of each kind: with sensors, contacts, targets in the model, Gymnasium's stale positions,
#: Runge-Kutta, classic control.
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
    """Add up the actions; there is no access to the state."""

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


class Goal(Settable):
    """Sample a goal at each reset, which `restore` does not restore."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed, options=options)
        self.goal = self.np_random.random()
        return result

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, -abs(self.total - self.goal), *rest


class SettableGoal(Goal):
    def snapshot(self):
        return np.array([self.total, self.goal])

    def restore(self, values):
        self.total, self.goal = map(float, values)


class RandomizedModel(HopperEnv):
    """Randomize a model parameter at each reset, as AdroitHandDoor does."""

    def reset_model(self):
        self.model.body_pos[1, 2] = 1.25 + self.np_random.uniform(0, 0.1)
        return super().reset_model()


class Sums(gymnasium.Wrapper):
    """Add up the rewards; `snapshot` contains the sum and the state of the wrapped task."""

    def reset(self, *, seed=None, options=None):
        self.sum = 0.0
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        self.sum += reward
        return obs, self.sum, *rest

    def snapshot(self):
        return np.append(self.env.unwrapped.snapshot(), self.sum)

    def restore(self, values):
        self.env.unwrapped.restore(values[:-1])
        self.sum = float(values[-1])


class SumsUnrestorable(Sums):
    snapshot = restore = None


gymnasium.register("Counter-v0", Counter, max_episode_steps=20)
gymnasium.register("Settable-v0", Settable, max_episode_steps=20)

for _name, _entry in {
    "Goal": Goal,
    "SettableGoal": SettableGoal,
    "RandomizedModel": RandomizedModel,
    "Sums": lambda: Sums(Settable()),
    "SumsUnrestorable": lambda: SumsUnrestorable(Settable()),
    "Stacked": lambda: wrappers.FrameStackObservation(Settable(), 2),
    "Delayed": lambda: wrappers.DelayObservation(Settable(), 2),
    "Normalized": lambda: wrappers.NormalizeObservation(Settable()),
    "Scored": lambda: wrappers.NormalizeReward(Settable()),
    "Sticky": lambda: wrappers.StickyAction(Settable(), 0.25),
    "Timed": lambda: wrappers.TimeAwareObservation(wrappers.TimeLimit(Settable(), 20)),
    "Clipped": lambda: wrappers.ClipReward(Settable(), -1, 1),
}.items():
    gymnasium.register(f"{_name}-v0", _entry, max_episode_steps=20)


def float_bits(obs):
    return np.asarray(obs, np.float32).view(np.uint32)


@pytest.mark.parametrize("name", [*TASKS, "Settable-v0", "RandomizedModel-v0", "Sums-v0"])
def test_step_from_restored_state_is_bitwise_equal(name):
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
    # Restore in random order, in another simulator that is in a different episode.
    other.reset(seed=99)
    for i in rng.permutation(len(stored)):
        state, action, (obs, reward, terminated, truncated, _) = stored[i]
        other.restore(state)
        np.testing.assert_array_equal(float_bits(other.snapshot()), float_bits(state))
        repeated = other.step(action)
        np.testing.assert_array_equal(float_bits(repeated[0]), float_bits(obs))
        assert repeated[1:4] == (reward, terminated, truncated)


@pytest.mark.parametrize("name", ["cheetah-run", "Hopper-v4"])
def test_restore_sets_the_age_of_the_episode(name):
    env = envs.make(name)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, np.float32)
    state = env.snapshot()
    state[-2 if name == "cheetah-run" else -1 :] = env.time_limit - 1
    env.restore(state)
    assert env.step(action)[3]
    env.restore(state, steps=0)
    assert not env.step(action)[3] and not env.step(action)[3]


def test_task_with_methods_to_restore_it_is_found():
    assert "it has no methods" in envs.make("Counter-v0").unrestorable
    assert envs.make("Settable-v0").unrestorable is None
    assert states.find_restorer(gymnasium.make("Pendulum-v1")) is not None


@pytest.mark.parametrize(
    "name",
    ["Goal", "SumsUnrestorable", "Stacked", "Delayed", "Normalized", "Scored", "Sticky", "Timed"],
)
def test_hidden_state_is_detected_and_named(name):
    env = envs.make(f"{name}-v0")
    assert "has a different result than before" in env.unrestorable and "\n" not in env.unrestorable
    wrapper = {"Stacked": "FrameStackObservation", "Normalized": "NormalizeObservation"}
    assert wrapper.get(name, "") in env.unrestorable
    assert "TimeLimit" not in env.unrestorable


@pytest.mark.parametrize("name", ["SettableGoal", "Sums", "Clipped", "RandomizedModel", "Settable"])
def test_snapshot_of_task_or_wrapper_is_used(name):
    assert envs.make(f"{name}-v0").unrestorable is None


@pytest.mark.parametrize("name", ["Hopper-v5", "Reacher-v5", "Pusher-v5", "Pendulum-v1"])
def test_gymnasium_tasks_are_restorable(name):
    assert envs.make(name).unrestorable is None


def record_step(name, seed, steps=3):
    """Return an environment after some steps, and the snapshot and transition of the last one."""
    env = envs.make(name)
    obs, _ = env.reset(seed=seed)
    action = np.full(env.action_space.shape, 0.3, np.float32)
    for _ in range(steps):
        before, snapshot = obs, env.snapshot()
        obs, reward, terminated, _, _ = env.step(action)
    transition = Transition(before, action, np.float32(reward), np.float32(1 - terminated), obs)
    return env, snapshot, transition


@pytest.mark.parametrize("name", ["cheetah-run", "Hopper-v5", "SettableGoal-v0"])
def test_verify_detects_a_changed_bit(name):
    _, snapshot, transition = record_step(name, 1)
    env, *_ = record_step(name, 2)
    for steps in (None, 0):
        assert states.verify(env, snapshot, transition.action, transition, steps=steps) is None
    last = len(env.obs_names) - 1
    next_float = np.nextafter(transition.next_obs, np.float32(np.inf))
    changed = np.where(np.arange(last + 1) == last, next_float, transition.next_obs)
    for field, value, text in (
        ("next_obs", changed, f"the observation's {env.obs_names[last]}"),
        ("reward", np.nextafter(transition.reward, np.float32(9)), "the reward"),
        ("discount", 1 - transition.discount, "the discount"),
    ):
        wrong = transition._replace(**{field: value})
        difference = states.verify(env, snapshot, transition.action, wrong)
        assert text in difference and f"1 of {last + 3} differ" in difference
        assert "\n" not in difference


def test_verify_detects_another_goal_by_the_reward():
    _, snapshot, transition = record_step("Goal-v0", 1)
    env, *_ = record_step("Goal-v0", 2)
    assert "the reward is" in states.verify(env, snapshot, transition.action, transition)


def test_verify_detects_a_snapshot_of_wrong_length():
    env, snapshot, transition = record_step("Hopper-v5", 1)
    difference = states.verify(env, snapshot[3:], transition.action, transition)
    assert "cannot be restored" in difference and "\n" not in difference
