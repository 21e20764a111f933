"""Sources of synthetic data: where rollouts start, regenerated buffers, and algorithms that use them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dynajax
from conftest import SMALL
from dynajax import UsageError, replay
from dynajax.mbpo import MBPO
from dynajax.models import MODELS
from dynajax.replay import Request
from dynajax.synthetic import SOURCES, Source, UpdateInputs
from dynajax.types import Shared, Transition


def shared(step, blocks=0):
    return Shared(jnp.array(step, jnp.int32), jnp.array(blocks, jnp.int32))


def numbered(numbers):
    """Return transitions whose observation is (number, 0, 0), so that none terminates."""
    first = jnp.asarray(numbers, jnp.float32)
    obs = jnp.stack([first, 0 * first, 0 * first], -1)
    zeros = jnp.zeros((*first.shape, 2))
    return Transition(obs, zeros, 0 * first, jnp.ones_like(first), obs)


# --- Where rollouts start -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 12, 20, 33, 47])
def test_window_of_the_newest_valid_transitions(count):
    """Sample every valid one of the newest 7 slots and no other, also after the ring has wrapped."""
    capacity, window = 20, 7
    buffer = replay.init(capacity, 3, 2)
    for number in range(count):
        block = replay.pack(numbered([number]), jnp.array([number % 3 > 0]))
        buffer = replay.insert(buffer, block, jnp.array(number))
    request = Request(jax.random.PRNGKey(0), (400,))
    (slots,) = replay.sample_indices(buffer, jnp.array(count), [request], window=window)
    found = replay.gather(buffer, slots)
    newest = range(max(0, count - window), count)
    assert set(np.asarray(found.unpack().obs[:, 0])) == {n for n in newest if n % 3 > 0}
    assert found.valid.all()


@pytest.mark.parametrize("source", ["buffered", "on_the_fly"])
def test_rollouts_start_in_the_window_and_minibatches_come_from_everywhere(make, spec, source):
    settings = {
        "rollout.source": source,
        "rollout.start_window": 10,
        "rollout.batch": 400,
        "replay.synthetic": 400,
        "rollout.real_fraction": 0.5,
        "learn.batch": 40,
        "learn.utd": 20,
    }
    config = make(settings)
    algorithm = MBPO(config, spec)
    learner = jax.jit(algorithm.init)(config, jnp.array(0), jnp.array(0))
    # 150 transitions in a buffer of 120 slots, so the oldest slot is number 30.
    numbers = np.arange(120) + 120 * (np.arange(120) < 30)
    buffer = replay.of_transitions(numbered(-numbers), jnp.ones(120, bool))
    learner = learner._replace(real_buffer=buffer)

    @jax.jit
    def prepare(learner):
        source = algorithm.source(learner)
        keys = algorithm._split_keys(learner, source)
        real, starts = algorithm._sample_real(learner, shared(149), source, keys)
        return real.unpack().obs[..., 0], buffer.unpack().obs[starts, 0]

    real, starts = prepare(learner)
    assert set(-np.asarray(starts).ravel()) == set(range(140, 150))
    assert len(set(-np.asarray(real).ravel()) - set(range(140, 150))) > 80


# --- Buffers that are cleared and refilled --------------------------------------------------------


def test_buffer_is_cleared_and_refilled_at_the_right_steps(make, spec):
    """Refill at the first learning step and every 3rd one after it; the horizon shrinks."""
    settings = {
        "source.regenerate_every": 3,
        "rollout.horizon": (49, 58, 4, 1),
        "rollout.mixing": "separate",
        "rollout.random_action_fraction": 1.0,
    }
    config = make(settings)
    algorithm, size = MBPO(config, spec), config.rollout.batch

    @jax.jit
    def prepare(learner, shared):
        source = algorithm.source(learner)
        keys = algorithm._split_keys(learner, source)
        real, starts = algorithm._sample_real(learner, shared, source, keys)
        env = algorithm.model_env(learner)
        learner, inputs, metrics = source.prepare(learner, shared, env, real, starts, keys.source)
        return learner._replace(key=keys.next), source.blocks_after(shared), inputs, metrics

    learner = jax.jit(algorithm.init)(config, jnp.array(0), jnp.array(0))
    real = replay.of_transitions(numbered(np.arange(-120, 0) / 100), jnp.ones(120, bool))
    learner = learner._replace(real_buffer=real)
    blocks, old = 0, np.asarray(learner.synthetic.packed)
    # An agent step that learns has inserted `step` transitions before, from random_steps - 1 on.
    for index, step in enumerate(range(49, 62)):
        length = 4 - min(step - 49, 9) * 3 // 9
        learner, after, inputs, metrics = prepare(learner, shared(step, blocks))
        new, valid = np.asarray(learner.synthetic.packed), np.asarray(learner.synthetic.valid)
        if index % 3 == 0:
            assert (new[: length * size] != old[: length * size]).any(-1).all()
            np.testing.assert_array_equal(valid, np.arange(len(valid)) < length * size)
            assert int(after) == length
        else:
            np.testing.assert_array_equal(new, old)
            assert int(after) == blocks
        assert float(metrics["valid_fraction"]) == 1
        # No minibatch has a transition that was cleared.
        kept = {row.tobytes() for row in new[valid]}
        sampled = np.asarray(inputs.synthetic.packed)
        assert np.asarray(inputs.synthetic.valid).all()
        assert {row.tobytes() for row in sampled.reshape(-1, sampled.shape[-1])} <= kept
        blocks, old = int(after), new
    # The horizon has shrunk, so slots of earlier rollouts were cleared.
    assert blocks == 1


def test_metrics_of_a_regenerated_buffer_are_those_of_its_transitions(make, spec):
    settings = {"source.regenerate_every": 3, "rollout.horizon": (0, 9, 2, 3), "rollout.batch": 4}
    config = make(settings | {"replay.synthetic": 16}, trust="uncertainty_weight")
    algorithm = MBPO(config, spec)
    learner = jax.jit(algorithm.init)(config, jnp.array(0), jnp.array(0))
    source = algorithm.source(learner)
    # Two of three steps were made; a rollout has ended after the first, and a slot is not valid.
    valid = jnp.array([1, 1, 1, 1, 1, 0, 1, 1] + 8 * [0], bool)
    weight = jnp.where(valid, jnp.arange(16) / 8.0, 9.0)
    buffer = dataclasses.replace(learner.synthetic, valid=valid, weight=weight)
    metrics = source._metrics_of_buffer(buffer, jnp.array(2))
    assert float(metrics["valid_fraction"]) == 7 / 8
    assert [float(metrics[f"accepted_fraction_{h}"]) for h in (1, 2, 3)] == [1, 0.75, 0]
    np.testing.assert_allclose(metrics["weight"], (0 + 1 + 2 + 3 + 4 + 6 + 7) / 8 / 7)


def test_both_engines_refill_the_buffer_at_the_same_steps(tmp_path):
    """End after the refill at learning step 8, and before the one at 12."""
    valid, blocks = {}, {}
    for engine in ("host", "mjx"):
        config = dynajax.make_config(
            "pendulum-swingup",
            preset="paper",
            engine=engine,
            settings=SMALL
            | {"source.regenerate_every": 4, "rollout.horizon": (49, 57, 4, 1)}
            | {"eval.every": 61, "eval.episodes": 1, "host.time_limit": 30},
            steps=61,
        )
        learners = dynajax.train(config, tmp_path / engine, quiet=True).state
        valid[engine] = np.asarray(learners.learners.synthetic.valid[0])
        blocks[engine] = int(learners.shared.blocks)
    np.testing.assert_array_equal(valid["host"], np.arange(64) < 8)
    np.testing.assert_array_equal(valid["host"], valid["mjx"])
    assert blocks == {"host": 1, "mjx": 1}


def test_oracle_does_not_regenerate():
    with pytest.raises(UsageError, match=r"^--oracle=state: .*source.regenerate_every=5 .*=0$"):
        dynajax.make_config(
            "pendulum-swingup", oracle="state", settings={"source.regenerate_every": 5}
        )


# --- Algorithms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["host", "mjx"])
@pytest.mark.parametrize("algo", ["wimle", "mad-td", "mve"])
def test_algorithms_train_on_both_engines(tmp_path, algo, engine):
    config = dynajax.make_config(
        "Pendulum-v1" if engine == "host" else "pendulum-swingup",
        algo=algo,
        preset="paper",
        engine=engine,
        settings=SMALL | {"eval.every": 60, "eval.episodes": 1},
        steps=60,
    )
    result = dynajax.train(config, tmp_path / "run", quiet=True)
    learners = result.state.learners
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(learners.agent))
    assert int(learners.model.num_fits[0]) == 1
    if algo == "wimle":
        assert (
            np.asarray(learners.synthetic.weight)[np.asarray(learners.synthetic.valid)] < 1
        ).all()
        assert learners.synthetic.valid.sum() == config.rollout.batch
    else:
        assert learners.synthetic is None
    entry = dynajax.read_run(result.folder)
    assert np.isfinite(entry.evals[config.variants[0].name]).all()


def test_model_free_has_no_source():
    with pytest.raises(UsageError) as error:
        dynajax.make_config(
            "pendulum-swingup", algo="model-free", settings={"rollout.source": "buffered"}
        )
    text = "--set rollout.source=buffered: without a model there is no synthetic data; choose "
    assert str(error.value) == text + "--algo=mbpo"


@pytest.mark.parametrize("mixing", ["mixed", "separate"])
def test_source_that_returns_synthetic_transitions_is_learned_from(mixing):
    """Use `UpdateInputs.synthetic` in the base class, whatever `rollout.mixing` says."""
    config = dynajax.make_config("Pendulum-v1", settings={"rollout.mixing": mixing})
    source = Source(config, None, None)
    real, synthetic = (
        replay.pack(
            Transition(*(jnp.full((n, *shape), x) for shape in ((3,), (1,), (), (), (3,)))),
            jnp.ones(n, bool),
        )
        for n, x in ((2, 1.0), (4, 5.0))
    )
    _, batches, _ = source.minibatches(None, None, UpdateInputs(real, synthetic))
    rewards = [batch.data.reward.tolist() for batch in batches]
    expected = [[1.0] * 2, [5.0] * 4]
    assert rewards == (expected if mixing == "separate" else [expected[0] + expected[1]])


def test_subclass_of_buffered_has_its_number_of_rollouts(monkeypatch):
    monkeypatch.setitem(SOURCES, "mine", type("Mine", (SOURCES["buffered"],), {}))
    settings = {"rollout.horizon": 5}
    sizes = [
        dynajax.make_config(
            "Pendulum-v1", algo="infoprop", settings=settings | {"rollout.source": name}
        ).num_parallel_rollouts
        for name in ("buffered", "mine")
    ]
    assert sizes[0] == sizes[1] == 200


def test_model_without_a_reward_method_is_refused_in_one_line(monkeypatch):
    base = dynajax.DynamicsModel
    methods = dict.fromkeys(base.__abstractmethods__, lambda self, *arguments: None)
    mine = types.new_class("Mine", (base,), exec_body=lambda body: body.update(methods))
    monkeypatch.setitem(MODELS, "mine", mine)
    with pytest.raises(UsageError, match=r"^--set model.reward_from=next_state: .*predict_reward"):
        dynajax.make_config(
            "Pendulum-v1", algo="dynajax", fixes="none", settings={"model.network": "mine"}
        )
