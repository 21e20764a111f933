"""What a state may contain: it is saved and restored, or refused before the run starts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dynajax
from checkpoints import S, make_state, read_with_orbax
from dynajax import UsageError
from dynajax.envs.mjx import EnvState, Task, register_mjx_task
from dynajax.runs import serialization
from dynajax.runs.checkpoint import Checkpoints
from dynajax.runtime.program import build, check_leaves
from dynajax.runtime.sharding import to_host
from dynajax.types import EnvSpec
from sizes import NETWORKS, SMALL_OF_ANY


class Keyed(dynajax.TrustRule):
    """A trust rule whose state has leaves of many kinds."""

    needs_all_members = True

    def init(self):
        return {
            "key": jax.random.key(7),
            "old_key": jax.random.PRNGKey(7),
            "calls": 0,
            "half": np.float64(0.5),
            "flag": True,
            "nothing": None,
            "empty": jnp.zeros((0, 3)),
        }

    def apply(self, state, predictions, h, horizon, key):
        key, _ = jax.random.split(state["key"])
        return {**state, "key": key, "calls": state["calls"] + 1}, dynajax.TrustOutput()


class Named(dynajax.TrustRule):
    """A trust rule whose state cannot be saved."""

    leaf: object = "abc"

    def init(self):
        return {"inner": [jnp.zeros(3), self.leaf]}


def wander():
    """Return a device task whose state has a typed PRNG key."""

    def reset(key):
        seed = jax.random.randint(key, (), 0, 1000)
        return EnvState(jax.random.uniform(key, (2,)), jax.random.key(seed))

    def step(state, action):
        key, noise_key = jax.random.split(state.physics)
        obs = 0.9 * state.obs + 0.1 * action + 0.1 * jax.random.normal(noise_key, (2,))
        return EnvState(obs, key), -jnp.abs(obs).sum(), jnp.zeros((), bool)

    return Task(
        EnvSpec("wander", 2, 1, 15, ("x", "y"), dynajax.envs.terminations.never), reset, step
    )


register_mjx_task("Wander", wander)
TASKS = {"host": "Pendulum-v1", "mjx": "test_saved_states:Wander"}


def make(engine, steps, trust="test_saved_states:Keyed"):
    settings = SMALL_OF_ANY | NETWORKS["sac"] | {"random_steps": 50, "eval.every": 60}
    settings |= {"eval.episodes": 1, "model.fit_every": 20}
    return dynajax.make_config(
        TASKS[engine],
        agent="sac",
        trust=trust,
        preset="paper",
        steps=steps,
        engine=engine,
        settings=settings,
    )


@pytest.mark.parametrize("engine", ["host", "mjx"])
def test_typed_keys_in_states_of_plug_ins_are_saved_and_restored(tmp_path, engine):
    whole = dynajax.train(make(engine, 80), tmp_path / "whole", quiet=True)
    dynajax.train(make(engine, 60), tmp_path / "parts", quiet=True)
    parts = dynajax.train(make(engine, 80), tmp_path / "parts", quiet=True)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(parts.state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(to_host(a), to_host(b))
    assert whole.state.learners.trust["calls"] > 0
    assert jax.random.key_impl(parts.state.learners.trust["key"]) == "threefry2x32"


def with_trust(trust):
    state = make_state(5)
    return state._replace(learners=state.learners._replace(trust=trust))


def test_typed_keys_are_stored_as_their_data_with_their_implementation(tmp_path):
    keys = jax.random.split(jax.random.key(3, impl="rbg"), (S, 2))
    state = with_trust({"keys": keys})
    Checkpoints(tmp_path).save(50, state, {}, {})
    stored = read_with_orbax(next(tmp_path.glob("*-step-50")))["learners"]["trust"]["keys"]
    np.testing.assert_array_equal(stored, jax.random.key_data(keys))
    restored = Checkpoints(tmp_path).restore(state).state.learners.trust["keys"]
    assert restored.dtype == keys.dtype
    np.testing.assert_array_equal(jax.random.bits(restored[0, 1]), jax.random.bits(keys[0, 1]))
    other = with_trust({"keys": jax.random.split(jax.random.key(3), (S, 2))})
    with pytest.raises(UsageError, match=r"trust/keys is key<rbg>.* and key<fry>"):
        Checkpoints(tmp_path).restore(other)


def test_check_of_an_initial_state_leaves_nothing(tmp_path):
    Checkpoints(tmp_path).check_can_save(
        make_state(0), {"obs": np.zeros((2, 0)), "age": np.ones(2)}
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("leaf", ["abc", object(), np.array(["a"]), 2**70, b"x"])
def test_leaf_that_is_no_number_is_refused_with_its_path_and_type(monkeypatch, spec, leaf):
    monkeypatch.setattr(Named, "leaf", leaf)
    # Text and objects are found when the rule is checked, the others when the state is made.
    place = r"leaf trust/inner/1 of type .*; allowed are|returned \['inner'\]\[1\] = "
    with pytest.raises(UsageError, match=place) as caught:
        build(make("host", 60, "test_saved_states:Named"), spec).shapes()
    assert "\n" not in str(caught.value) and type(leaf).__name__ in str(caught.value)


def test_leaves_with_the_same_path_are_refused(tmp_path):
    state = with_trust({"a": {"b": jnp.zeros(S)}, "a/b": jnp.ones(S)})
    with pytest.raises(UsageError, match=r"two leaves with the path learners/trust/a/b"):
        Checkpoints(tmp_path).check_can_save(state, {})


def test_leaf_that_cannot_be_stored_is_named(tmp_path, monkeypatch):
    real = serialization._write_arrays

    def write(folder, arrays):
        if any(array.dtype == jnp.float8_e5m2 for array in arrays.values()):
            raise RuntimeError("no such type\nand many lines")
        real(folder, arrays)

    monkeypatch.setattr(serialization, "_write_arrays", write)
    state = with_trust({"a": jnp.zeros(S), "b": jnp.zeros(S, jnp.float8_e5m2)})
    expected = "the training state has a leaf learners/trust/b of type float8_e5m2"
    with pytest.raises(UsageError, match=re.escape(expected)) as caught:
        Checkpoints(tmp_path).check_can_save(state, {})
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_state_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serialization, "write", refuse)
    with pytest.raises(UsageError, match="cannot save a checkpoint"):
        dynajax.train(make("host", 60), tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_arrays_numbers_keys_and_none_are_allowed():
    tree = {"a": 1, "b": 2.0, "c": None, "d": jax.random.key(0), "e": np.float64(1), "f": [True]}
    assert check_leaves(tree, "the state") is tree
