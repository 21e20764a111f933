"""The device engine: the same states as the host engine's, resume, dropped steps, starts."""

import contextlib
import csv
import itertools
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
from dynajax.runtime import distributed
from dynajax.runtime.timers import Clock
from dynajax.types import EnvSpec

LIMIT = 15
SIZES = SMALL | {"model.fit_every": 20, "eval.episodes": 2, "agent.learning_rate": 1e-4}


def move(obs, action, np):
    """A walk on a grid, so that both engines' arithmetic is exact; the last entry counts steps."""
    push = np.round(8 * action) / 8
    new = np.stack([0.5 * np.round(obs[0] * 8) / 8 + push[0], push[1], obs[2] + 1])
    lost = (obs[2] == 6) & (obs[0] > 0.25)
    return np.where(lost, np.nan, new), obs[0] - push[1], obs[2] >= 9


def ends(obs, action, new):
    return obs[2] >= 9


class Walk(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = np.zeros(3, np.float32)
        return self.at, {}

    def step(self, action):
        new, reward, over = move(self.at, action, np)
        self.at = new.astype(np.float32)
        return self.at, float(reward), bool(over), False, {}


def task(spec: EnvSpec) -> Task:
    def step(state, action):
        new, reward, over = move(state.obs, action, jnp)
        return EnvState(new, state.physics + 1), reward, over

    return Task(spec, lambda key: EnvState(jnp.zeros(3), jnp.zeros(())), step)


@pytest.fixture(autouse=True)
def walk(monkeypatch):
    gymnasium.register("DeviceWalk-v0", Walk, max_episode_steps=LIMIT, disable_env_checker=True)
    register_termination("DeviceWalk-v0", ends)
    spec = EnvSpec("DeviceWalk-v0", 3, 2, LIMIT, ("x", "y", "n"), ends)
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
        # A last interval, and a last segment, that are shorter than the others.
        ({"algo": "model-free", "steps": 97}, {"eval.every": 30}),
    ],
)
def test_both_engines_come_to_the_same(tmp_path, arguments, settings):
    runs = [
        train(config(engine, settings=settings, **arguments), tmp_path / engine, quiet=True)
        for engine in ("host", "mjx")
    ]
    host, ours = (run.state for run in runs)
    for a, b in zip(jax.tree.leaves(host), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-4)
    run = runs[0].config
    stored = np.asarray(host.rows.real_buffer.valid)[:, : run.steps - 1]
    assert not stored.all(), "no step was dropped"
    tables = [
        list(csv.DictReader((tmp_path / engine / "eval.csv").open())) for engine in ("host", "mjx")
    ]
    assert len(tables[0]) == len(tables[1]) == -(-run.steps // run.eval.every) * run.rows
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


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, monkeypatch):
    """Also after an interruption between two evaluations, which is heard within a segment."""

    def run(name, steps=100, every=30):
        # Segments have ten steps: fits fall at 50, 70 and 90, evaluations at 30, 60, 90 and 100.
        settings = {"eval.every": every}
        return train(config("mjx", steps=steps, settings=settings), tmp_path / name, quiet=True)

    whole = run("whole")
    calls = itertools.count()
    with monkeypatch.context() as patch:
        interrupted = contextlib.nullcontext(lambda: next(calls) >= 5)
        patch.setattr(distributed, "interruptions", lambda: interrupted)
        stopped = run("parts")
    assert not stopped.finished and stopped.state.shared.step == 39
    assert not [line for line in log(tmp_path / "parts", "learn") if line["step"] > 30]
    parts = run("parts")
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(parts.state), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("eval.csv",):
        same = [(tmp_path / part / name).read_bytes() for part in ("whole", "parts")]
        assert same[0] == same[1]
    lines = [log(tmp_path / part, "learn") for part in ("whole", "parts")]
    assert lines[0] == lines[1]


def spread_task() -> Task:
    """Starts that tell their key apart; an episode lasts for four steps."""
    spec = EnvSpec("spread", 1, 1, 4, ("x",), None)

    def reset(key):
        return EnvState(jax.random.uniform(key, (1,)), jnp.zeros(()))

    def step(state, action):
        bad = action[0] > 0.5
        obs = jnp.where(bad, jnp.nan, state.obs)
        return EnvState(obs, state.physics), jnp.float32(1), jnp.zeros((), bool)

    return Task(spec, reset, step)


def empty(task, size):
    env = EnvState(jnp.zeros(1), jnp.zeros(()))
    ready = jax.tree.map(lambda x: jnp.zeros((size, *x.shape)), env)
    transition = device.Transition(jnp.zeros(1), jnp.zeros(1), 0.0, 0.0, jnp.zeros(1))
    whole = jnp.zeros((), jnp.int32)
    return device.EnvRunnerState(
        env=env,
        age=whole,
        score=jnp.zeros(()),
        ready=ready,
        made=whole,
        used=whole,
        pending=transition,
        valid=jnp.zeros((), bool),
        ended=whole,
        ended_score=jnp.zeros(()),
        dropped=whole,
    )


def test_every_episode_has_a_start_of_its_own():
    task, key = spread_task(), jax.random.PRNGKey(0)
    world, starts = device.refill_pool(task, empty(task, 3), key), []
    assert int(world.made) == 3 and int(world.used) == 1
    advance = jax.jit(lambda w, a: device.advance(task, w, a))
    refill_pool = jax.jit(lambda w: device.refill_pool(task, w, key))
    for t in range(40):
        if t % 8 == 0:
            world = refill_pool(world)
        if world.age == 0:
            starts.append(float(world.env.obs[0]))
        world = advance(world, jnp.zeros(1))
    assert len(set(starts)) == len(starts) == 10
    assert int(world.ended) == 10
    assert float(world.ended_score) == 40
    expected = [task.reset(jax.random.fold_in(jax.random.fold_in(key, 2), e)) for e in range(10)]
    np.testing.assert_array_equal(starts, [float(e.obs[0]) for e in expected])


def test_a_step_that_is_not_finite_ends_the_episode():
    task = spread_task()
    world = device.refill_pool(task, empty(task, 3), jax.random.PRNGKey(0))
    world = device.advance(task, world, jnp.zeros(1))
    world = device.advance(task, world, jnp.ones(1))
    assert not world.valid and int(world.dropped) == 1
    assert all(not np.asarray(x).any() for x in world.pending)
    assert int(world.age) == 0 and int(world.ended) == 1
    assert float(world.ended_score) == 1
    assert np.isfinite(world.env.obs).all() and float(world.env.obs[0]) == float(
        world.ready.obs[1, 0]
    )


def test_no_ring_is_copied(spec):
    """The branches of the program pass the replays through in place."""
    from dynajax.profiling.compiled import ring_copies
    from dynajax.runtime.program import build

    run = config("mjx", settings={"replay.real": 1003, "replay.synthetic": 1200})
    at = EnvSpec("DeviceWalk-v0", 3, 2, LIMIT, ("x", "y", "n"), ends)
    engine = device.DeviceEngine(build(run, at), Clock(), task(at))
    steps, _, fit = engine.lower()
    jax.config.update("jax_disable_most_optimizations", False)
    for lowered in (steps, fit):
        assert ring_copies(lowered.compile(), {1003, 1200}) == 0


def test_a_task_of_dm_control_trains(tmp_path, monkeypatch):
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
    # cos, sin and velocity of a pendulum that moves
    angle = np.asarray(real.data.obs)[0, :59]
    np.testing.assert_allclose(angle[:, 0] ** 2 + angle[:, 1] ** 2, 1, atol=1e-5)
    assert np.ptp(angle[:, 2]) > 0.01
    np.testing.assert_array_equal(real.data.next_obs[0, :58], angle[1:])
