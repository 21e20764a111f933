"""Host environments: names, shapes, seeds, episodes, workers and error messages."""

import dataclasses
import os
import sys
import warnings

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium import spaces

from dynajax import envs
from dynajax.engines.evaluate import Evaluator
from dynajax.envs.training_envs import TrainingEnvs
from dynajax.envs.vector import VectorEnv, default_workers, episode_seed
from dynajax.settings import make
from dynajax.types import UsageError


class Line(gymnasium.Env):
    """Observation: a number sampled at reset, the time, the last action. Reward: the action."""

    action_space = spaces.Box(-2.0, 6.0, (1,))
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def __init__(self, ends=None, nan_over=np.inf, noise=False, fails=False):
        self.ends, self.nan_over, self.noise, self.fails = ends, nan_over, noise, fails

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.time = self.np_random.random(), 0
        return np.array([self.start, 0.0, 0.0]), {}

    def step(self, action):
        if self.fails:
            raise ValueError("motor failure")
        self.time += 1
        action = float(action[0])
        noise = int.from_bytes(os.urandom(2), "big") / 2**16 if self.noise else 0.0
        reward = np.nan if action > self.nan_over else action
        return (
            np.array([self.start + noise, self.time, action]),
            reward,
            self.time == self.ends,
            False,
            {},
        )


class Parts(Line):
    """A task with a Dict observation, one part of which is a matrix."""

    observation_space = spaces.Dict(
        {"b": spaces.Box(-9, 9, (2, 2)), "a": spaces.Box(-9, 9, (1,)), "c": spaces.Discrete(2)}
    )

    def reset(self, *, seed=None, options=None):
        return {"a": np.ones(1, np.float32), "b": np.arange(4.0).reshape(2, 2), "c": 1}, {}


class DiscreteActions(Line):
    action_space = spaces.Discrete(3)


class Unbounded(Line):
    action_space = spaces.Box(-np.inf, np.inf, (1,))


class Pixels(Line):
    observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)


class Sequences(Line):
    observation_space = spaces.Sequence(spaces.Box(0, 1, (1,)))


class Broken(Line):
    def __init__(self):
        raise RuntimeError("needs\na library")


for _name, _class, _kwargs in (
    ("Line", Line, {}),
    ("LineEnds", Line, {"ends": 3}),
    ("LineNaN", Line, {"nan_over": 5.0}),
    ("LineNoise", Line, {"noise": True}),
    ("LineFails", Line, {"fails": True}),
    *((c.__name__, c, {}) for c in (Parts, DiscreteActions, Unbounded, Pixels, Sequences, Broken)),
):
    gymnasium.register(f"{_name}-v0", _class, kwargs=_kwargs, max_episode_steps=5)
gymnasium.register("LineForever-v0", Line)


def run_config(env, *, algo="model-free", workers=0, episodes=2):
    config = make(env, preset="paper", algo=algo)
    host = dataclasses.replace(config.host, workers=workers)
    evaluation = dataclasses.replace(config.eval, episodes=episodes)
    return dataclasses.replace(config, host=host, eval=evaluation)


def host_envs(env, seeds, **kwargs):
    host = TrainingEnvs(run_config(env, **kwargs), envs.spec(env), seeds)
    host.start()
    return host


def float_bits(array):
    return np.asarray(array, np.float32).view(np.uint32)


def run_episode(env, seed, steps=30, action_seed=0):
    """Return the observations and rewards of random actions, concatenated."""
    rng = np.random.default_rng(action_seed)
    trace = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        obs, reward, *_ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        trace.append(np.append(obs, np.float32(reward)))
    return np.concatenate(trace)


@pytest.mark.parametrize("name", ["cheetah-run", "humanoid-walk", "finger-turn_hard", "hopper-hop"])
def test_dm_control_observation_order(name):
    env = envs.make(name)
    # Import dm_control after dynajax has chosen its rendering backend.
    from dm_control import suite
    from dm_control.rl.control import flatten_observation

    reference = suite.load(*name.split("-"), task_kwargs={"random": 0})
    reference.task.random.seed(3)
    observation = reference.reset().observation
    expected_names = [
        key if np.size(v) == 1 else f"{key}[{i}]"
        for key, v in observation.items()
        for i in range(np.size(v))
    ]
    obs, _ = env.reset(seed=3)
    assert env.obs_names == tuple(expected_names)
    assert obs.dtype == np.float32 and obs.shape == (len(expected_names),)
    rng = np.random.default_rng(0)
    low, high = reference.action_spec().minimum, reference.action_spec().maximum
    for _ in range(5):
        flat = flatten_observation(observation)["observations"]
        np.testing.assert_array_equal(obs, flat.astype(np.float32))
        action = rng.uniform(-1, 1, low.shape).astype(np.float32)
        timestep = reference.step(low + (action.astype(np.float64) + 1) / 2 * (high - low))
        observation = timestep.observation
        obs, reward, *_ = env.step(action)
        assert reward == pytest.approx(timestep.reward, abs=1e-9)
        flat = flatten_observation(observation)["observations"]
        np.testing.assert_allclose(obs, flat, atol=1e-5)
        obs = flat.astype(np.float32)
    env.close()


def test_actions_are_rescaled_to_task_bounds():
    env = envs.make("Line-v0")
    env.reset(seed=0)
    rewards = [env.step(np.float32([a]))[1] for a in (-1, 0, 0.5, 1)]
    assert rewards == [-2, 2, 4, 6]
    from dynajax.actions import rescale

    low, high = np.array([-1.0, -1.0, -1.0]), np.array([1.0, 1.1, 1.0])
    np.testing.assert_allclose(rescale([1, 1, -1], low, high), [1, 1.1, -1])
    tiny = np.float32([1e-30, 0, 0.3])
    np.testing.assert_array_equal(rescale(tiny, low, -low), tiny.astype(np.float64))
    assert rescale(np.float32([2, 2, 2]), low, high).max() <= 1.1


def test_dict_observations_are_flattened_and_named():
    env = envs.make("Parts-v0")
    assert env.obs_names == ("a", "b[0]", "b[1]", "b[2]", "b[3]", "c[0]", "c[1]")
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs, np.float32([1, 0, 1, 2, 3, 0, 1]))
    assert obs.dtype == np.float32
    assert envs.spec("Line-v0").obs_names == ("obs[0]", "obs[1]", "obs[2]")


@pytest.mark.parametrize(
    "name", ["cheetah-run", "reacher-hard", "quadruped-walk", "lqr-lqr_2_1", "Ant-v5"]
)
def test_episode_depends_only_on_seed(name):
    a, b = envs.make(name), envs.make(name)
    expected = run_episode(a, 5)
    run_episode(b, 8, action_seed=1)
    np.testing.assert_array_equal(float_bits(run_episode(b, 5)), float_bits(expected))
    assert (run_episode(b, 6) != expected).any()
    assert np.isfinite(expected).all()


def test_values_sampled_at_load_depend_on_seed():
    def stiffness(seed):
        return envs.make("lqr-lqr_6_2", seed=seed)._env.physics.model.jnt_stiffness.copy()

    np.testing.assert_array_equal(stiffness(1), stiffness(1))
    assert (stiffness(1) != stiffness(2)).any()


def test_lqr_terminates_at_discount_0_and_is_truncated_at_time_limit():
    env = envs.make("lqr-lqr_2_1", time_limit=4)
    assert env.time_limit == 4
    env.reset(seed=0)
    flags = [env.step(np.zeros(1))[2:4] for _ in range(4)]
    assert flags == [(False, False)] * 3 + [(False, True)]
    env.reset(seed=0)
    with env._env.physics.reset_context():
        env._env.physics.data.qpos[:] = 0
    assert env.step(np.zeros(1))[2:4] == (True, False)


def test_dm_control_is_truncated_at_time_limit_and_never_terminated():
    env = envs.make("pendulum-swingup")
    env.reset(seed=0)
    flags = [env.step(np.zeros(1))[2:4] for _ in range(1000)]
    assert flags == [(False, False)] * 999 + [(False, True)]


def test_time_limits():
    assert envs.spec("LineForever-v0", time_limit=7).time_limit == 7
    assert envs.spec("Line-v0", time_limit=7).time_limit == 5
    assert envs.spec("Hopper-v5").time_limit == 1000
    env = envs.make("LineForever-v0", time_limit=2)
    env.reset(seed=0)
    assert [env.step(np.zeros(1))[3] for _ in range(2)] == [False, True]


def test_invalid_physics_becomes_nan(capfd):
    env = envs.make("cheetah-run")
    env.reset(seed=0)
    env._env.physics.data.qvel[:] = 1e11
    obs, reward, terminated, truncated, _ = env.step(np.zeros(6))
    assert np.isnan(obs).all() and np.isnan(reward) and truncated and not terminated
    assert np.isfinite(env.reset(seed=0)[0]).all()
    assert capfd.readouterr() == ("", "")


def test_dm_control_renders_an_image():
    env = envs.make("cheetah-run", render=True)
    env.reset(seed=0)
    try:
        image = env.render()
    except (ImportError, OSError, RuntimeError, mujoco.FatalError) as error:
        pytest.skip(f"no OpenGL here: {error}")
    assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 1


def test_old_task_versions_load_without_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs.make("Hopper-v4").close()


def test_name_that_is_not_a_string_is_refused_in_one_line():
    with pytest.raises(
        UsageError, match=r"^--env=3: it must be a name, or module:NAME, as a string$"
    ):
        envs.check_name(3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cheeta-run", "nearest is cheetah-run"),
        ("Cheetah-run", "nearest is cheetah-run"),
        ("Hoper-v5", "nearest is Hopper-v5"),
        ("HalfCheetah-v99", "nearest is HalfCheetah-v"),
        ("nowhere_at_all:X-v0", "'nowhere_at_all' cannot be found"),
        ("json:Lin-v0", "'json' registers no such task; it registers none"),
        ("DiscreteActions-v0", "Discrete(3)"),
        ("Unbounded-v0", "infinite bounds"),
        ("Pixels-v0", "an image (8, 8, 3)"),
        ("Sequences-v0", "no fixed length"),
        ("Broken-v0", "needs a library"),
    ],
)
def test_unsupported_tasks_raise_one_line_naming_the_flag(name, text):
    with pytest.raises(UsageError) as error:
        envs.make(name)
    message = str(error.value)
    assert message.startswith(f"--env={name}: ") and text in message and "\n" not in message


def test_episode_seeds_differ_by_seed_stream_and_episode():
    base = episode_seed(0, "train", 0)
    assert base == episode_seed(0, "train", 0)
    arguments = {
        (s, t, e) for s in (0, 1, 2**31 - 1) for t in ("train", "evaluate") for e in range(50)
    }
    seeds = {episode_seed(*a) for a in arguments}
    assert len(seeds) == len(arguments) and base in seeds
    assert all(0 <= s < 2**31 for s in seeds)


def test_default_workers(monkeypatch):
    assert default_workers(run_config("Line-v0", workers=3), 1) == 3
    config = run_config("Line-v0", workers=-1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(2)))
    assert default_workers(config, 64) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    assert [default_workers(config, n) for n in (1, 4, 8, 16, 64)] == [0, 0, 2, 4, 8]
    assert default_workers(config) == 0


def test_results_do_not_depend_on_workers():
    vector_envs = [VectorEnv("hopper-hop", 3, workers=w, seeds=[0, 1, 2]) for w in (0, 2)]
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (40, 3, 4)).astype(np.float32)
    traces = []
    for vector_env in vector_envs:
        trace = [float_bits(vector_env.reset([2, 0, 1], [7, 8, 9]))]
        for t in range(40):
            order = [[0, 1, 2], [2, 1], [1]][t % 3]
            obs, reward, terminated, truncated, _ = vector_env.step(order, actions[t, : len(order)])
            assert obs.dtype == reward.dtype == np.float32 and terminated.dtype == bool
            assert obs.shape == (len(order), 15) and truncated.shape == (len(order),)
            trace += [float_bits(obs).ravel(), float_bits(reward)]
        traces.append(np.concatenate([x.ravel() for x in trace]))
        vector_env.close()
        vector_env.close()
    np.testing.assert_array_equal(*traces)


def test_exception_in_worker_is_raised_in_parent():
    assert any(os.path.samefile(p or ".", os.path.dirname(__file__)) for p in sys.path)
    name = f"{__name__}:LineFails-v0"
    for workers, kind in ((0, ValueError), (1, RuntimeError)):
        vector_env = VectorEnv(name, 1, workers=workers)
        vector_env.reset([0], [0])
        with pytest.raises(kind, match="motor failure"):
            vector_env.step([0], np.zeros((1, 1)))
        vector_env.close()
    with pytest.raises(UsageError, match="Discrete"):
        VectorEnv(f"{__name__}:DiscreteActions-v0", 1, workers=1)


def test_dead_worker_raises():
    vector_env = VectorEnv(f"{__name__}:Line-v0", 1, workers=1)
    vector_env._workers[0]._process.kill()
    with pytest.raises((RuntimeError, BrokenPipeError), match="has died"):
        vector_env.reset([0], [0])
    vector_env.close()


def test_time_limit_has_discount_1_and_true_last_observation():
    host = host_envs("Line-v0", [0, 1])
    first = host.obs.copy()
    for t in range(1, 6):
        before = host.obs
        transition, valid = host.step(np.zeros((2, 1), np.float32))
        assert valid.all() and (transition.discount == 1).all()
        np.testing.assert_array_equal(transition.obs, before)
        np.testing.assert_array_equal(
            transition.next_obs, np.stack([first[:, 0], [t] * 2, [2] * 2], 1)
        )
        assert all(x.dtype == np.float32 for x in transition)
    assert host.pop_finished() == [(0, 10.0, 5), (1, 10.0, 5)]
    assert host.pop_finished() == []
    second = [envs.make("Line-v0").reset(seed=episode_seed(seed, "train", 1))[0] for seed in (0, 1)]
    np.testing.assert_array_equal(host.obs, second)
    assert (host.obs[:, 0] != first[:, 0]).all()


def test_termination_has_discount_0():
    host = host_envs("LineEnds-v0", [0])
    discounts = [host.step(np.zeros((1, 1)))[0].discount.item() for _ in range(6)]
    assert discounts == [1, 1, 0, 1, 1, 0]
    assert [length for _, _, length in host.pop_finished()] == [3, 3]


def test_mbpo_requires_a_termination_function():
    host = host_envs("LineEnds-v0", [0], algo="mbpo")
    host.step(np.zeros((1, 1)))
    host.step(np.zeros((1, 1)))
    with pytest.raises(UsageError, match=r"register_termination\('LineEnds-v0'") as error:
        host.step(np.zeros((1, 1)))
    assert "\n" not in str(error.value) and "--algo=model-free" in str(error.value)


def test_non_finite_transition_is_dropped_for_one_learner_only():
    host, reference = host_envs("LineNaN-v0", [0, 1]), host_envs("LineNaN-v0", [0, 1])
    finite_actions = np.float32([[0.1], [0.2]])
    for h in (host, reference):
        h.step(finite_actions)
    transition, valid = host.step(np.float32([[1.0], [0.2]]))
    expected, _ = reference.step(finite_actions)
    np.testing.assert_array_equal(valid, [False, True])
    for actual, desired in zip(transition, expected, strict=True):
        assert not actual[0].any()
        np.testing.assert_array_equal(actual[1], desired[1])
    np.testing.assert_array_equal(host.dropped, [1, 0])
    np.testing.assert_array_equal(host.obs[1], reference.obs[1])
    assert host.obs[0, 1] == 0 and np.isfinite(host.obs).all()
    # The return of an episode that was cut is not known.
    assert host.pop_finished() == []
    np.testing.assert_array_equal(host.progress()["episode"], [1, 0])


def test_learner_does_not_depend_on_other_learners():
    single, both = host_envs("pendulum-swingup", [4]), host_envs("pendulum-swingup", [9, 4])
    for _ in range(3):
        a, _ = single.step(np.full((1, 1), 0.3))
        b, _ = both.step(np.full((2, 1), 0.3))
        np.testing.assert_array_equal(a.next_obs[0], b.next_obs[1])
        assert (b.next_obs[0] != b.next_obs[1]).any()


@pytest.mark.parametrize("name", ["hopper-hop", "Hopper-v4"])
def test_restored_progress_continues_bitwise_equal(name):
    rng = np.random.default_rng(0)
    host = host_envs(name, [0, 1])
    restored = TrainingEnvs(run_config(name), envs.spec(name), [0, 1])
    action_dim = envs.spec(name).action_dim
    host.step(np.zeros((2, action_dim), np.float32))
    for _ in range(60):
        host.step(rng.uniform(-1, 1, (2, action_dim)))
    saved = host.progress()
    assert saved["actions"].shape == (2, max(saved["length"]), action_dim)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored.restore(saved)
    for key, value in restored.progress().items():
        np.testing.assert_array_equal(value, saved[key])
        assert value.dtype == saved[key].dtype
    for _ in range(60):
        actions = rng.uniform(-1, 1, (2, action_dim))
        (x, vx), (y, vy) = host.step(actions), restored.step(actions)
        np.testing.assert_array_equal(vx, vy)
        for actual, desired in zip(y, x, strict=True):
            np.testing.assert_array_equal(float_bits(actual), float_bits(desired))
    assert host.pop_finished() == restored.pop_finished()


def test_progress_contains_finished_episodes():
    host, restored = host_envs("Line-v0", [0, 1]), host_envs("Line-v0", [0, 1])
    for _ in range(6):
        host.step(np.float32([[0.1], [0.2]]))
    restored.restore(host.progress())
    assert (finished := host.pop_finished()) == restored.pop_finished()
    assert len(finished) == 2
    restored.restore(host.progress())
    assert restored.pop_finished() == []


def test_progress_before_the_first_step_can_be_restored():
    host = host_envs("Line-v0", [0])
    saved, obs = host.progress(), host.obs
    assert saved["actions"].shape == (1, 1, 1)
    host.step(np.zeros((1, 1)))
    host.restore(saved)
    np.testing.assert_array_equal(host.obs, obs)


def test_episode_that_cannot_be_reproduced_is_abandoned():
    host = host_envs("LineNoise-v0", [0, 1])
    host.step(np.zeros((2, 1)))
    saved = host.progress()
    with pytest.warns(
        UserWarning, match="cannot be reproduced from its seed and actions"
    ) as caught:
        host.restore(saved)
    assert len(caught) == 2 and "learner 1" in str(caught[1].message)
    np.testing.assert_array_equal(host.progress()["episode"], [1, 1])
    np.testing.assert_array_equal(host.progress()["length"], [0, 0])
    assert (host.obs[:, 1] == 0).all()


def test_restore_detects_one_changed_bit():
    host = host_envs("Line-v0", [0, 1])
    host.step(np.zeros((2, 1)))
    saved = host.progress()
    saved["trace"][0, 1, 0] = np.nextafter(saved["trace"][0, 1, 0], np.float32(2))
    with pytest.warns(UserWarning, match="learner 0"):
        host.restore(saved)
    np.testing.assert_array_equal(host.progress()["episode"], [1, 0])


def test_evaluation_returns_and_lengths():
    config = run_config("LineEnds-v0", episodes=3)
    evaluator = Evaluator(config, envs.spec("LineEnds-v0"), [0, 1])

    def act(obs):
        assert obs.shape == (2, 3, 3) and obs.dtype == np.float32
        return np.zeros((2, 3, 1)) + np.float32([[[0.0]], [[-1.0]]])

    evaluation = evaluator(act, 0)
    np.testing.assert_array_equal(evaluation.returns, [[6.0] * 3, [-6.0] * 3])
    np.testing.assert_array_equal(evaluation.lengths, np.full((2, 3), 3))
    assert evaluation.returns.dtype == np.float64
    evaluator.close()


def test_evaluation_episodes_depend_on_learner_and_step():
    starts = []
    evaluator = Evaluator(run_config("Line-v0"), envs.spec("Line-v0"), [0, 1])

    def act(obs):
        if (obs[..., 1] == 0).all():
            starts.append(obs[..., 0].copy())
        return np.zeros((2, 2, 1))

    for step in (0, 10, 0):
        evaluator(act, step)
    np.testing.assert_array_equal(starts[0], starts[2])
    assert len(np.unique(starts[:2])) == 8


def test_evaluation_episode_ends_at_non_finite_reward():
    evaluator = Evaluator(run_config("LineNaN-v0"), envs.spec("LineNaN-v0"), [0])

    def act(obs):
        after_first_step = obs[..., 1:2] >= 1
        return np.where(after_first_step & (np.arange(2)[:, None] == 1), 1.0, 0.0)

    evaluation = evaluator(act, 0)
    # A cut return would be the better the earlier it is cut, where rewards are negative.
    np.testing.assert_array_equal(evaluation.returns, [[10.0, np.nan]])
    np.testing.assert_array_equal(np.isnan(evaluation.discounted), [[False, True]])
    np.testing.assert_array_equal(evaluation.lengths, [[5, 1]])


def test_discounted_returns_have_the_discount_of_each_learner():
    evaluator = Evaluator(run_config("LineEnds-v0"), envs.spec("LineEnds-v0"), [0, 1], [0.5, 1.0])
    evaluation = evaluator(lambda obs: np.zeros((2, 2, 1)), 0)
    evaluator.close()
    np.testing.assert_allclose(evaluation.discounted, [[3.5] * 2, [6.0] * 2])
