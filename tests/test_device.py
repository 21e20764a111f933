"""Test the device engine: equality with the host engine, resume, dropped steps, resets."""

import contextlib
import csv
import json

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import SMALL
from dynajax import make_config, register_termination, train
from dynajax.engines import device
from dynajax.envs import mjx as envs_mjx
from dynajax.envs.mjx import EnvState, Task
from dynajax.profiling.hlo import replay_copies
from dynajax.runs.writer import RunWriter
from dynajax.runtime import distributed
from dynajax.runtime.program import build
from dynajax.runtime.timers import Clock
from dynajax.types import EnvSpec

LIMIT = 15
SIZES = SMALL | {"model.fit_every": 20, "eval.episodes": 2, "agent.learning_rate": 1e-4}


def move(obs, action, np):
    """Walk on a grid, so that arithmetic is exact in both engines; the last entry counts steps."""
    push = np.round(8 * action) / 8
    next_obs = np.stack([0.5 * np.round(obs[0] * 8) / 8 + push[0], push[1], obs[2] + 1])
    lost = (obs[2] == 6) & (obs[0] > 0.25)
    return np.where(lost, np.nan, next_obs), obs[0] - push[1], obs[2] >= 9


def terminates(obs, action, next_obs):
    return obs[2] >= 9


class Walk(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = np.zeros(3, np.float32)
        return self.at, {}

    def step(self, action):
        next_obs, reward, terminated = move(self.at, action, np)
        self.at = next_obs.astype(np.float32)
        return self.at, float(reward), bool(terminated), False, {}


def task(spec: EnvSpec) -> Task:
    def step(state, action):
        next_obs, reward, terminated = move(state.obs, action, jnp)
        return EnvState(next_obs, state.physics + 1), reward, terminated

    return Task(spec, lambda key: EnvState(jnp.zeros(3), jnp.zeros(())), step)


@pytest.fixture(autouse=True)
def walk(monkeypatch):
    gymnasium.register("DeviceWalk-v0", Walk, max_episode_steps=LIMIT, disable_env_checker=True)
    register_termination("DeviceWalk-v0", terminates)
    spec = EnvSpec("DeviceWalk-v0", 3, 2, LIMIT, ("x", "y", "n"), terminates)
    monkeypatch.setattr(envs_mjx, "make", lambda name, repeat: task(spec))
    yield
    del gymnasium.registry["DeviceWalk-v0"]


def config(engine, *, steps=100, settings=(), **arguments):
    return make_config(
        "DeviceWalk-v0",
        engine=engine,
        preset="paper",
        steps=steps,
        settings=SIZES | dict(settings),
        **arguments,
    )


def log(folder, kind):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({"fixes": ["none", "scale,target"]}, {}),
        ({"algo": "model-free"}, {"learn.reset_every": 70, "learn.reset_at": (60,)}),
        # The last interval and the last segment are shorter than the others.
        ({"algo": "model-free", "steps": 97}, {"eval.every": 30}),
    ],
)
def test_both_engines_reach_the_same_state(tmp_path, arguments, settings):
    runs = [
        train(config(engine, settings=settings, **arguments), tmp_path / engine, quiet=True)
        for engine in ("host", "mjx")
    ]
    host, device = (run.state for run in runs)
    for a, b in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-4)
    run = runs[0].config
    valid = np.asarray(host.learners.real_buffer.valid)[:, : run.steps - 1]
    assert not valid.all(), "no step was dropped"
    tables = [
        list(csv.DictReader((tmp_path / engine / "eval.csv").open())) for engine in ("host", "mjx")
    ]
    assert len(tables[0]) == len(tables[1]) == -(-run.steps // run.eval.every) * run.num_learners
    assert int(tables[0][-1]["step"]) == run.steps
    for a, b in zip(*tables, strict=True):
        assert (a["variant"], a["seed"], a["step"]) == (b["variant"], b["seed"], b["step"])
        assert float(a["length_mean"]) == float(b["length_mean"])
        assert float(a["return_mean"]) == pytest.approx(float(b["return_mean"]), abs=1e-4)
    for kind in ("learn", "fit", "time"):
        lines = [log(tmp_path / engine, kind) for engine in ("host", "mjx")]
        assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
        for a, b in zip(*lines, strict=True):
            if kind == "time":
                assert a["dropped"] == b["dropped"]
            else:
                assert a.keys() == b.keys()
                if kind == "learn":
                    assert a["start_return"] == pytest.approx(b["start_return"], abs=1e-4)
                    assert a["start_value"] == pytest.approx(b["start_value"], rel=5e-3, abs=5e-3)
                if kind == "learn" and a["train_return"] is not None:
                    assert a["train_return"] == pytest.approx(b["train_return"], abs=1e-4)


def test_resumed_run_is_bitwise_equal(tmp_path, monkeypatch):
    """Interrupt between two evaluations, so that the run stops after a segment."""

    def run(name, steps=100, every=30):
        # Segments have ten steps: fits at 50, 70 and 90, evaluations at 30, 60, 90 and 100.
        settings = {"eval.every": every}
        return train(config("mjx", steps=steps, settings=settings), tmp_path / name, quiet=True)

    whole = run("whole")
    reached: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "update_progress", lambda _, step: reached.append(step))
        interrupted = contextlib.nullcontext(lambda: 40 in reached)
        patch.setattr(distributed, "interruptions", lambda numbers: interrupted)
        stopped = run("parts")
    assert not stopped.finished and stopped.state.shared.step == 39
    assert not [line for line in log(tmp_path / "parts", "learn") if line["step"] > 30]
    parts = run("parts")
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(parts.state), strict=True):
        np.testing.assert_array_equal(a, b)
    tables = [(tmp_path / part / "eval.csv").read_bytes() for part in ("whole", "parts")]
    assert tables[0] == tables[1]
    lines = [log(tmp_path / part, "learn") for part in ("whole", "parts")]
    assert lines[0] == lines[1]


def random_start_task() -> Task:
    """Return a task whose initial state depends on the key, and whose episodes have four steps."""
    spec = EnvSpec("random start", 1, 1, 4, ("x",), None)

    def reset(key):
        return EnvState(jax.random.uniform(key, (1,)), jnp.zeros(()))

    def step(state, action):
        obs = jnp.where(action[0] > 0.5, jnp.nan, state.obs)
        return EnvState(obs, state.physics), jnp.float32(1), jnp.zeros((), bool)

    return Task(spec, reset, step)


def empty_runners(task, size, learners=1):
    """Return environments with pools of `size` initial states, before episode 0."""
    env = jax.eval_shape(task.reset, jax.random.PRNGKey(0))

    def zeros(*shape):
        return jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape), x.dtype), env)

    obs, action = jnp.zeros((learners, task.spec.obs_dim)), jnp.zeros((learners, 1))
    scalar, count = jnp.zeros(learners), jnp.zeros(learners, jnp.int32)
    return device.EnvRunnerState(
        env=zeros(learners),
        episode_step=count,
        episode_return=scalar,
        initial_states=zeros(learners, size),
        num_created=count,
        num_used=count,
        pending=device.Transition(obs, action, scalar, scalar, obs),
        pending_valid=jnp.zeros(learners, bool),
        num_episodes=count,
        return_sum=scalar,
        num_dropped=count,
        num_frames=count,
    )


def seed_keys(learners=1):
    return jax.vmap(jax.random.PRNGKey)(jnp.arange(learners))


def step_envs(task):
    return jax.vmap(lambda runner, action: device.step_env(task, runner, action))


def test_each_episode_starts_from_a_new_state():
    task, keys = random_start_task(), seed_keys()
    runners, starts = device.fill_pools(task, empty_runners(task, 3), keys), []
    assert int(runners.num_created[0]) == 3 and int(runners.num_used[0]) == 1
    step = jax.jit(step_envs(task))
    fill = jax.jit(lambda runners: device.fill_pools(task, runners, keys))
    for t in range(40):
        if t % 8 == 0:
            runners = fill(runners)
        if runners.episode_step[0] == 0:
            starts.append(float(runners.env.obs[0, 0]))
        runners = step(runners, jnp.zeros((1, 1)))
        # The episodes end at the time limit, which is no termination.
        assert float(runners.pending.discount[0]) == 1
    assert len(set(starts)) == len(starts) == 10
    assert int(runners.num_episodes[0]) == 10
    assert float(runners.return_sum[0]) == 40
    key = jax.random.fold_in(keys[0], 2)
    expected = [task.reset(jax.random.fold_in(key, e)) for e in range(10)]
    np.testing.assert_array_equal(starts, [float(e.obs[0]) for e in expected])


@pytest.mark.parametrize("name", ["random start", "pendulum-swingup", "reacher-easy"])
def test_flat_resets_equal_resets_of_each_learner(monkeypatch, optimised, name):
    """Also for tasks that draw numbers for each episode, and for arrays without entries."""
    monkeypatch.undo()
    task = random_start_task() if name == "random start" else envs_mjx.make(name, repeat=1)
    learners, size = 3, 4
    runners, keys = empty_runners(task, size, learners), seed_keys(learners)
    filled = jax.jit(lambda runners, keys: device.fill_pools(task, runners, keys))(runners, keys)

    @jax.jit
    def resets_of_one_learner(seed_key):
        key = jax.random.fold_in(seed_key, device.EPISODES)
        return jax.vmap(lambda e: task.reset(jax.random.fold_in(key, e)))(jnp.arange(size))

    expected = [resets_of_one_learner(key) for key in keys]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(filled.initial_states), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(filled.env.obs, expected.obs[:, 0])


def test_step_that_is_not_finite_ends_the_episode():
    task = random_start_task()
    runners = device.fill_pools(task, empty_runners(task, 3), seed_keys())
    runners = step_envs(task)(runners, jnp.zeros((1, 1)))
    runners = step_envs(task)(runners, jnp.ones((1, 1)))
    runner = jax.tree.map(lambda x: x[0], runners)
    assert not runner.pending_valid and int(runner.num_dropped) == 1
    assert all(not np.asarray(x).any() for x in runner.pending)
    # The return of an episode that was cut is not known.
    assert int(runner.episode_step) == 0 and int(runner.num_episodes) == 0
    assert float(runner.return_sum) == 0
    assert np.isfinite(runner.env.obs).all()
    assert float(runner.env.obs[0]) == float(runner.initial_states.obs[1, 0])


def test_evaluation_episode_that_is_not_finite_has_no_return():
    task = random_start_task()
    states = jax.vmap(jax.vmap(task.reset))(jax.random.split(jax.random.PRNGKey(0), (1, 3)))
    # The first episode is finite, the second one fails at each step, the third one at its start.
    states = states._replace(obs=states.obs.at[0, 2].set(jnp.nan))
    action = jnp.array([[[0.0], [1.0], [0.0]]])
    evaluation = device.run_episodes(task, lambda obs: action, jnp.array([0.5]), states)
    np.testing.assert_array_equal(evaluation.returns, [[4, np.nan, np.nan]])
    np.testing.assert_array_equal(evaluation.discounted, [[1.875, np.nan, np.nan]])
    np.testing.assert_array_equal(evaluation.lengths, [[4, 0, 0]])


def test_replay_buffers_are_not_copied(optimised):
    """The branches of the program update the replay buffers in place."""
    run = config("mjx", settings={"replay.real": 1003, "replay.synthetic": 1200})
    spec = EnvSpec("DeviceWalk-v0", 3, 2, LIMIT, ("x", "y", "n"), terminates)
    engine = device.DeviceEngine(build(run, spec), Clock(), task(spec))
    steps, _, fit = (f.lower(*arguments) for f, arguments in engine.programs().values())
    for lowered in (steps, fit):
        assert replay_copies(lowered.compile().as_text(), {1003, 1200}) == 0


def test_dm_control_task_trains(tmp_path, monkeypatch):
    monkeypatch.undo()
    run = make_config(
        "pendulum-swingup",
        engine="mjx",
        preset="paper",
        steps=60,
        fixes=["scale,target"],
        settings=SIZES | {"eval.every": 30},
    )
    result = train(run, tmp_path / "run", quiet=True)
    assert result.finished
    table = list(csv.DictReader((tmp_path / "run" / "eval.csv").open()))
    assert [float(row["length_mean"]) for row in table] == [1000, 1000]
    real = result.state.learners.real_buffer
    assert np.asarray(real.valid)[:, :59].all()
    # The observation is (cos, sin, velocity) of a moving pendulum.
    data = real.unpack()
    angle = np.asarray(data.obs)[0, :59]
    np.testing.assert_allclose(angle[:, 0] ** 2 + angle[:, 1] ** 2, 1, atol=1e-5)
    assert np.ptp(angle[:, 2]) > 0.01
    np.testing.assert_array_equal(data.next_obs[0, :58], angle[1:])
