"""A task that was changed between two starts of a run is refused."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from dynajax import envs
from dynajax.envs.training_envs import TrainingEnvs
from dynajax.settings import make
from dynajax.train import train
from dynajax.types import UsageError
from sizes import SHORT_RUN


class Cart(gymnasium.Env):
    """A deterministic task whose rules can be changed."""

    action_space = spaces.Box(-1.0, 1.0, (1,))
    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    reward, mass, start, ends, episodes = 1.0, 1.0, 1.0, None, 0

    def __init__(self, stateful=False):
        self.stateful = stateful

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.time = self.start * self.np_random.random(2), 0
        Cart.episodes += 1
        return self.state.astype(np.float32), {}

    def step(self, action):
        self.time += 1
        mass = self.mass * (1 + Cart.episodes if self.stateful else 1)
        self.state = self.state + np.array([0.1 * self.state[1], float(action[0]) / mass])
        reward = self.reward * float(self.state[0])
        return self.state.astype(np.float32), reward, self.time == self.ends, False, {}


@pytest.fixture
def cart(monkeypatch):
    """Return set(name=value), which changes the task."""
    for name, kwargs in (("Cart-v0", {}), ("CartStateful-v0", {"stateful": True})):
        gymnasium.register(name, Cart, max_episode_steps=30, kwargs=kwargs)
    yield lambda **values: [monkeypatch.setattr(Cart, n, v) for n, v in values.items()]
    for name in ("Cart-v0", "CartStateful-v0"):
        del gymnasium.registry[name]


def new_envs(name="Cart-v0"):
    host = TrainingEnvs(make(name, algo="model-free", preset="paper"), envs.spec(name), [0, 1])
    host.start()
    return host


def saved_after(steps, name="Cart-v0"):
    host, rng = new_envs(name), np.random.default_rng(0)
    for _ in range(steps):
        host.step(rng.uniform(-1, 1, (2, 1)))
    return host.progress()


CHANGES = [
    ({"reward": 2.0}, r"the reward of step 1 is \d\.\d+ and was \d\.\d+"),
    ({"mass": 1.01}, r"obs\[1\] of step 1 is -?\d\.\d+ and was -?\d\.\d+"),
    ({"ends": 5}, "the end of the episode of step 5 is 1 and was 0"),
]


# Episodes have 30 steps: after 30 and 60 the current ones have just begun.
@pytest.mark.parametrize("steps", [40, 30, 60])
@pytest.mark.parametrize(("change", "text"), CHANGES)
def test_changed_task_is_refused(cart, change, text, steps):
    saved = saved_after(steps)
    cart(**change)
    with pytest.raises(UsageError, match=text) as error:
        new_envs().restore(saved)
    message = str(error.value)
    assert message.startswith("--env=Cart-v0: the task was changed") and "\n" not in message
    assert "learner 0" in message and "--out" in message


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_of_an_equal_task_or_before_the_first_step(cart):
    for steps in (0, 1, 30, 31, 40):
        saved = saved_after(steps)
        host = new_envs()
        host.restore(saved)
        last = saved["trace"][[0, 1], saved["length"], :-1]
        np.testing.assert_array_equal(host.obs, last)
    saved = saved_after(0)
    cart(reward=2.0)
    new_envs().restore(saved)


def test_task_with_a_state_of_its_own_is_not_refused(cart):
    saved = saved_after(40, "CartStateful-v0")
    host = new_envs("CartStateful-v0")
    with pytest.warns(UserWarning, match="cannot be reproduced"):
        host.restore(saved)
    np.testing.assert_array_equal(host.progress()["length"], [0, 0])


@pytest.mark.parametrize("change", [{"mass": 1 + 1e-6}, {"start": 1.5}])
def test_rounding_and_another_first_state_start_the_next_episode(cart, change):
    saved = saved_after(40)
    cart(**change)
    host = new_envs()
    with pytest.warns(UserWarning, match="cannot be reproduced"):
        host.restore(saved)
    np.testing.assert_array_equal(host.progress()["episode"], saved["episode"] + 1)


def test_run_whose_reward_was_changed_does_not_resume(cart, tmp_path):
    settings = SHORT_RUN | {"agent.hidden": (8, 8), "eval.every": 70}
    small = {"preset": "paper", "algo": "model-free", "agent": "sac", "settings": settings}
    train(make("Cart-v0", steps=70, **small), tmp_path, quiet=True)
    cart(reward=2.0)
    logs = (tmp_path / "eval.csv").read_bytes()
    with pytest.raises(UsageError, match="the reward of step 1"):
        train(make("Cart-v0", steps=140, **small), tmp_path, quiet=True)
    assert (tmp_path / "eval.csv").read_bytes() == logs
    cart(reward=1.0)
    assert train(make("Cart-v0", steps=140, **small), tmp_path, quiet=True).finished
