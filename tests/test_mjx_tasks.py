"""User-defined device tasks: registration from a module, and checks."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import envs
from dynajax.envs import mjx
from dynajax.envs.mjx import EnvState, Task, register_mjx_task
from dynajax.envs.terminations import never
from dynajax.types import EnvSpec, UsageError

#: A user module as in the documentation.
MODULE = """
    import jax, jax.numpy as jnp
    from dynajax.envs.mjx import EnvState, Task, register_mjx_task
    from dynajax.types import EnvSpec

    def cart():
        spec = EnvSpec("Cart", 2, 1, 200, ("position", "velocity"), lambda s, a, new: abs(new[0]) > 2)
        def reset(key):
            obs = jax.random.uniform(key, (2,), minval=-0.5, maxval=0.5)
            return EnvState(obs, ())
        def step(state, action):
            velocity = state.obs[1] + 0.1 * action[0]
            obs = jnp.stack([state.obs[0] + 0.1 * velocity, velocity])
            return EnvState(obs, ()), -jnp.abs(obs[0]), jnp.abs(obs[0]) > 2
        return Task(spec, reset, step)

    register_mjx_task("Cart", cart)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Create a module that registers the task Cart, and return its name."""
    (tmp_path / "carts.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mjx, "TASKS", dict(mjx.TASKS))
    monkeypatch.delitem(__import__("sys").modules, "carts", raising=False)
    return "carts"


def test_task_registered_by_module_is_found_by_name(module):
    spec = envs.spec(f"{module}:Cart")
    assert (spec.name, spec.obs_dim, spec.time_limit) == ("carts:Cart", 2, 200)
    assert "Cart" in mjx.names()
    task = mjx.make(f"{module}:Cart")
    state = task.reset(jax.random.key(0))
    state, reward, terminated = task.step(state, jnp.ones(1))
    assert reward == -abs(state.obs[0]) and not terminated
    assert mjx.make(f"{module}:Cart", repeat=3).spec.time_limit == 67
    with pytest.raises(UsageError, match=r"^--env=carts:Cart: .* add --engine=mjx$"):
        envs.make(f"{module}:Cart")
    with pytest.raises(UsageError, match=r"it registers Cart$"):
        envs.spec(f"{module}:Carts")
    with pytest.raises(
        UsageError, match=r"^--env=carts:Carts: the module 'carts' registers no such"
    ):
        mjx.make(f"{module}:Carts")


def reset(key):
    return EnvState(jnp.zeros(2), jnp.int32(0))


def step(state, action):
    return EnvState(state.obs + action, state.physics + 1), jnp.float32(0), jnp.bool(False)


SPEC = EnvSpec("Wrong", 2, 1, 9, ("x", "y"), never)


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (3, "returned int 3"),
        (Task(SPEC._replace(obs_names=("x",)), reset, step), "obs_dim=2, 1 obs_names"),
        (Task(SPEC._replace(action_dim=0), reset, step), "action_dim=0"),
        (
            Task(SPEC._replace(obs_dim=3, obs_names=("x", "y", "z")), reset, step),
            "returned .obs = float32 (2,) ",
        ),
        (
            Task(SPEC, lambda key: EnvState(jnp.zeros(2, int), 0), step),
            "returned .obs = int32 (2,) ",
        ),
        (
            Task(SPEC, reset, lambda s, a: (s, jnp.zeros(1), jnp.bool(False))),
            "returned reward = float32 (1,) ",
        ),
        (
            Task(SPEC, reset, lambda s, a: (s, jnp.float32(0), jnp.float32(0))),
            "returned terminated = float32 () ",
        ),
        (Task(SPEC, reset, lambda s, a: s), "returned EnvState("),
        (
            Task(SPEC, reset, lambda s, a: (EnvState(s.obs, 1.0 * s.physics), *step(s, a)[1:])),
            "returned state.physics = float32 (), not int32 () ",
        ),
    ],
)
def test_inconsistent_task_raises_one_line(monkeypatch, task, text):
    monkeypatch.setattr(mjx, "TASKS", dict(mjx.TASKS))
    register_mjx_task("Wrong", lambda: task)
    with pytest.raises(UsageError) as error:
        mjx.make("Wrong")
    message = str(error.value)
    assert message.startswith("--env=Wrong: ") and text in message and "\n" not in message


def test_sequences_of_a_spec_become_tuples(monkeypatch):
    monkeypatch.setattr(mjx, "TASKS", dict(mjx.TASKS))
    spec = SPEC._replace(obs_names=["x", "y"], bounds=[np.float32([-2]), [2.0]])
    register_mjx_task("Lists", lambda: Task(spec, reset, step))
    made = mjx.make("Lists").spec
    assert made == SPEC._replace(name="Lists", bounds=((-2.0,), (2.0,))) and hash(made)


def test_registering_a_non_callable_raises():
    with pytest.raises(UsageError, match="must be a function"):
        register_mjx_task("Wrong", 3)
