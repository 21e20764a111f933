"""What a task returns, compared with what the learners assume: terminations and float32."""

import json
from typing import ClassVar

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

from conftest import SMALL
from dynajax import envs, make_config, train
from dynajax.engines.data_checks import DataChecks
from dynajax.envs import checks, terminations
from dynajax.envs import mjx as envs_mjx
from dynajax.envs.mjx import EnvState, Task
from dynajax.envs.terminations import Counts
from dynajax.envs.training_envs import TrainingEnvs
from dynajax.envs.vector import VectorEnv
from dynajax.runtime.program import build
from dynajax.types import EnvSpec, Transition, UsageError

LIMIT = 15
SIZES = SMALL | {"eval.episodes": 1, "random_steps": 50, "eval.every": 50}


class Count(gymnasium.Env):
    """The first entry counts steps; the episode terminates at 9, or at a random step before."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n = 0
        return np.float32([0, 0]), {}

    def step(self, action):
        self.n += 1
        return np.float32([self.n, action[0]]), float(action[0]), self.n >= 9, False, {}


def right(obs, action, next_obs):
    return next_obs[0] >= 9


def early(obs, action, next_obs):
    """Return True two steps too early, too."""
    return next_obs[0] >= 7


def inverted(obs, action, next_obs):
    return next_obs[0] < 9


@pytest.fixture
def register(monkeypatch):
    """Provide register(environment, termination, limit), which returns the name of a new task."""
    names = []

    def add(environment, termination=None, limit=LIMIT):
        name = f"Checked{len(names)}-v0"
        gymnasium.register(name, environment, max_episode_steps=limit)
        names.append(name)
        if termination is not None:
            monkeypatch.setitem(terminations.TERMINATIONS, name, termination)
        return name

    yield add
    for name in names:
        del gymnasium.registry[name]


# --- Terminations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts",
    [
        Counts(1000, 5, 0, 0),  # never true
        Counts(1000, 20, 980, 0),  # inverted
        Counts(1000, 20, 1000, 20),  # always true
        Counts(1000, 0, 7, 0),  # where nothing terminates
        Counts(np.array([500, 500]), np.array([3, 2]), np.zeros(2, int), np.zeros(2, int)),
    ],
)
def test_function_that_is_always_wrong_is_an_error(counts):
    with pytest.raises(UsageError) as error:
        terminations.compare("Own-v0", right, counts)
    message = str(error.value)
    assert message.startswith("--env=Own-v0: the termination function contradicts the task")
    assert "\n" not in message and "register_termination" in message
    if np.sum(counts.terminated) > np.sum(counts.both):
        assert "truncated" in message


@pytest.mark.parametrize(
    ("counts", "missed", "false"),
    [
        (Counts(1000, 20, 10, 10), 10, 0),
        (Counts(1000, 20, 25, 20), 0, 5),
        (Counts(1000, 20, 20, 15), 5, 5),
        (Counts(1000, 4, 0, 0), 4, 0),  # too few for an error
    ],
)
def test_function_that_is_sometimes_wrong_gives_counts(counts, missed, false):
    message = terminations.compare("Own-v0", right, counts)
    assert f"terminated {counts.terminated}, of which it misses {missed}" in message
    assert f"ends {false} others" in message and "\n" not in message


@pytest.mark.parametrize(
    "counts", [Counts(0, 0, 0, 0), Counts(900, 0, 0, 0), Counts(900, 9, 9, 9), Counts(4, 4, 4, 4)]
)
def test_function_that_is_right_gives_no_message(counts):
    assert terminations.compare("Own-v0", right, counts) is None


def test_rare_difference_in_rounding_is_no_difference():
    assert terminations.compare("Own-v0", right, Counts(10_000, 400, 401, 399)) is None


def test_terminations_of_all_real_transitions_are_counted_once(register):
    """Count across calls and the end of the buffer, without invalid and padded slots."""
    name = register(Count, right)
    settings = SIZES | {"replay.real": 60, "eval.every": 40}
    program = build(make_config(name, preset="paper", seeds=2, settings=settings), envs.spec(name))
    check, state = DataChecks(program, 0), program.init()
    rng, steps, expected = np.random.default_rng(0), 0, np.zeros(4, int)
    for until in (40, 70, 110):
        while steps < until - 1:  # the last transition of an interval is inserted in the next one
            obs, new = rng.integers(0, 20, (2, 2, 2)).astype(np.float32)
            ended, valid = rng.random(2) < 0.5, rng.random(2) < 0.8
            rewards = np.zeros(2, np.float32)
            data = Transition(obs, rewards[:, None], rewards, np.float32(~ended), new)
            state = program.insert(state, data, valid)
            predicted = new[:, 0] >= 9
            parts = np.ones(2, bool), ended, predicted, ended & predicted
            expected += [int((x & valid).sum()) for x in parts]
            steps += 1
        counts = check._count(state, until)
        check._step = until
        assert [int(x.sum()) for x in counts] == expected.tolist()


class Engine:
    """An engine whose values are well resolved."""

    def value_ranges(self, state):
        return np.array([[[0.0] * 3, [1.0] * 3, [1.0] * 3]])


def test_warning_is_given_once(register):
    name = register(Count, early)
    program = build(make_config(name, preset="paper", settings=SIZES), envs.spec(name))
    check, state = DataChecks(program, 0), program.init()
    zero = np.zeros(1, np.float32)
    for until in (20, 40):
        for t in range(max(until - 20, 1), until):
            n = np.float32([[t % 9 + 1, 0]])
            data = Transition(n - 1, zero[:, None], zero, np.float32(n[:, 0] < 9), n)
            state = program.insert(state, data, np.ones(1, bool))
        messages = list(check(Engine(), state, until))
        assert len(messages) == (until == 20)


@pytest.mark.parametrize("engine", ["host", "mjx"])
def test_training_with_a_wrong_termination_function(
    register, monkeypatch, tmp_path, capsys, engine
):
    name = register(Count, inverted)
    if engine == "mjx":
        spec = EnvSpec(name, 2, 1, LIMIT, ("n", "a"), inverted)

        def step(state, action):
            n = state.obs[0] + 1
            return EnvState(jnp.array([n, action[0]]), ()), action[0], n >= 9

        task = Task(spec, lambda key: EnvState(jnp.zeros(2), ()), step)
        monkeypatch.setattr(envs_mjx, "make", lambda name, repeat: task)
    config = make_config(name, preset="paper", steps=100, settings=SIZES, engine=engine)
    with pytest.raises(UsageError, match="termination function contradicts the task: of 49 real"):
        train(config, tmp_path)


def test_training_with_an_imprecise_termination_function(register, tmp_path, capsys):
    config = make_config(register(Count, early), preset="paper", steps=100, settings=SIZES)
    assert train(config, tmp_path).finished
    printed = capsys.readouterr().out
    assert printed.count("termination function differs from the task: of 49 real transitions") == 1
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert any(line["kind"] == "fit" for line in lines)


def test_own_time_limit_that_is_returned_as_terminated(register):
    name = register(Count)
    config = make_config(name, preset="paper", settings=SIZES)
    host = TrainingEnvs(config, envs.spec(name), [0])
    host.start()
    with pytest.raises(UsageError, match=r"terminated after 9 agent steps.*truncated") as error:
        for _ in range(9):
            host.step(np.zeros((1, 1), np.float32))
    assert "\n" not in str(error.value)


# --- Large offsets --------------------------------------------------------------------------------


class Far(gymnasium.Env):
    """A position in metres with a false origin, a clock, a constant, and a reward."""

    observation_space: ClassVar = spaces.Dict(
        {
            "position": spaces.Box(-np.inf, np.inf, (2,)),
            "constant": spaces.Box(-np.inf, np.inf, (1,), np.float64),
        }
    )
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, origin=0.0, moves=1.0, reward=0.0):
        self.origin, self.moves, self.reward = origin, moves, reward

    def _obs(self):
        where = np.array([1.0, self.origin + self.moves * self.at])
        # A float64 simulator leaves rounding in what should be constant.
        return {"position": where, "constant": np.array([1e6 * (1 + 1e-15 * self.at)])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0.0
        return self._obs(), {}

    def step(self, action):
        self.at += float(action[0])
        return self._obs(), self.reward + self.at, False, False, {}


def warning_of(register, repeat=1, workers=0, **arguments):
    name = register(lambda **_: Far(**arguments), limit=50)
    vector = VectorEnv(name, 2, repeat=repeat, workers=workers)
    vector.reset([0, 1], [0, 0])
    rng = np.random.default_rng(0)
    for _ in range(40):
        vector.step([0, 1], rng.uniform(-1, 1, (2, 1)))
    ranges = vector.value_ranges([0, 1])
    assert ranges.shape == (2, 3, 4)
    vector.close()
    return checks.precision_warning(name, envs.spec(name).obs_names, ranges)


@pytest.mark.parametrize("repeat", [1, 2])
def test_values_that_float32_resolves_give_no_warning(register, repeat):
    assert warning_of(register, repeat) is None
    assert warning_of(register, repeat, origin=300.0, reward=-300.0) is None
    assert warning_of(register, repeat, moves=1e-9, reward=0.0) is None


@pytest.mark.parametrize("repeat", [1, 2])
def test_large_offset_of_an_observation_is_reported(register, repeat):
    message = warning_of(register, repeat, origin=5e6)
    assert "observation 2 (position[1]) is around 5e+06 and varies by" in message
    assert "float32 resolves only 0.5 there; subtract a constant such as 5e+06" in message
    assert "\n" not in message and "more" not in message


def test_observation_that_float32_makes_constant_is_reported(register):
    assert "position[1]" in warning_of(register, origin=1.7e9)


def test_small_changes_in_a_wide_range_are_reported(register):
    """The range is resolved, but not the change in one step, which the model predicts."""
    ranges = np.array([[[0.0, 5e6, 0.0], [1.0, 5.002e6, 1.0], [0.1, 0.7, 0.0]]])
    message = checks.precision_warning("Own-v0", ("x", "y"), ranges)
    assert "observation 1 (y) is around 5.001e+06 and varies by 2e+03" in message
    assert "by at most 0.7 in a step" in message


def test_large_constant_reward_is_reported(register):
    message = warning_of(register, reward=1e8)
    assert "the reward is around 1e+08" in message and "in a step" not in message


def test_far_action_bounds_are_reported():
    spec = EnvSpec("Own-v0", 1, 2, 10, ("x",), None, ((-1.0, 1e6), (1.0, 1e6 + 1)))
    message = checks.bounds_warning(spec)
    assert message.startswith("--env=Own-v0: action 1 is between 1000000 and 1000001, but float32")
    assert checks.bounds_warning(spec._replace(bounds=((-1.0, 0.0), (1.0, 1e6)))) is None
    assert checks.bounds_warning(spec._replace(bounds=None)) is None


def test_ranges_are_no_longer_recorded_after_the_first_observations():
    ranges = checks.ValueRanges(1)
    for t in range(checks.ValueRanges.MEASURED + 10):
        ranges.add(np.array([float(t)]), None if t == 0 else -float(t))
    assert not ranges.open
    last = checks.ValueRanges.MEASURED - 1
    np.testing.assert_array_equal(ranges.array(), [[0, -last], [last, -1], [1, 1]])


def test_training_reports_a_large_offset_once(register, tmp_path, capsys):
    name = register(lambda **_: Far(origin=5e6), terminations.never)
    config = make_config(name, algo="model-free", preset="paper", steps=100, settings=SIZES)
    train(config, tmp_path)
    assert capsys.readouterr().out.count("(position[1]) is around 5e+06") == 1
