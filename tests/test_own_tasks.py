"""Tasks as people write them: what a task may return, what is refused in one line, and where."""

import importlib
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from dynajax import envs, read_run, train
from dynajax.envs import checks, dmc
from dynajax.envs.training_envs import TrainingEnvs
from dynajax.envs.vector import VectorEnv, default_workers
from dynajax.settings import make
from dynajax.types import UsageError

BOX = spaces.Box(-9, 9, (3,))
INTEGERS = spaces.Box(-9, 9, (3,), np.int64)
PARTS = spaces.Dict({"a": BOX, "b": spaces.Discrete(3)})


class Scripted(gymnasium.Env):
    """Returns what it is told to, for ever."""

    action_space = spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, obs=(0.1, 0.2, 0.3), reward=1.0, terminated=False, space=BOX, later=None):
        self.observation_space, self.obs = space, obs
        self.result = reward, terminated, False, {}
        self.later = later

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.obs, {}

    def step(self, action):
        return self.obs if self.later is None else self.later, *self.result


class OldStep(Scripted):
    def step(self, action):
        return self.obs, 0.0, False, {}


class OldReset(Scripted):
    def reset(self, *, seed=None, options=None):
        return self.obs


class OlderReset(Scripted):
    def reset(self):
        return self.obs


class OldWrapper(gymnasium.Wrapper):
    """Written for the old API, around a task of the new one."""

    def step(self, action):
        obs, reward, done, info = self.env.step(action)
        return obs, reward, done, info


class Unpacks(Scripted):
    """A fault of the task's own that reads like one of its API."""

    def step(self, action):
        a, b, c, d, e = self.obs
        return a, b, c, d, e


class Silent(Scripted):
    def __init__(self):
        raise AssertionError


class Old(Scripted):
    def __init__(self):
        raise AttributeError("'mujoco._structs.MjData' object has no attribute 'solver_iter'")


class Unclosable(Scripted):
    def __init__(self, space=BOX):
        super().__init__(space=space)

    def close(self):
        raise RuntimeError("no window")


class Drifts(gymnasium.Env):
    """A drawn start, and a random walk from there."""

    action_space = spaces.Box(-1.0, 1.0, (1,))
    observation_space = spaces.Box(-np.inf, np.inf, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = self.np_random.random(2)
        return self.at.astype(np.float32), {}

    def step(self, action):
        self.at = self.at + self.np_random.random(2)
        return self.at.astype(np.float32), 1.0, False, False, {}


@pytest.fixture
def task():
    """task(entry, **kwargs) registers it and gives its name."""
    names = []

    def register(entry=Scripted, **kwargs):
        name = f"Own{len(names)}-v0"
        names.append(name)
        gymnasium.register(name, entry, kwargs=kwargs, max_episode_steps=5)
        return name

    yield register
    for name in names:
        del gymnasium.registry[name]


def refusal(call, *args):
    with pytest.raises(UsageError) as refused:
        call(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def played(name):
    env = envs.make(name)
    obs, _ = env.reset(seed=0)
    return obs, *env.step(np.zeros(1, np.float32))[:3]


@pytest.mark.parametrize(
    ("space", "obs", "text"),
    [
        (BOX, np.ones(1, np.float32), "has the shape (1,)"),
        (BOX, 0.5, "has the shape ()"),
        (BOX, np.ones((1, 3), np.float32), "has the shape (1, 3)"),
        (BOX, None, "has the shape ()"),
        (BOX, [[1.0], [1.0, 2.0]], "is no array"),
        (INTEGERS, np.array([0.02, 0.9, -0.71]), "has the dtype float64"),
        (INTEGERS, [0.0, 1.0, 2.0], "has the dtype float64"),
        (spaces.Box(0, 255, (3,), np.uint8), np.array([0, 1, 256]), "has the dtype int64"),
        (BOX, np.ones(3, complex), "has the dtype complex128"),
        (spaces.MultiBinary(3), np.array([0.5, 0.0, 1.0]), "has the dtype float64"),
        (spaces.Discrete(3), 3, "is 3"),
        (spaces.MultiDiscrete([2, 2]), np.array([1, 2]), "is [1 2]"),
        (PARTS, {"a": np.ones(3)}, "has no part 'b'"),
        (PARTS, {"a": np.ones(2), "b": 1}, "'a' that has the shape (2,)"),
        (PARTS, np.ones(3), "has no part 'a'"),
        (spaces.Tuple([BOX, BOX]), (np.ones(3),) * 3, "has 3 parts"),
    ],
)
def test_an_observation_that_is_none_of_its_space_is_refused(task, space, obs, text):
    name = task(obs=obs, space=space)
    message = refusal(played, name)
    assert message.startswith(f"--env={name}: ") and text in message
    parts = [space, *(PARTS.values() if space is PARTS else ())]
    assert any(f"but its space is {part}; " in message for part in parts)


@pytest.mark.parametrize(
    ("space", "obs", "flat"),
    [
        (BOX, [0.5, 1, 2], [0.5, 1, 2]),
        (BOX, np.array([1, 2, 3]), [1, 2, 3]),
        (BOX, np.array([0.1, 0.2, 0.3]), [0.1, 0.2, 0.3]),
        (INTEGERS, np.array([1, 2, 3], np.int32), [1, 2, 3]),
        (spaces.Box(0, 255, (3,), np.uint8), np.array([0, 1, 255]), [0, 1, 255]),
        (spaces.MultiBinary(3), np.array([True, False, True]), [1, 0, 1]),
        (spaces.Discrete(3, start=1), np.int64(2), [0, 1, 0]),
        (spaces.MultiDiscrete([2, 3]), np.array([1, 2]), [0, 1, 0, 0, 1]),
        (spaces.Box(-9, 9, ()), 0.5, [0.5]),
        (PARTS, {"a": [1, 2, 3], "b": 0}, [1, 2, 3, 1, 0, 0]),
        (BOX, np.array([np.nan, 0, 0]), [np.nan, 0, 0]),
    ],
)
def test_an_observation_of_its_space_is_taken_as_it_is(task, space, obs, flat):
    np.testing.assert_array_equal(played(task(obs=obs, space=space))[1], np.float32(flat))


def test_a_later_observation_is_checked_too(task):
    name = task(later=np.float32([1, 2]))
    assert "has the shape (2,)" in refusal(played, name)


@pytest.mark.parametrize("reward", [1, 1.0, True, np.float32(1), np.ones(1), np.ones((1, 1)), [1]])
def test_one_number_is_a_reward_in_whatever_array(task, reward):
    value = played(task(reward=reward))[2]
    assert value == 1 and type(value) is float


@pytest.mark.parametrize(
    ("reward", "text"),
    [
        (np.ones(2), "an array of shape (2,)"),
        ([], "an array of shape (0,)"),
        (None, "None"),
        ("1", "'1'"),
        (1j, "1j"),
    ],
)
def test_a_reward_of_several_numbers_or_none_is_refused(task, reward, text):
    name = task(reward=reward)
    message = refusal(played, name)
    assert message.startswith(f"--env={name}: ") and text in message and "reward" in message


def test_an_end_is_one_flag_too(task):
    assert played(task(terminated=np.array([True])))[3] is True
    assert "terminated" in refusal(played, task(terminated=np.array([True, False])))


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        ([-1e10, -1], [1e10, 1], "infinite bounds"),
        ([0, -1], [1e11, 1], "infinite bounds"),
        ([-np.inf, -1], [np.inf, 1], "infinite bounds"),
        ([0, 0], [0, 0], "its action 0 can only be 0"),
        ([-1, 2], [1, 2], "its action 1 can only be 2"),
        ([], [], "its actions have no entries"),
    ],
)
def test_actions_without_bounds_or_without_effect_are_refused(task, low, high, text):
    space = spaces.Box(np.float32(low), np.float32(high))
    name = task(type("Own", (Scripted,), {"action_space": space}))
    message = refusal(envs.make, name)
    assert message.startswith(f"--env={name}: ") and text in message


def test_both_kinds_of_task_have_one_rule_for_a_bound_that_is_none():
    low, high = np.array([-1e10, -np.inf, -1e9, 0]), np.array([1e10, 1, 1e9, 1e10])
    np.testing.assert_array_equal(checks.unlimited(low, high), [True, True, False, True])
    low, high = dmc.bounds(dmc.load("lqr-lqr_2_1"))
    assert (low, high) == (-1, 1)


@pytest.mark.parametrize("space", [spaces.Box(0, 1, (0,)), spaces.Dict({})])
def test_observations_without_entries_are_refused(task, space):
    assert "no entries" in refusal(envs.make, task(space=space))


@pytest.mark.parametrize("entry", [OldStep, OldReset, OlderReset, lambda: OldWrapper(Scripted())])
def test_a_task_of_the_old_api_is_refused_by_its_name(task, entry):
    name = task(entry)
    message = refusal(played, name)
    assert message.startswith(f"--env={name}: ") and "the API of Gym before 0.26" in message


def test_an_error_of_the_tasks_own_is_not_taken_for_the_old_api(task):
    with pytest.raises(ValueError, match="not enough values to unpack"):
        played(task(Unpacks))


def test_a_construction_that_fails_without_a_word_says_where(task):
    message = refusal(envs.make, task(Silent))
    assert "AssertionError, raised without a message in __init__, test_own_tasks.py:" in message
    assert "mujoco is pinned to 3.17, because dm_control needs it" in message
    message = refusal(envs.make, task(Old))
    assert "'solver_iter'; mujoco is pinned to 3.17" in message


def test_dm_controls_own_failure_is_one_line_too(monkeypatch):
    def load(*_, **__):
        raise ValueError("XML Error: unrecognized attribute: 'flex_vertedge'")

    monkeypatch.setattr(dmc._suite(), "load", load)
    message = refusal(envs.make, "cheetah-run")
    assert (
        message.startswith("--env=cheetah-run: it cannot be made") and "pinned to 3.17" in message
    )


def test_closing_does_not_decide(task):
    name = task(Unclosable)
    with pytest.warns(UserWarning, match=r"close\(\) failed \(RuntimeError: no window\)"):
        assert envs.spec(name).obs_dim == 3
    pool = VectorEnv(name, 1)
    with pytest.warns(UserWarning, match="no window"):
        pool.close()
    name = task(Unclosable, space=spaces.Box(0, 255, (8, 8, 3), np.uint8))
    with pytest.warns(UserWarning, match="no window"):
        assert "a picture" in refusal(envs.make, name)


def host_envs(name):
    host = TrainingEnvs(make(name, algo="model-free"), envs.spec(name), [0])
    host.start()
    return host


def test_running_statistics_are_named_at_the_start_and_where_they_are_lost(task):
    name = task(lambda: gymnasium.wrappers.NormalizeObservation(Drifts()))
    with pytest.warns(UserWarning, match="NormalizeObservation keeps running statistics") as caught:
        host = host_envs(name)
    assert len(caught) == 1 and "of evaluation" in str(caught[0].message)
    for _ in range(7):
        host.step(np.zeros((1, 1)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        host_envs(name).restore(host.progress())
    lost = [str(w.message) for w in caught if "does not repeat" in str(w.message)]
    assert lost and lost[0].endswith("statistics of NormalizeObservation before it are lost")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host_envs(task(Drifts))


SCRIPT = """
    import sys
    import gymnasium
    import numpy as np
    from dynajax import UsageError
    from dynajax.envs.vector import EnvPool

    print("the script runs")

    class Mine(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

    if __name__ == "__main__":
        gymnasium.register("Mine-v0", Mine)
        # Not what the interpreter is called when this file is imported.
        gymnasium.register("Elsewhere-v0", "elsewhere:Mine")

    for name in sys.argv[1:]:
        try:
            pool = EnvPool(name, 1, workers=1)
            print(pool.reset([0], [0]).shape)
            pool.close()
        except UsageError as error:
            print(error)
"""


def test_workers_do_not_run_the_script_again(tmp_path):
    """Without a main guard, as notebooks and first scripts are."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    module = SCRIPT[: SCRIPT.index("    if __name__")].replace('print("the script runs")', "")
    (tmp_path / "elsewhere.py").write_text(
        textwrap.dedent(module) + 'gymnasium.register("Module-v0", Mine)\n'
    )
    names = ["Mine-v0", "Elsewhere-v0", "elsewhere:Module-v0"]
    ran = subprocess.run(
        [sys.executable, script, *names], capture_output=True, text=True, timeout=120
    )
    lines = ran.stdout.splitlines()
    assert [lines[0], lines[-1]] == ["the script runs", "(1, 1)"], ran.stderr
    for line, name in zip(lines[1:-1], names[:2], strict=True):
        assert line.startswith(f"--env={name}: it is registered in the script that was started")
        assert f"--env=task:{name}" in line


def test_a_task_of_the_script_itself_is_stepped_by_one_process(task, monkeypatch):
    entry = type("Own", (Scripted,), {"__module__": "__main__"})
    config = make(task(entry), algo="model-free")
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    with pytest.warns(UserWarning, match="a module of its own"):
        assert default_workers(config, 64) == 0
    assert default_workers(make(task(), algo="model-free"), 64) == 8


def test_a_module_that_this_process_imported_is_imported_by_workers_too(monkeypatch):
    # The task's name does not name the module, whose code registers it.
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "results" / "scripts")
    importlib.import_module("own_tasks")
    pool = VectorEnv("PendulumMilli-v0", 1, workers=1)
    assert pool.reset([0], [0]).shape == (1, 3)
    pool.close()


@pytest.mark.parametrize(("algo", "fix"), [("sac", ""), ("mbpo", "scale,auto,beta")])
def test_a_cart_in_metres_and_ticks_is_learned_by_default(
    monkeypatch, tmp_path, optimised, algo, fix
):
    """By the preset's agent; and from a model whose code is chosen channel by channel."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "results" / "scripts")
    settings = {"random_steps": 250, "eval.every": 250, "model.fit_steps": 250}
    config = make(
        "own_tasks:Cart-v0", algo=algo, fixes=[fix], settings=settings, steps=750, seeds=2
    )
    train(config, tmp_path, quiet=True)
    returns = next(iter(read_run(tmp_path).evals.values()))
    # Of 200; a policy that does nothing has 1.
    assert returns[:, 0].max() < 20 and returns[:, -1].min() > 120, returns
