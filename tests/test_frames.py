"""Frames are the simulator steps that were done, where an episode can end inside an agent step."""

import csv
import json

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import register, registry, spaces

from dynajax import envs, report
from dynajax.envs import mjx
from dynajax.envs.mjx import EnvState, Task
from dynajax.envs.mjx.repeating import frames_between
from dynajax.envs.training_envs import TrainingEnvs
from dynajax.report.run import interpolate_frames, read_run
from dynajax.settings import make
from dynajax.train import train
from dynajax.types import EnvSpec
from fake_runs import fake_run
from sizes import SHORT_RUN

#: Episodes of five frames: with four frames per agent step the second step has one frame.
ENDS, REPEAT = 5, 4
SETTINGS = SHORT_RUN | {"task.repeat": REPEAT, "agent.hidden": (8, 8)}


class Counted(gymnasium.Env):
    """A task that terminates at a frame and counts the frames of all its instances."""

    action_space = spaces.Box(-1.0, 1.0, (1,))
    observation_space = spaces.Box(-np.inf, np.inf, (1,))
    total = 0

    def reset(self, *, seed=None, options=None):
        self.frame = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        Counted.total += 1
        self.frame += 1
        return np.float32([self.frame]), 1.0, self.frame == ENDS, False, {}


@pytest.fixture
def name():
    register("Counted-v0", Counted, max_episode_steps=100)
    Counted.total = 0
    yield "Counted-v0"
    del registry["Counted-v0"]


def config(name, steps, engine="host"):
    return make(
        name,
        preset="paper",
        algo="model-free",
        agent="sac",
        steps=steps,
        settings=SETTINGS,
        engine=engine,
        seeds=2,
    )


def logged(folder):
    """Return the frames in eval.csv, by step and seed."""
    with open(folder / "eval.csv") as file:
        return {
            (int(line["step"]), int(line["seed"])): int(line["frames"])
            for line in csv.DictReader(file)
        }


@pytest.mark.parametrize("workers", [0, 2])
def test_host_counts_the_frames_that_were_done(name, workers):
    run = make(name, algo="model-free", settings={"task.repeat": REPEAT, "host.workers": workers})
    if workers:  # worker processes do not know the tasks of this module
        name = "Hopper-v5"
    host = TrainingEnvs(run, envs.spec(name, **run.stepping), [0, 1])
    host.start()
    for _ in range(300):
        host.step(np.ones((2, host._spec.action_dim)))
    if workers:
        assert (host.frames < 300 * REPEAT).all() and (host.frames > 300 * REPEAT / 2).all()
    else:
        assert host.frames.tolist() == [750, 750] and Counted.total == 1500
    saved = host.progress()
    host.frames[:] = 0
    host.restore(saved)
    np.testing.assert_array_equal(host.frames, saved["frames"])
    host.close()


def test_frames_of_a_time_limit_inside_a_step_are_counted_too():
    run = make("pendulum-swingup", algo="model-free", settings={"task.repeat": 300})
    host = TrainingEnvs(run, envs.spec("pendulum-swingup", **run.stepping), [0])
    host.start()
    for _ in range(8):  # two episodes of 1000 frames
        host.step(np.zeros((1, 1)))
    assert host.frames.tolist() == [2000]


def test_logs_contain_the_count_and_a_resume_continues_it(name, tmp_path):
    train(config(name, 200), tmp_path, quiet=True)
    expected = {(100, 0): 250, (100, 1): 250, (200, 0): 500, (200, 1): 500}
    assert logged(tmp_path) == expected
    train(config(name, 300), tmp_path, quiet=True)
    expected |= {(300, 0): 750, (300, 1): 750}
    assert logged(tmp_path) == expected
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [x["frames"] for x in lines if x["kind"] == "learn" and x["seed"] == 0][-1] == 750


def counted_on_device():
    def step(state, action):
        frame = state.physics + 1
        obs = frame.astype(jnp.float32)[None]
        return EnvState(obs, frame), jnp.float32(1), frame == ENDS

    spec = EnvSpec("Counted", 1, 1, 100, ("obs",), lambda obs, action, new: new[0] == ENDS)
    return Task(spec, lambda key: EnvState(jnp.zeros(1), jnp.int32(0)), step)


def test_device_counts_the_frames_that_were_done(tmp_path, monkeypatch):
    monkeypatch.setattr(mjx, "TASKS", mjx.TASKS | {"Counted": counted_on_device})
    train(config("Counted", 100, "mjx"), tmp_path, quiet=True)
    assert logged(tmp_path) == {(100, 0): 250, (100, 1): 250}
    train(config("Counted", 200, "mjx"), tmp_path, quiet=True)
    assert logged(tmp_path)[200, 1] == 500


def write_counts(folder, per_step):
    """Replace the frames of a run by those of episodes that end inside a step."""
    lines = list(csv.reader((folder / "eval.csv").open()))
    for line in lines[1:]:
        line[3] = str(round(int(line[2]) * per_step[line[0]]))
    (folder / "eval.csv").write_text("".join(",".join(line) + "\n" for line in lines))


def test_reports_read_the_count(tmp_path):
    folder = fake_run(tmp_path / "run", repeat=2, steps=3000, variants=("none", "scale"))
    write_counts(folder, {"none": 1.5, "scale": 1.75})
    run = read_run(folder)
    assert run.frames_of("none").tolist() == [1500, 3000, 4500]
    assert run.frames_of("scale").tolist() == [1750, 3500, 5250]
    assert run.frames.tolist() == [1625, 3250, 4875]
    # Between evaluations, and beyond the last one.
    assert run.frames_at("scale", np.array([500, 1000, 3200])).tolist() == [875, 1750, 5600]
    page = report.write_report(folder).read_text()
    assert "3,000 agent steps (4,875 frames, at most 2 frames per step)" in page
    assert "5.0 agent steps (8.1 frames) a second" in page


def test_frames_of_logs_without_them_are_a_product(tmp_path):
    folder = fake_run(tmp_path / "run", repeat=2, steps=2000, variants=("none",))
    lines = list(csv.reader((folder / "eval.csv").open()))
    text = "".join(",".join(line[:3] + line[4:]) + "\n" for line in lines)
    (folder / "eval.csv").write_text(text)
    assert read_run(folder).frames.tolist() == [2000, 4000]
    none = np.zeros(0, int)
    assert interpolate_frames(none, none, np.array([5, 10]), 2).tolist() == [10, 20]


def test_device_task_without_repeat_has_one_frame_per_step():
    task = counted_on_device()
    state = task.reset(jax.random.key(0))
    assert frames_between(state, task.step(state, jnp.ones(1))[0]) == 1
