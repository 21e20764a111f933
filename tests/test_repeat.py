"""Action repeat on both engines, tested with a task that counts its frames."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from dynajax import envs
from dynajax.envs import mjx
from dynajax.envs.mjx import EnvState, Task
from dynajax.envs.terminations import never
from dynajax.envs.training_envs import TrainingEnvs
from dynajax.envs.vector import VectorEnv
from dynajax.settings import make
from dynajax.types import EnvSpec, UsageError


class FrameCounter(gymnasium.Env):
    """Observation: the index of the frame. Reward: the index times the action."""

    action_space = spaces.Box(-1.0, 1.0, (1,))
    observation_space = spaces.Box(-np.inf, np.inf, (1,))

    def __init__(self, ends=None, nan_at=None):
        self.ends, self.nan_at = ends, nan_at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.frame = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.frame += 1
        obs = np.float32([np.nan if self.frame == self.nan_at else self.frame])
        return obs, self.frame * float(action[0]), self.frame == self.ends, False, {}

    def snapshot(self):
        return np.array([self.frame])

    def restore(self, values):
        self.frame = int(values[0])


def device_frame_counter(limit, ends=None, nan_at=None):
    """Return the same task for the device."""
    spec = EnvSpec("Frames", 1, 1, limit, ("obs",), never)

    def reset(key):
        return EnvState(jnp.zeros(1), jnp.int32(0))

    def step(state, action):
        frame = state.physics + 1
        obs = jnp.where(frame == (nan_at or -1), jnp.nan, frame).astype(jnp.float32)[None]
        return EnvState(obs, frame), frame * action[0], frame == (ends or -1)

    return Task(spec, reset, step)


#: (frames per agent step, frame that terminates, frame that is not finite): expected
#: (observation, reward, terminated) of each agent step.
CASES = {
    (3, None, None): [(3, 6, False), (6, 15, False), (7, 7, False)],
    (3, 5, None): [(3, 6, False), (5, 9, True)],
    (3, None, 2): [(np.nan, np.nan, False)],
    (3, None, 5): [(3, 6, False), (np.nan, np.nan, False)],
    (2, 4, None): [(2, 3, False), (4, 7, True)],
    (10, None, None): [(7, 28, False)],
    (1, 2, None): [(1, 1, False), (2, 2, True)],
}
LIMIT = 7


@pytest.fixture
def task():
    """Provide task(**kwargs), which registers a FrameCounter and returns its name."""
    names = []

    def register(**kwargs):
        name = f"Frames{len(names)}-v0"
        names.append(name)
        gymnasium.register(name, FrameCounter, kwargs=kwargs, max_episode_steps=LIMIT)
        return name

    yield register
    for name in names:
        del gymnasium.registry[name]


@pytest.mark.parametrize(("case", "agent_steps"), CASES.items())
def test_action_repeat_on_host(task, case, agent_steps):
    repeat, ends, nan_at = case
    env = envs.make(task(ends=ends, nan_at=nan_at), repeat=repeat)
    env.reset(seed=0)
    for i, (obs, reward, terminated) in enumerate(agent_steps):
        result = env.step(np.ones(1, np.float32))
        np.testing.assert_array_equal(result[0], [obs])
        np.testing.assert_array_equal(result[1], reward)
        assert result[2] == terminated
        assert result[3] == (obs == LIMIT), i


@pytest.mark.parametrize(("case", "agent_steps"), CASES.items())
def test_action_repeat_on_device(monkeypatch, case, agent_steps):
    repeat, ends, nan_at = case
    monkeypatch.setitem(mjx.TASKS, "Frames", lambda: device_frame_counter(LIMIT, ends, nan_at))
    task = mjx.make("Frames", repeat=repeat)
    state = task.reset(jax.random.key(0))
    for obs, reward, terminated in agent_steps:
        state, actual_reward, done = task.step(state, jnp.ones(1))
        np.testing.assert_array_equal(state.obs, [obs])
        np.testing.assert_array_equal(actual_reward, np.float32(reward))
        assert bool(done) == terminated and actual_reward.dtype == jnp.float32


def test_time_limits_count_agent_steps(task, monkeypatch):
    monkeypatch.setitem(mjx.TASKS, "Frames", lambda: device_frame_counter(LIMIT))
    limits = {1: 7, 2: 4, 3: 3, 7: 1, 8: 1}
    name = task()
    assert {n: envs.spec(name, repeat=n).time_limit for n in limits} == limits
    assert {n: mjx.make("Frames", repeat=n).spec.time_limit for n in limits} == limits
    assert envs.spec("lqr-lqr_2_1", time_limit=9, repeat=2).time_limit == 5
    env = envs.make(name, repeat=2)
    env.reset(seed=0)
    assert [env.step(np.zeros(1))[3] for _ in range(4)] == [False] * 3 + [True]


@pytest.mark.parametrize("name", ["cheetah-run", "Hopper-v5"])
def test_restore_with_action_repeat(name):
    env, other = envs.make(name, repeat=4), envs.make(name, repeat=4)
    plain = envs.make(name)
    action = np.full(env.action_space.shape, 0.3, np.float32)
    for e in (env, plain):
        e.reset(seed=0)
    other.reset(seed=1)
    state = env.snapshot()
    obs, reward, *_ = env.step(action)
    frames = [plain.step(action) for _ in range(4)]
    np.testing.assert_array_equal(obs, frames[-1][0])
    assert reward == sum(frame[1] for frame in frames)
    other.restore(state)
    repeated = other.step(action)
    np.testing.assert_array_equal(repeated[0], obs)
    assert repeated[1] == reward and env.unrestorable is None
    other.restore(state, steps=env.time_limit - 1)
    assert other.step(action)[3]


def test_repeat_of_one_adds_no_wrapper_and_zero_raises(task):
    name = task()
    assert isinstance(envs.make(name, repeat=1), envs.gym.GymnasiumEnv)
    task_of_suite = mjx.TASKS["pendulum-swingup"]
    assert task_of_suite().step is not None
    for call in (envs.make, mjx.make):
        with pytest.raises(UsageError, match=r"^--set task.repeat=0: "):
            call("pendulum-swingup", repeat=0)


def test_training_envs_with_action_repeat_drop_non_finite_steps(task):
    name = task(nan_at=5)
    config = make(name, algo="model-free", settings={"task.repeat": 3})
    host = TrainingEnvs(config, envs.spec(name, **config.stepping), [0, 1])
    host.start()
    transition, valid = host.step(np.ones((2, 1)))
    np.testing.assert_array_equal(transition.reward, [6, 6])
    np.testing.assert_array_equal(transition.next_obs, [[3], [3]])
    assert valid.all() and host.snapshot().shape == (2, 2)
    _, valid = host.step(np.ones((2, 1)))
    assert not valid.any() and list(host.dropped) == [1, 1]
    # The return of an episode that was cut is not known.
    assert host.pop_finished() == []
    host.close()


def test_action_repeat_in_workers():
    vector_envs = [VectorEnv("pendulum-swingup", 1, workers=w, repeat=4) for w in (0, 1)]
    results = []
    for vector_env in vector_envs:
        vector_env.reset([0], [3])
        results.append(vector_env.step([0], np.ones((1, 1))))
        vector_env.close()
    for local, worker in zip(*results, strict=True):
        np.testing.assert_array_equal(worker, local)
