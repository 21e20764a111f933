"""Train a task whose simulator can exist only once."""

import csv
import dataclasses
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from absl import flags
from gymnasium import spaces

import scripts
from dynajax import config, envs
from dynajax.cli import common
from dynajax.envs.training_envs import TrainingEnvs
from dynajax.envs.vector import default_workers
from dynajax.policy import load_policy, play
from dynajax.runs import video
from dynajax.settings import make
from dynajax.train import train
from dynajax.types import UsageError
from sizes import SHORT_RUN, as_flags, without_model

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SETTINGS = SHORT_RUN | {"agent.hidden": (8, 8), "eval.every": 70, "eval.episodes": 3}


class Robot(gymnasium.Env):
    """A simulator that can be made once in a process; episodes take twenty steps."""

    action_space = spaces.Box(-1.0, 1.0, (1,))
    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    made, most, resets, closed = 0, 1, 0, 0

    def __init__(self):
        Robot.made += 1
        if Robot.made > Robot.most:
            raise OSError("the port is in use")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Robot.resets += 1
        self.state = self.np_random.random(2)
        return self.state.astype(np.float32), {}

    def step(self, action):
        self.state = 0.9 * self.state + 0.1 * float(action[0])
        return self.state.astype(np.float32), float(self.state[0]), False, False, {}

    def close(self):
        Robot.closed += 1


@pytest.fixture
def robot(monkeypatch):
    gymnasium.register("Robot-v0", Robot, max_episode_steps=20)
    monkeypatch.setattr(Robot, "made", 0)
    monkeypatch.setattr(Robot, "most", 1)
    monkeypatch.setattr(Robot, "closed", 0)
    yield Robot
    del gymnasium.registry["Robot-v0"]


def run(steps=140, evaluate_on="training", algo="model-free", oracle="none", **settings):
    return make(
        "Robot-v0",
        preset="paper",
        algo=algo,
        oracle=oracle,
        agent="sac",
        seed=3,
        steps=steps,
        settings=SETTINGS | {"host.evaluate_on": evaluate_on} | settings,
    )


def returns(folder):
    with open(folder / "eval.csv") as file:
        return [line["return_mean"] for line in csv.DictReader(file)]


def again(robot):
    """Allow one more instance, for another start of the same or of another run."""
    robot.made, robot.most = 0, 1


def test_simulator_is_made_once(robot, tmp_path):
    train(run(), tmp_path / "once", quiet=True)
    assert robot.made == 1
    with pytest.raises(UsageError, match="the port is in use"):
        train(run(), tmp_path / "second", quiet=True)
    # Another start makes it once, too, and ends with the same files as an uninterrupted run.
    again(robot)
    train(run(70), tmp_path / "resumed", quiet=True)
    again(robot)
    train(run(140), tmp_path / "resumed", quiet=True)
    assert robot.made == 1
    assert returns(tmp_path / "resumed") == returns(tmp_path / "once")
    robot.made, robot.most = 0, 100
    train(run(70, "copies"), tmp_path / "copies", quiet=True)
    assert robot.made > 4
    assert returns(tmp_path / "copies") == returns(tmp_path / "once")[:1]


@pytest.mark.parametrize(
    ("most", "arguments", "error"),
    [
        (2, {}, "the port is in use"),  # none for the evaluations
        (3, {}, "the port is in use"),  # too few for them
        (100, {"algo": "mbpo", "oracle": "both"}, "cannot be set to a stored state"),
    ],
)
def test_engine_that_cannot_be_made_closes_its_environments(
    robot, tmp_path, most, arguments, error
):
    robot.most = most
    with pytest.raises(UsageError, match=error):
        train(run(evaluate_on="copies", **arguments), tmp_path, quiet=True)
    assert robot.closed == min(robot.made, most) > 1


def test_command_makes_the_simulator_once(robot, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "start", lambda process=None: None)
    words = ["--env=Robot-v0", "--preset=paper", "--algo=model-free", "--agent=sac", "--steps=70"]
    own = without_model(SETTINGS) | {"host.evaluate_on": "training"}
    words += [f"--out={tmp_path / 'run'}", *as_flags(own)]
    with scripts.loaded(EXPERIMENTS / "run.py") as script:
        flags.FLAGS([script.__file__, *words])
        assert script.main([]) == 0
    assert robot.made == 1


def test_policy_is_played_in_one_instance(robot, tmp_path):
    result = train(run(70), tmp_path, quiet=True)
    policy = load_policy(result.folder)
    robot.most = 100
    config, spec = play.configure(policy, None, 3, 1000)
    made = robot.made
    played = play.episodes(policy, config, spec, 0)
    assert robot.made == made + 1 and robot.closed == robot.made
    copies = play.episodes(dataclasses.replace(policy, evaluate_on="copies"), config, spec, 0)
    assert robot.made == made + 4
    np.testing.assert_allclose(played.returns, copies.returns, rtol=1e-6)


def test_evaluations_that_interrupt_no_episode_change_nothing(robot, tmp_path):
    robot.most = 100
    for where in ("copies", "training"):
        train(run(160, where, **{"eval.every": 80}), tmp_path / where, quiet=True)
    a, b = (tmp_path / where / "eval.csv" for where in ("copies", "training"))
    assert a.read_bytes() == b.read_bytes()


def test_interrupted_episode_is_truncated(robot):
    made = run()
    host = TrainingEnvs(made, envs.spec("Robot-v0", keep=True), [3])
    host.start()
    discounts = [host.step(np.zeros((1, 1)))[0].discount for _ in range(5)]
    last = host.obs
    host.restart_episodes()
    assert np.all(discounts) and host.pop_finished() == []
    assert (host.progress()["episode"], host.progress()["length"]) == ([1], [0])
    assert (host.obs != last).all()
    first = host.obs.copy()
    host.restart_episodes()  # of an episode that has just begun
    np.testing.assert_array_equal(host.obs, first)
    assert host.progress()["episode"] == [1]
    host.close()


def test_settings_that_need_further_instances_are_refused(robot):
    assert default_workers(run(), 100) == 0
    for arguments, text in (
        ({"settings": {"host.workers": 2}}, "host.workers=2; choose --set host.workers=0"),
        ({"oracle": "both", "algo": "mbpo"}, "--oracle=none"),
        ({"engine": "mjx"}, "--engine=host"),
    ):
        settings = {"host.evaluate_on": "training"} | arguments.pop("settings", {})
        with pytest.raises(UsageError, match=text) as error:
            make("Hopper-v5", settings=settings, **({"algo": "model-free"} | arguments))
        assert "host.evaluate_on=training" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"^--video: .*leave --video out$"):
        video.check(run())


def test_runs_of_the_version_before_keep_their_names():
    plain = config.as_dict(make("cheetah-run"))
    assert "evaluate_on" not in plain["host"]
    assert config.as_dict(run())["host"]["evaluate_on"] == "training"
    assert config.difference(plain, plain) == []
