"""User-defined tasks: accepted return values, error messages, and import in workers."""

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
    """Return fixed values at every step."""

    action_space = spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, obs=(0.1, 0.2, 0.3), reward=1.0, terminated=False, space=BOX, next_obs=None):
        self.observation_space, self.obs = space, obs
        self.result = reward, terminated, False, {}
        self.next_obs = next_obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.obs, {}

    def step(self, action):
        return self.obs if self.next_obs is None else self.next_obs, *self.result


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
    """A wrapper with the old API around a task with the new one."""

    def step(self, action):
        obs, reward, done, info = self.env.step(action)
        return obs, reward, done, info


class UnpackError(Scripted):
    """A task with a bug whose error message resembles that of the old API."""

    def step(self, action):
        a, b, c, d, e = self.obs
        return a, b, c, d, e


class ErrorWithoutMessage(Scripted):
    def __init__(self):
        raise AssertionError


class MujocoError(Scripted):
    def __init__(self):
        raise AttributeError("'mujoco._structs.MjData' object has no attribute 'solver_iter'")


class CloseError(Scripted):
    def __init__(self, space=BOX):
        super().__init__(space=space)

    def close(self):
        raise RuntimeError("no window")


class RandomWalk(gymnasium.Env):
    """A random walk from a random start."""

    action_space = spaces.Box(-1.0, 1.0, (1,))
    observation_space = spaces.Box(-np.inf, np.inf, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.random(2)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.position = self.position + self.np_random.random(2)
        return self.position.astype(np.float32), 1.0, False, False, {}


@pytest.fixture
def task():
    """Provide task(entry, **kwargs), which registers a task and returns its name."""
    names = []

    def register(entry=Scripted, **kwargs):
        name = f"Own{len(names)}-v0"
        names.append(name)
        gymnasium.register(name, entry, kwargs=kwargs, max_episode_steps=5)
        return name

    yield register
    for name in names:
        del gymnasium.registry[name]


def error_message(call, *args):
    """Return the one-line message of the UsageError that a call raises."""
    with pytest.raises(UsageError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def play_step(name):
    """Return the first observation, and the observation, reward and flag of one step."""
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
        (BOX, [[1.0], [1.0, 2.0]], "is not an array"),
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
def test_observation_outside_its_space_is_rejected(task, space, obs, text):
    name = task(obs=obs, space=space)
    message = error_message(play_step, name)
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
def test_observation_in_its_space_is_flattened_unchanged(task, space, obs, flat):
    np.testing.assert_array_equal(play_step(task(obs=obs, space=space))[1], np.float32(flat))


def test_observations_of_steps_are_checked(task):
    name = task(next_obs=np.float32([1, 2]))
    assert "has the shape (2,)" in error_message(play_step, name)


@pytest.mark.parametrize("reward", [1, 1.0, True, np.float32(1), np.ones(1), np.ones((1, 1)), [1]])
def test_reward_may_be_any_single_number(task, reward):
    value = play_step(task(reward=reward))[2]
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
def test_reward_that_is_not_one_number_is_rejected(task, reward, text):
    name = task(reward=reward)
    message = error_message(play_step, name)
    assert message.startswith(f"--env={name}: ") and text in message and "reward" in message


def test_terminated_must_be_one_flag(task):
    assert play_step(task(terminated=np.array([True])))[3] is True
    assert "terminated" in error_message(play_step, task(terminated=np.array([True, False])))


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        ([-1e10, -1], [1e10, 1], "infinite bounds"),
        ([0, -1], [1e11, 1], "infinite bounds"),
        ([-np.inf, -1], [np.inf, 1], "infinite bounds"),
        ([0, 0], [0, 0], "its action 0 can only be 0"),
        ([-1, 2], [1, 2], "its action 1 can only be 2"),
        ([], [], "its actions are empty"),
    ],
)
def test_unbounded_constant_or_empty_actions_are_rejected(task, low, high, text):
    space = spaces.Box(np.float32(low), np.float32(high))
    name = task(type("Own", (Scripted,), {"action_space": space}))
    message = error_message(envs.make, name)
    assert message.startswith(f"--env={name}: ") and text in message


def test_bounds_of_1e10_count_as_infinite():
    low, high = np.array([-1e10, -np.inf, -1e9, 0]), np.array([1e10, 1, 1e9, 1e10])
    np.testing.assert_array_equal(checks.is_unbounded(low, high), [True, True, False, True])
    low, high = dmc.bounds(dmc.load("lqr-lqr_2_1"))
    assert (low, high) == (-1, 1)


@pytest.mark.parametrize("space", [spaces.Box(0, 1, (0,)), spaces.Dict({})])
def test_empty_observations_are_rejected(task, space):
    assert "are empty" in error_message(envs.make, task(space=space))


@pytest.mark.parametrize("entry", [OldStep, OldReset, OlderReset, lambda: OldWrapper(Scripted())])
def test_old_api_is_rejected(task, entry):
    name = task(entry)
    message = error_message(play_step, name)
    assert message.startswith(f"--env={name}: ") and "the API of Gym before 0.26" in message


def test_unpack_error_of_task_is_not_reported_as_old_api(task):
    with pytest.raises(ValueError, match="not enough values to unpack"):
        play_step(task(UnpackError))


def test_error_without_message_is_reported_with_its_location(task):
    message = error_message(envs.make, task(ErrorWithoutMessage))
    assert "AssertionError, raised without a message in __init__, test_own_tasks.py:" in message
    assert "mujoco is pinned to 3.17, because dm_control needs it" in message
    message = error_message(envs.make, task(MujocoError))
    assert "'solver_iter'; mujoco is pinned to 3.17" in message


def test_dm_control_load_error_is_one_line(monkeypatch):
    def load(*_, **__):
        raise ValueError("XML Error: unrecognized attribute: 'flex_vertedge'")

    monkeypatch.setattr(dmc._suite(), "load", load)
    message = error_message(envs.make, "cheetah-run")
    assert (
        message.startswith("--env=cheetah-run: it cannot be made") and "pinned to 3.17" in message
    )


def test_error_in_close_is_a_warning(task):
    name = task(CloseError)
    with pytest.warns(UserWarning, match=r"close\(\) failed \(RuntimeError: no window\)"):
        assert envs.spec(name).obs_dim == 3
    vector_env = VectorEnv(name, 1)
    with pytest.warns(UserWarning, match="no window"):
        vector_env.close()
    name = task(CloseError, space=spaces.Box(0, 255, (8, 8, 3), np.uint8))
    with pytest.warns(UserWarning, match="no window"):
        assert "an image" in error_message(envs.make, name)


def host_envs(name):
    host = TrainingEnvs(make(name, algo="model-free"), envs.spec(name), [0])
    host.start()
    return host


def test_warnings_about_running_statistics(task):
    name = task(lambda: gymnasium.wrappers.NormalizeObservation(RandomWalk()))
    with pytest.warns(UserWarning, match="NormalizeObservation keeps running statistics") as caught:
        host = host_envs(name)
    assert len(caught) == 1 and "and evaluation" in str(caught[0].message)
    for _ in range(7):
        host.step(np.zeros((1, 1)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        host_envs(name).restore(host.progress())
    lost = [str(w.message) for w in caught if "cannot be reproduced" in str(w.message)]
    assert lost and lost[0].endswith("statistics of NormalizeObservation before it are lost")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host_envs(task(RandomWalk))


SCRIPT = """
    import sys
    import gymnasium
    import numpy as np
    from dynajax import UsageError
    from dynajax.envs.vector import VectorEnv

    print("script started")

    class MyTask(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

    if __name__ == "__main__":
        gymnasium.register("Mine-v0", MyTask)
        # The module elsewhere does not register this id, only the main script does.
        gymnasium.register("Elsewhere-v0", "elsewhere:MyTask")

    for name in sys.argv[1:]:
        try:
            vector_env = VectorEnv(name, 1, workers=1)
            print(vector_env.reset([0], [0]).shape)
            vector_env.close()
        except UsageError as error:
            print(error)
"""


def test_workers_do_not_run_the_main_script(tmp_path):
    """The script has no main guard, like many notebooks and short scripts."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    module = SCRIPT[: SCRIPT.index("    if __name__")].replace('print("script started")', "")
    (tmp_path / "elsewhere.py").write_text(
        textwrap.dedent(module) + 'gymnasium.register("Module-v0", MyTask)\n'
    )
    names = ["Mine-v0", "Elsewhere-v0", "elsewhere:Module-v0"]
    process = subprocess.run(
        [sys.executable, script, *names], capture_output=True, text=True, timeout=120
    )
    lines = process.stdout.splitlines()
    assert [lines[0], lines[-1]] == ["script started", "(1, 1)"], process.stderr
    for line, name in zip(lines[1:-1], names[:2], strict=True):
        assert line.startswith(f"--env={name}: it is registered in the main script")
        assert f"--env=task:{name}" in line


def test_task_of_main_script_is_stepped_in_one_process(task, monkeypatch):
    entry = type("Own", (Scripted,), {"__module__": "__main__"})
    config = make(task(entry), algo="model-free")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    with pytest.warns(UserWarning, match="a separate module"):
        assert default_workers(config, 64) == 0
    assert default_workers(make(task(), algo="model-free"), 64) == 8


def test_workers_import_the_module_that_defines_the_task(monkeypatch):
    # The task's name does not contain the module that registers it.
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "results" / "scripts")
    importlib.import_module("own_tasks")
    vector_env = VectorEnv("PendulumMilli-v0", 1, workers=1)
    assert vector_env.reset([0], [0]).shape == (1, 3)
    vector_env.close()


@pytest.mark.parametrize(("algo", "fix"), [("model-free", ""), ("dynajax", "scale,auto,beta")])
def test_task_with_mixed_units_is_learned_with_default_settings(
    monkeypatch, tmp_path, optimised, algo, fix
):
    """Train the preset's agent, and a model whose target transform is chosen per dimension."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "results" / "scripts")
    settings = {"random_steps": 250, "eval.every": 250, "model.fit_steps": 250}
    config = make(
        "own_tasks:Cart-v0", algo=algo, fixes=[fix], settings=settings, steps=750, seeds=2
    )
    train(config, tmp_path, quiet=True)
    returns = next(iter(read_run(tmp_path).evals.values()))
    # The maximum is 200; a policy that does nothing has a return of 1.
    assert returns[:, 0].max() < 20 and returns[:, -1].min() > 120, returns
