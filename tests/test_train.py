"""Test the jitted functions of a run: independence of learners, compilation, donation."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dynajax.agents import AGENTS
from dynajax.agents.sac import SAC
from dynajax.config import variant_config
from dynajax.mbpo import MBPO
from dynajax.models import fit_data, make_model, training
from dynajax.profiling.hlo import replay_copies
from dynajax.runtime.program import build
from dynajax.types import Shared, Transition
from dynajax.xla import backend
from jaxprs import equations

D, A = 3, 2
INSERTS, LEARNS, FIT_EVERY = 60, 20, 10


@functools.cache
def one_transition(seed, t):
    """Return a transition of a linear system, which depends on the seed and the step only."""
    rng = np.random.default_rng((seed, t))
    obs, action = rng.normal(size=D), rng.uniform(-1, 1, A)
    new = 0.9 * obs + np.append(action, 0.1)
    return Transition(
        *(np.float32(x) for x in (obs, action, obs[0] - action[1], rng.random() > 0.1, new))
    )


def data_at(config, t):
    """Return the transitions of all learners at step t, every seventh of them invalid."""
    seeds = [config.seed + i % config.seeds for i in range(config.num_learners)]
    steps = [one_transition(seed, t) for seed in seeds]
    return Transition(*map(np.stack, zip(*steps, strict=True))), np.full(len(seeds), t % 7 != 3)


def copy(tree):
    """Copy arrays, for a function to which they are donated."""
    return jax.tree.map(jnp.array, tree)


def run(config, program, state):
    """Return state and metrics after 60 insertions, two fits and twenty steps that learn."""
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


def learner_of(tree, i):
    return jax.tree.map(lambda leaf: np.asarray(leaf[i]), tree)


def learned_part(learner):
    """Return a learner without its variant, which is the index among those of the run."""
    return learner._replace(config=None, variant=None)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4), a, b)


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


class Study:
    """Two variants with two seeds each, in one program."""

    def __init__(self, make, spec):
        self.config = make(fixes=["none", "scale,target"], seeds=2, seed=3)
        self.program = build(self.config, spec)
        self.new = self.program.init()
        self.state, self.metrics = run(self.config, self.program, copy(self.new))


@pytest.fixture(scope="module")
def study(make, spec):
    return Study(make, spec)


@pytest.mark.parametrize(("index", "fix"), [(0, "none"), (1, "scale,target")])
def test_learners_together_equal_each_alone(study, make, spec, index, fix):
    for seed in (3, 4):
        i = 2 * index + seed - 3
        config = make(fixes=[fix], seed=seed)
        program = build(config, spec)
        first = program.init()
        together = learned_part(learner_of(study.new.learners, i))
        alone = learned_part(learner_of(first.learners, 0))
        assert equal(together.key, alone.key)
        assert_close(together, alone)
        state, metrics = run(config, program, first)
        together = learned_part(learner_of(study.state.learners, i))
        assert_close(together, learned_part(learner_of(state.learners, 0)))
        assert_close(learner_of(study.metrics, i), learner_of(metrics, 0))
        assert equal(study.state.shared, state.shared)


def test_learners_differ(study):
    learners = study.state.learners
    for i in range(4):
        for j in range(i):
            a, b = learner_of(learners, i), learner_of(learners, j)
            assert not equal(a.agent.actor, b.agent.actor)
            assert not equal(a.model.params, b.model.params)
            # Seeds differ in everything, variants of a seed only in what was learned.
            assert equal(a.seed_key, b.seed_key) == (i % 2 == j % 2)
            assert equal(a.real_buffer, b.real_buffer) == (i % 2 == j % 2)
    np.testing.assert_array_equal(learners.variant, [0, 0, 1, 1])
    transform = learners.model.stats.transform
    np.testing.assert_array_equal(transform.skip[:, 0], [1, 1, 0, 0])
    assert (np.asarray(transform.scale)[:2] == 1).all()
    assert (np.asarray(transform.scale)[2:] != 1).all()


def test_program_is_kept_until_a_plugin_is_registered_again(make, spec, monkeypatch):
    program = build(make(), spec)
    assert build(make(steps=200, seed=7), spec).jitted is program.jitted
    monkeypatch.setitem(AGENTS, "sac", type("OtherAgent", (SAC,), {}))
    assert build(make(), spec).jitted is not program.jitted


def test_each_function_compiles_once(study):
    """The order and the types are those of `train`: NumPy arrays, and a Python step."""
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
    for name in ("act", "insert", "learn", "deterministic_action"):
        assert getattr(program, name)._cache_size() == 1, name
    assert program.fit.jitted._cache_size() == 1


@pytest.fixture
def optimized(optimised, new_programs):
    """Compile with XLA's optimizations, and nothing that another test has compiled without."""


@pytest.mark.parametrize("source", ["buffered", "on_the_fly"])
def test_no_replay_buffer_is_copied(make, spec, optimized, source):
    config = make({"replay.real": 1003, "replay.synthetic": 1200, "rollout.source": source})
    learn, _ = build(config, spec, jax.local_devices()[:1]).lower()
    assert replay_copies(learn.compile().as_text(), {1003, 1200}) == 0


def is_deleted(tree):
    return all(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def test_states_are_donated(study):
    config, program = study.config, study.program
    old = copy(study.new)
    state = program.insert(old, *data_at(config, 0))
    assert is_deleted(old.learners.real_buffer)
    old, (state, _) = state, program.learn(state, *data_at(config, 0))
    assert is_deleted((old.learners.real_buffer, old.learners.synthetic, old.learners.agent))
    # A fit can be interrupted, so it takes no donation; it copies no buffer either.
    old, (state, _) = state, program.fit(state)
    assert not is_deleted(old)
    assert state.learners.real_buffer is old.learners.real_buffer
    assert state.learners.synthetic is old.learners.synthetic


def test_programs_do_not_call_lapack(study):
    """A batched LAPACK call on a worker thread of jaxlib 0.10 waits for worker threads: with two
    cores and three learners of the preset `paper`, `init` never returned."""
    init = study.program.jitted.init
    state, data = study.new, data_at(study.config, 0)
    programs = [
        init.lower(*study.program._init_arguments()),
        study.program.fit.lower(state),
        study.program.learn.lower(state, *data),
    ]
    assert "lapack" in jax.jit(jnp.linalg.qr).lower(jnp.eye(3)).as_text()
    for program in programs:
        assert "lapack" not in program.as_text()


def test_compiler_options_change_only_rounding(make, spec, monkeypatch, optimized, new_programs):
    """Two hundred updates and two fits of networks so wide that the options affect them."""
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
    program = build(config, spec)
    start, states = fill(config, program, program.init()), []
    every = frozenset(
        name for function in ("init", "act", "fit") for name in backend.options(function)
    )
    assert len(every) >= 3
    for unknown in (frozenset(), every):
        monkeypatch.setattr(backend, "_unknown_options", lambda unknown=unknown: unknown)
        new_programs()
        program = build(config, spec)
        states.append(learn(config, program, copy(start))[0])
    with_options, without = (state.learners for state in states)
    assert not equal(with_options.agent.critic, start.learners.agent.critic)
    for part in ("agent", "model"):
        pairs = [jax.tree.leaves(getattr(learners, part)) for learners in (with_options, without)]
        for a, b in zip(*pairs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_varied_field_affects_only_its_own_learners(make, spec):
    def trained(discount):
        config = make(algo="model-free", vary={"learn.discount": [0.99, discount]})
        program = build(config, spec)
        return run(config, program, program.init())[0].learners

    first, second = trained(0.9), trained(0.5)
    np.testing.assert_allclose(first.config.learn.discount, [0.99, 0.9], rtol=1e-6)
    np.testing.assert_allclose(first.config.agent.polyak, [0.005, 0.005], rtol=1e-6)
    assert equal(learned_part(learner_of(first, 0)), learned_part(learner_of(second, 0)))
    for a, b in (
        (learner_of(first, 1), learner_of(second, 1)),
        (learner_of(first, 0), learner_of(first, 1)),
    ):
        assert not equal(a.agent.critic, b.agent.critic)
        assert equal(a.real_buffer, b.real_buffer) and equal(a.seed_key, b.seed_key)


def test_reset_initializes_the_agent_and_keeps_data_and_model(study):
    before, first = study.state, study.new.learners.agent
    state = study.program.reset(copy(before))
    learners = state.learners
    for part in ("real_buffer", "synthetic", "model", "seed_key", "variant"):
        assert equal(getattr(learners, part), getattr(before.learners, part)), part
    assert equal(state.shared, before.shared)
    assert not (np.asarray(learners.key) == before.learners.key).all(-1).any()
    for i in range(4):
        kernel = learners.agent.actor["hidden_0"]["kernel"][i]
        assert not np.allclose(kernel, before.learners.agent.actor["hidden_0"]["kernel"][i])
        assert not np.allclose(kernel, first.actor["hidden_0"]["kernel"][i])
        # Orthogonal, like all initial weights.
        np.testing.assert_allclose(kernel @ kernel.T, 2 * np.eye(D), atol=1e-5)
    assert equal(learners.agent.critic, learners.agent.target_critic)
    np.testing.assert_array_equal(learners.agent.log_temperature, np.zeros(4))
    for opt_state in learners.agent[4:7]:
        np.testing.assert_array_equal(opt_state[0].count, np.zeros(4))
    again = study.program.reset(copy(state)).learners.agent
    assert not equal(again.actor, learners.agent.actor)


def test_actions_are_uniform_at_first_and_then_those_of_the_policy(study):
    config, program, state = study.config, study.program, study.new
    # Observations near zero, for which the std of a new policy is still e^-4.
    obs = 0.02 * np.random.default_rng(0).normal(size=(4, D)).astype(np.float32)
    uniform = np.stack([program.act(state, obs, t) for t in range(config.random_steps)])
    # Variants of a seed explore equally, so only two of the four learners are independent.
    assert stats.kstest(uniform[:, :2].ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(uniform[:, :2].reshape(-1, 4).T) - np.eye(4)).max() < 0.6
    other = program.act(state, obs + 1, 0)
    np.testing.assert_array_equal(uniform[0], other)
    # A new policy is narrow, around the deterministic action.
    deterministic_action = program.deterministic_action(state, obs[:, None].repeat(5, 1))[:, 0]
    later = np.stack([program.act(state, obs, config.random_steps + t) for t in range(50)])
    assert np.abs(later.mean(0) - deterministic_action).max() < 0.1
    assert (later.std(0) > 0).all() and later.std() > 0
    assert uniform.std(0).min() > 4 * later.std(0).max()
    assert len(np.unique(later[:, 0, 0])) == 50


def test_model_free_learner_has_no_model_and_learns_from_real_data(make, spec):
    config = make(algo="model-free", seeds=2)
    program = build(config, spec)
    state, metrics = run(config, program, program.init())
    assert state.learners.model is None and state.learners.synthetic is None
    assert config.real_batch == config.learn.batch == 20
    assert "synthetic_reward_mean" not in metrics
    assert all(np.isfinite(values).all() for values in metrics.values())
    np.testing.assert_array_equal(state.learners.agent.critic_opt_state[0].count, [2 * LEARNS] * 2)
    assert state.shared.step == INSERTS + LEARNS and state.shared.blocks == 0


def test_real_buffer_contains_what_was_inserted(study):
    config, state = study.config, study.state
    count = INSERTS + LEARNS
    buffer = state.learners.real_buffer
    steps = [data_at(config, t) for t in range(count)]
    for name in Transition._fields:
        expected = np.stack([getattr(transition, name) for transition, _ in steps], 1)
        np.testing.assert_array_equal(getattr(buffer.unpack(), name)[:, :count], expected)
    expected = np.stack([valid for _, valid in steps], 1)
    np.testing.assert_array_equal(buffer.valid[:, :count], expected)
    assert not buffer.valid[:, count:].any()


def count_matmuls(function, *arguments):
    """Return how many matmuls of a program have rounded operands, as on a CPU, and how many not."""
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    count = collections.Counter(equation.primitive.name for equation in equations(program))
    rounded = count["reduce_precision"] // 2
    return rounded, count["dot_general"] - rounded


@pytest.mark.parametrize("source", ["on_the_fly", "buffered"])
def test_bfloat16_applies_to_updates_and_fit_steps_only(make, spec, source):
    counts = {}
    for precision in ("float32", "bfloat16"):
        config = make({"precision": precision, "rollout.source": source}, fixes=["scale,auto"])
        algorithm = MBPO(config, spec)
        config = variant_config(config, config.variants[0])
        learner = algorithm.init(config, jnp.array(0), jnp.array(0))
        shared, obs = Shared(jnp.array(60), jnp.array(0)), jnp.zeros(D)
        transition = jax.tree.map(jnp.asarray, one_transition(0, 0))
        data = fit_data.split(config.model, learner.real_buffer, learner.key)
        dynamics = make_model(config.model, spec)
        counts[precision] = {
            "act": count_matmuls(algorithm.act, learner, obs, shared.step),
            "learn": count_matmuls(algorithm.learn, learner, shared, transition, jnp.array(True)),
            "fit": count_matmuls(algorithm.fit, learner, shared),
            "finish": count_matmuls(
                functools.partial(training.finish, dynamics), learner.model, data, 1
            ),
        }
    for name, (rounded, full) in counts["float32"].items():
        low, high = counts["bfloat16"][name]
        assert rounded == 0 and low + high == full
        assert bool(low) == (name in ("learn", "fit"))
    # Neither buffered rollouts nor the evaluation of a fit are rounded.
    assert (counts["bfloat16"]["learn"][1] == 0) == (source == "on_the_fly")
    assert counts["bfloat16"]["fit"][1] == counts["bfloat16"]["finish"][1]
