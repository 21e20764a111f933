"""Test oracles: what they replace, that they change nothing else, and that they resume."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dynajax
from conftest import SMALL
from dynajax import envs, settings
from dynajax.diagnose import loaded_run
from dynajax.engines.oracle import Oracle, OracleProgram
from dynajax.runtime.program import build
from dynajax.types import Transition, UsageError

SIZES = SMALL | {
    "eval.every": 60,
    "eval.episodes": 1,
    "random_steps": 60,
    "model.fit_every": 60,
    "host.time_limit": 40,
    "replay.synthetic": 1600,
    "replay.real": 500,
}


def make(oracle="none", steps=120, **arguments):
    arguments = {"fixes": ["none", "scale"]} | arguments
    return settings.make(
        "Hopper-v4", preset="paper", settings=SIZES, oracle=oracle, steps=steps, **arguments
    )


def test_uncorrected_transitions_are_learned_from_as_without_an_oracle():
    config = make()
    spec = envs.spec("Hopper-v4")
    program = build(config, spec)
    oracle = OracleProgram(build(make("both"), spec))

    def data(t):
        rng = np.random.default_rng(t)
        obs, new = rng.normal(size=(2, 2, 11)).astype(np.float32)
        action = rng.uniform(-1, 1, (2, 3)).astype(np.float32)
        ones = np.ones(2, np.float32)
        return Transition(obs, action, ones, ones, new), np.ones(2, bool)

    plain = program.init()
    for t in range(60):
        plain = program.insert(plain, *data(t))
    plain, _ = program.fit(plain)
    corrected = jax.tree.map(jnp.copy, plain)
    for t in range(60, 63):
        plain, expected = program.learn(plain, *data(t))
        corrected, proposed = oracle.propose(corrected, *data(t))
        corrected, metrics = oracle.learn(corrected, proposed)
    # Two programs differ only in rounding, because XLA fuses them differently.
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(corrected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert expected["q_mean"] == pytest.approx(np.asarray(metrics["q_mean"]), rel=1e-4)


@pytest.mark.parametrize("which", ["reward", "state", "both"])
def test_oracle_replaces_its_part_by_that_of_the_simulator(which, tmp_path):
    config = make(which)
    assert dynajax.train(config, tmp_path / "run", quiet=True).finished
    reader = loaded_run.Reader(tmp_path / "run")
    assert reader.config.oracle == which
    loaded = reader.load(120)
    for index in range(2):
        learner = loaded.learner(index)
        data, valid = loaded_run.in_order(learner.real_buffer, loaded.inserted)
        found = loaded_run.episodes(data, valid, reader.spec.time_limit, loaded.host, index)
        rebuilt = loaded_run.rebuild(loaded, index, found, np.arange(len(valid)), data)
        assert rebuilt.differ == 0
        place_of = {data.obs[p].tobytes(): p for p in rebuilt.indices}
        env = envs.make("Hopper-v4")
        env.reset(seed=0)
        synthetic = learner.synthetic.unpack()
        slots = np.flatnonzero(learner.synthetic.valid)
        assert len(slots) > 400
        same = {"reward": 0, "state": 0}
        for slot in slots[:100]:
            t = Transition(*(x[slot] for x in synthetic))
            env.restore(rebuilt.states[place_of[t.obs.tobytes()]], steps=0)
            new, reward, terminated, *_ = env.step(t.action)
            same["reward"] += np.float32(reward) == t.reward
            same["state"] += loaded_run.same_bits(new, t.next_obs)
            if which != "reward":
                assert t.discount == 1 - terminated
        for part, count in same.items():
            assert count == (100 if which in (part, "both") else 0)


def test_resumed_run_with_an_oracle_is_bitwise_equal(tmp_path, traced):
    whole = dynajax.train(make("state", 180), tmp_path / "whole", quiet=True)
    names = "propose_transitions", "learn_corrected", "fit"
    assert [traced[name] for name in names] == [1, 1, 1]
    dynajax.train(make("state", 120), tmp_path / "parts", quiet=True)
    parts = dynajax.train(make("state", 180), tmp_path / "parts", quiet=True)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(parts.state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"algo": "model-free", "fixes": [""]}, "--algo=mbpo"),
        ({"engine": "mjx"}, "--engine=host"),
    ],
)
def test_impossible_oracles_are_refused_in_one_line(arguments, text):
    with pytest.raises(UsageError, match=text) as refused:
        make("reward", **arguments)
    assert "\n" not in str(refused.value) and "--oracle=reward" in str(refused.value)


def test_oracle_refuses_long_rollouts_and_unknown_parts():
    with pytest.raises(UsageError, match=r"rollout\.horizon=1"):
        settings.make("Hopper-v4", oracle="both", settings={"rollout.horizon": 3})
    with pytest.raises(UsageError, match="choose one of none, reward, state, both"):
        settings.make("Hopper-v4", oracle="next")


def test_complete_run_is_restored_with_fewer_steps():
    def restored(steps):
        with contextlib.closing(Oracle(make("state", steps, fixes=["none"]), [0])) as oracle:
            oracle.restore({"oracle.states": states, "oracle.count": np.array([5])})
            return oracle.progress()

    states = np.arange(10.0).reshape(1, 5, 2)
    for steps in (120, 3):
        np.testing.assert_array_equal(restored(steps)["oracle.states"], states)
