"""Restored states in the diagnosis of a run: how they are drawn, and when they are refused."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from dynajax import envs
from dynajax.diagnose import loaded_run, online, online_report, rollout_plots, skeleton
from dynajax.types import EnvSpec
from test_diagnose_run import Ones, trained


def test_positions_are_found_in_an_observation():
    env = envs.make("cheetah-run")
    env.reset(seed=0)
    states, obs = [], []
    for _ in range(5):
        obs.append(env.step(np.full(6, 0.5, np.float32))[0])
        states.append(env.snapshot())
    obs = np.array(obs)
    positions = np.array([s[1:10] for s in states])
    # qpos[0], the position along the ground, is not observed.
    assert skeleton.observed_positions(positions, obs) == {i: i - 1 for i in range(1, 9)}
    shown = skeleton.stick_figures(env, np.array(states), obs, obs)
    np.testing.assert_allclose(shown.predicted, shown.real, atol=1e-6)
    moved = obs.copy()
    moved[:, 2] += 1.0
    predicted = skeleton.stick_figures(env, np.array(states), obs, moved).predicted
    assert np.abs(predicted - shown.real).max() > 0.1


def test_bodies_without_a_movable_parent_are_drawn_as_points():
    """The points are seen from above if their height does not change."""
    for task, flat in (("point_mass-easy", True), ("ball_in_cup-catch", False)):
        env = envs.make(task)
        obs, _ = env.reset(seed=0)
        states, observed = [], []
        for _ in range(5):
            states.append(env.snapshot())
            observed.append(obs)
            obs = env.step(np.full(2, 0.5, np.float32))[0]
        real = np.array(observed)
        predicted = real.copy()
        predicted[:, :2] += 0.1
        poses = skeleton.stick_figures(env, np.array(states), real, predicted)
        np.testing.assert_array_equal(poses.real[:, :, 0], poses.real[:, :, 1])
        assert np.abs(poses.predicted - poses.real).max() == pytest.approx(0.1, abs=1e-6)
        assert (np.ptp(poses.real[..., 2], axis=0).max() < 1e-6) == flat
        spec = envs.spec(task)
        path = online.PredictedPath(real, predicted, np.array(states))
        figure = rollout_plots.draw_path(path, poses, "none", spec)
        marks = figure.subfigs[0].axes[0].get_lines()
        heights = [line.get_ydata()[0] for line in marks[: len(poses.real[0])]]
        np.testing.assert_array_equal(heights, poses.real[0, :, 0, 1 if flat else 2])


@pytest.mark.parametrize("unit", [1e-7, 1e-12])
def test_pictures_of_a_path_do_not_depend_on_units(unit):
    """The dimension with the largest relative error comes first, and bodies fill their axes."""
    rng = np.random.default_rng(0)
    real = rng.normal(0, [1.0, 5.0], (20, 2))
    predicted = real + np.array([0.5, 1.0])
    bones = rng.uniform(-2, 2, (20, 3, 2, 3))
    spec = EnvSpec("own", 2, 1, 20, ("x", "y"), None)

    def drawn(unit):
        path = online.PredictedPath(unit * real, unit * predicted, None)
        poses = skeleton.Sticks(unit * bones, unit * bones)
        above, below = rollout_plots.draw_path(path, poses, "none", spec).subfigs
        limits = [(*ax.get_xlim(), *ax.get_ylim()) for ax in (above.axes[0], *below.axes)]
        return [ax.get_title(loc="left") for ax in below.axes], limits

    (one, expected), (small, limits) = drawn(1.0), drawn(unit)
    assert one == small == ["x", "y"]
    size = np.ptp(unit * bones)
    np.testing.assert_allclose(limits[1], [*expected[1][:2], *(unit * np.array(expected[1][2:]))])
    assert 0.5 * size < np.ptp(limits[0][2:]) < 2 * size


# --- simulators whose state a restore does not set completely ----------------------------------


class Goal(Ones):
    """Gives a reward that every reset draws and that no snapshot contains."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,))

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.goal = self.np_random.uniform()
        return obs, info

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, self.goal, terminated, truncated, info


class Stacked(gymnasium.Wrapper):
    """Returns the last two observations, as wrappers that stack frames do."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed)
        self.last = obs
        return np.concatenate([obs, obs]), info

    def step(self, action):
        obs, *rest = self.env.step(action)
        both, self.last = np.concatenate([self.last, obs]), obs
        return both, *rest

    def snapshot(self):
        return self.env.unwrapped.snapshot()

    def restore(self, values):
        self.env.unwrapped.restore(values)


gymnasium.register("Goal-v0", Goal, max_episode_steps=8)
gymnasium.register("Stacked-v0", lambda: Stacked(Ones()), max_episode_steps=8)


@pytest.mark.parametrize(
    ("task", "differs"), [("Goal-v0", "reward"), ("Stacked-v0", "observation"), ("Ones-v0", None)]
)
def test_restored_states_that_do_not_reproduce_are_refused_with_the_reason(task, differs, tmp_path):
    folder = trained(tmp_path / "run", task)
    reader = loaded_run.Reader(folder)
    findings = [online.inspect(reader.load(300), 0, steps=3, starts=8)]
    numbers = findings[0].numbers
    online_report.write(findings, reader.config, reader.spec, tmp_path, "x")
    html = (tmp_path / "diagnosis.html").read_text()
    # Simulated again from their seeds the transitions are the same; only a restore differs.
    assert numbers.get("not_reproduced", 0) == 0 and np.isfinite(numbers["critic_return"])
    if differs is None:
        assert findings[0].restore_error is None and "synthetic_checked" in numbers
        assert "does not lead to" not in html
        return
    assert differs in findings[0].restore_error
    assert not [n for n in numbers if n.startswith(("counterfactual", "synthetic"))]
    assert findings[0].path.states is None
    assert "lead to the recorded transition" in html and differs in html
