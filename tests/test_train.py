"""The jitted functions of a run: rows beside each other, and each compiled once."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dynajax.config import variant_config
from dynajax.mbpo import Algorithm
from dynajax.models import fit_data, training
from dynajax.profiling.hlo import replay_copies
from dynajax.runtime.program import build
from dynajax.types import Shared, Transition
from dynajax.xla import backend
from jaxprs import equations

D, A = 3, 2
INSERTS, LEARNS, FIT_EVERY = 60, 20, 10


@functools.cache
def one_step(seed, t):
    """A transition of the row with this seed: a line that the actions push along."""
    rng = np.random.default_rng((seed, t))
    obs, action = rng.normal(size=D), rng.uniform(-1, 1, A)
    new = 0.9 * obs + np.append(action, 0.1)
    return Transition(
        *(np.float32(x) for x in (obs, action, obs[0] - action[1], rng.random() > 0.1, new))
    )


def data_at(config, t):
    seeds = [config.seed + i % config.seeds for i in range(config.num_learners)]
    steps = [one_step(seed, t) for seed in seeds]
    return Transition(*map(np.stack, zip(*steps, strict=True))), np.full(len(seeds), t % 7 != 3)


def copy(tree):
    """Arrays of one's own, for a function that takes its state as a donation."""
    return jax.tree.map(jnp.array, tree)


def run(config, program, state):
    """The state and metrics after a scripted run of inserts, two fits and twenty learns."""
    return learn(config, program, fill(config, program, state))


def fill(config, program, state):
    for t in range(INSERTS):
        state = program.insert(state, *data_at(config, t))
    return state


def learn(config, program, state):
    for t in range(INSERTS, INSERTS + LEARNS):
        if config.has_model and (t - INSERTS) % FIT_EVERY == 0:
            state, _ = program.fit(state)
        state, metrics = program.learn(state, *data_at(config, t))
    return state, metrics


def row_of(tree, i):
    return jax.tree.map(lambda leaf: np.asarray(leaf[i]), tree)


def learned_part(row):
    """A row without its place among the variants."""
    return row._replace(config=None, variant=None)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4), a, b)


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


class Study:
    """Published MBPO's and FTFL's rows with two seeds each, in one program."""

    def __init__(self, make, spec):
        self.config = make(fixes=["none", "scale,target"], seeds=2, seed=3)
        self.program = build(self.config, spec)
        self.new = self.program.init()
        self.state, self.metrics = run(self.config, self.program, copy(self.new))


@pytest.fixture(scope="module")
def study(make, spec):
    return Study(make, spec)


@pytest.mark.parametrize(("index", "fix"), [(0, "none"), (1, "scale,target")])
def test_rows_together_equal_rows_alone(study, make, spec, index, fix):
    for seed in (3, 4):
        row = 2 * index + seed - 3
        config = make(fixes=[fix], seed=seed)
        program = build(config, spec)
        first = program.init()
        new, alone = (learned_part(r) for r in (row_of(study.new.rows, row), row_of(first.rows, 0)))
        assert equal(new.key, alone.key)
        assert_close(new, alone)
        state, metrics = run(config, program, first)
        assert_close(
            learned_part(row_of(study.state.learners, row)), learned_part(row_of(state.learners, 0))
        )
        assert_close(row_of(study.metrics, row), row_of(metrics, 0))
        assert equal(study.state.shared, state.shared)


def test_rows_differ(study):
    rows = study.state.learners
    for i in range(4):
        for j in range(i):
            a, b = row_of(rows, i), row_of(rows, j)
            assert not equal(a.agent.actor, b.agent.actor)
            assert not equal(a.model.params, b.model.params)
            # Seeds differ in everything, variants of a seed in what was learned alone.
            assert equal(a.seed_key, b.seed_key) == (i % 2 == j % 2)
            assert equal(a.real, b.real) == (i % 2 == j % 2)
    np.testing.assert_array_equal(rows.variant, [0, 0, 1, 1])
    np.testing.assert_array_equal(rows.model.code.skip[:, 0], [1, 1, 0, 0])
    assert (np.asarray(rows.model.code.scale)[:2] == 1).all()
    assert (np.asarray(rows.model.code.scale)[2:] != 1).all()


def test_everything_compiles_once(study):
    """In the order and with the types of `train`: numpy from the environment, a plain step."""
    config, program = study.config, study.program
    state = copy(study.new)
    obs = np.zeros((4, D), np.float32)
    program.act(state, obs, 0)
    state = program.insert(state, *data_at(config, 0))
    program.act(state, obs, 1)
    for t in range(2):
        state, _ = program.fit(state)
        state, _ = program.learn(state, *data_at(config, t))
        program.act(state, obs, t + 2)
        program.deterministic_action(state, np.zeros((4, 5, D), np.float32))
        state, _ = program.learn(state, *data_at(config, t))
        program.act(state, obs, t + 3)
    for name in ("act", "insert", "fit", "learn", "greedy"):
        assert getattr(program, name)._cache_size() == 1, name


@pytest.mark.parametrize("fresh", [False, True])
def test_no_ring_is_copied(make, spec, fresh):
    config = make({"replay.real": 1003, "replay.synthetic": 1200, "rollout.fresh": fresh})
    learn, _ = build(config, spec, jax.local_devices()[:1]).lower()
    jax.config.update("jax_disable_most_optimizations", False)
    copies = replay_copies(learn.compile().as_text(), {1003, 1200})
    jax.config.update("jax_disable_most_optimizations", True)
    assert copies == 0


def test_a_state_is_donated(study):
    config, program = study.config, study.program
    old = copy(study.new)
    state = program.insert(old, *data_at(config, 0))
    assert gone(old.rows.real_buffer)
    old, (state, _) = state, program.learn(state, *data_at(config, 0))
    assert gone((old.rows.real_buffer, old.rows.synthetic_buffer, old.rows.agent))
    old, (state, _) = state, program.fit(state)
    assert gone((old.rows.real_buffer, old.rows.synthetic_buffer, old.rows.model.params))


def test_nothing_waits_for_lapack(study):
    """A batched LAPACK call on a worker thread of jaxlib 0.10 waits for worker threads: with two
    cores and three rows of the preset `paper`, `init` never came back."""
    init = study.program.init
    state, data = study.new, data_at(study.config, 0)
    programs = [
        init.func.lower(*init.args),
        study.program.fit.lower(state),
        study.program.learn.lower(state, *data),
    ]
    assert "lapack" in jax.jit(jnp.linalg.qr).lower(jnp.eye(3)).as_text()
    for program in programs:
        assert "lapack" not in program.as_text()


def test_compiler_options_change_no_more_than_rounding(make, spec, monkeypatch):
    """Two hundred updates and two fits of networks that are wide enough to be treated apart."""
    settings = {
        "agent.hidden": (64, 64),
        "learn.utd": 10,
        "learn.batch": 64,
        "model.width": 64,
        "model.batch": 64,
        "agent.learning_rate": 1e-5,
        "model.learning_rate": 1e-5,
    }
    config = make(settings)
    begin = build(config, spec)
    start, states = fill(config, begin, begin.init()), []
    jax.config.update("jax_disable_most_optimizations", False)
    for options in (backend.options(), {}):
        monkeypatch.setattr(backend, "options", lambda options=options: options)
        program = build(config, spec)
        states.append(learn(config, program, copy(start))[0])
    jax.config.update("jax_disable_most_optimizations", True)
    new, plain = (state.learners for state in states)
    assert not equal(new.agent.critic, start.rows.agent.critic)
    for part in ("agent", "model"):
        pairs = [jax.tree.leaves(getattr(rows, part)) for rows in (new, plain)]
        for a, b in zip(*pairs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def gone(tree):
    return all(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def test_a_varied_field_changes_its_own_rows_only(make, spec):
    def study(discount):
        config = make(algo="model-free", vary={"learn.discount": [0.99, discount]})
        program = build(config, spec)
        return run(config, program, program.init())[0].rows

    first, second = study(0.9), study(0.5)
    np.testing.assert_allclose(first.config.learn.discount, [0.99, 0.9], rtol=1e-6)
    np.testing.assert_allclose(first.config.agent.polyak, [0.005, 0.005], rtol=1e-6)
    assert equal(learned_part(row_of(first, 0)), learned_part(row_of(second, 0)))
    for a, b in (
        (row_of(first, 1), row_of(second, 1)),
        (row_of(first, 0), row_of(first, 1)),
    ):
        assert not equal(a.agent.critic, b.agent.critic)
        assert equal(a.real, b.real) and equal(a.seed_key, b.seed_key)


def test_reset_draws_new_weights_and_keeps_data_and_model(study):
    before, first = study.state, study.new.rows.agent
    state = study.program.reset(copy(before))
    rows = state.learners
    for part in ("real", "synthetic", "model", "seed_key", "variant"):
        assert equal(getattr(rows, part), getattr(before.rows, part)), part
    assert equal(state.shared, before.shared)
    assert not (np.asarray(rows.key) == before.rows.key).all(-1).any()
    for i in range(4):
        kernel = rows.agent.actor["hidden_0"]["kernel"][i]
        assert not np.allclose(kernel, before.rows.agent.actor["hidden_0"]["kernel"][i])
        assert not np.allclose(kernel, first.actor["hidden_0"]["kernel"][i])
        # Orthogonal, as new weights are.
        np.testing.assert_allclose(kernel @ kernel.T, 2 * np.eye(D), atol=1e-5)
    assert equal(rows.agent.critic, rows.agent.target_critic)
    np.testing.assert_array_equal(rows.agent.log_temperature, np.zeros(4))
    for optimiser in rows.agent[4:7]:
        np.testing.assert_array_equal(optimiser[0].count, np.zeros(4))
    again = study.program.reset(copy(state)).rows.agent
    assert not equal(again.actor, rows.agent.actor)


def test_actions_are_uniform_at_first_and_the_policys_afterwards(study):
    config, program, state = study.config, study.program, study.new
    # So near to zero that a new policy's std is still e^-4.
    obs = 0.02 * np.random.default_rng(0).normal(size=(4, D)).astype(np.float32)
    uniform = np.stack([program.act(state, obs, t) for t in range(config.random_steps)])
    # Rows of one seed explore alike, so two of the four are samples of their own.
    assert stats.kstest(uniform[:, :2].ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(uniform[:, :2].reshape(-1, 4).T) - np.eye(4)).max() < 0.6
    other = program.act(state, obs + 1, 0)
    np.testing.assert_array_equal(uniform[0], other)
    # A new policy is narrow, about the greedy action.
    deterministic_action = program.deterministic_action(state, obs[:, None].repeat(5, 1))[:, 0]
    later = np.stack([program.act(state, obs, config.random_steps + t) for t in range(50)])
    assert np.abs(later.mean(0) - deterministic_action).max() < 0.1
    assert (later.std(0) > 0).all() and later.std() > 0
    assert uniform.std(0).min() > 4 * later.std(0).max()
    assert len(np.unique(later[:, 0, 0])) == 50


def test_plain_sac_has_no_model_and_learns_from_real_data(make, spec):
    config = make(algo="model-free", seeds=2)
    program = build(config, spec)
    state, metrics = run(config, program, program.init())
    assert state.learners.model is None and state.learners.synthetic_buffer is None
    assert config.real_batch == config.learn.batch == 20
    assert "synthetic_reward_mean" not in metrics
    assert all(np.isfinite(values).all() for values in metrics.values())
    np.testing.assert_array_equal(state.learners.agent.critic_optimiser[0].count, [2 * LEARNS] * 2)
    assert state.shared.step == INSERTS + LEARNS and state.shared.blocks == 0


def test_the_real_ring_holds_what_was_inserted(study):
    config, state = study.config, study.state
    count = INSERTS + LEARNS
    steps = [data_at(config, t) for t in range(count)]
    for name in Transition._fields:
        rows = np.stack([getattr(transition, name) for transition, _ in steps], 1)
        np.testing.assert_array_equal(
            getattr(state.learners.real_buffer.data, name)[:, :count], rows
        )
    np.testing.assert_array_equal(
        state.learners.real_buffer.valid[:, :count], np.stack([valid for _, valid in steps], 1)
    )
    assert not state.learners.real_buffer.valid[:, count:].any()


def products(function, *arguments):
    """How many products of a program are of rounded arrays, as a CPU makes them, and of others."""

    program = jax.make_jaxpr(function)(*arguments).jaxpr
    count = collections.Counter(equation.primitive.name for equation in equations(program))
    rounded = count["reduce_precision"] // 2
    return rounded, count["dot_general"] - rounded


@pytest.mark.parametrize("fresh", [True, False])
def test_a_lower_precision_is_of_updates_and_fit_steps_alone(make, spec, fresh):
    counts = {}
    for precision in ("float32", "bfloat16"):
        config = make({"precision": precision, "rollout.fresh": fresh}, fixes=["scale,auto"])
        algorithm = Algorithm(config, spec)
        row = algorithm.init(variant_config(config, config.variants[0]), jnp.array(0), jnp.array(0))
        shared, obs = Shared(jnp.array(60), jnp.array(0)), jnp.zeros(D)
        transition = jax.tree.map(jnp.asarray, one_step(0, 0))
        held = fit_data.split(row.config.model, row.real_buffer, row.key)
        counts[precision] = {
            "act": products(algorithm.act, row, obs, shared.step),
            "learn": products(algorithm.learn, row, shared, transition, True),
            "fit": products(algorithm.fit, row, shared),
            "end": products(training.end, row.config.model, row.model, held, 1),
        }
    for name, (rounded, plain) in counts["float32"].items():
        low, full = counts["bfloat16"][name]
        assert rounded == 0 and low + full == plain
        assert bool(low) == (name in ("learn", "fit"))
    # Neither are stored rollouts, nor what scores a fit.
    assert (counts["bfloat16"]["learn"][1] == 0) == fresh
    assert counts["bfloat16"]["fit"][1] == counts["bfloat16"]["end"][1]
