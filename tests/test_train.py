"""The jitted functions of a run: rows beside each other, and each compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dynajax.train import build
from dynajax.types import Transition

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
    seeds = [config.seed + i % config.seeds for i in range(config.rows)]
    steps = [one_step(seed, t) for seed in seeds]
    return Transition(*map(np.stack, zip(*steps, strict=True))), np.full(len(seeds), t % 7 != 3)


def run(config, spec, program=None):
    """The state and metrics after a scripted run of inserts, two fits and twenty learns."""
    program = program or build(config, spec)
    state = program.init()
    for t in range(INSERTS + LEARNS):
        state, metrics = one_turn(program, state, config, t)
    return state, metrics


def one_turn(program, state, config, t):
    obs = np.full((config.rows, D), 0.1, np.float32)
    program.act(state, obs, t)
    if t < INSERTS:
        return program.insert(state, *data_at(config, t)), {}
    if config.algo == "mbpo" and (t - INSERTS) % FIT_EVERY == 0:
        state, _ = program.fit(state)
    if t % 10 == 5:
        program.greedy(state, np.zeros((config.rows, 4, D), np.float32))
    return program.learn(state, *data_at(config, t))


def row_of(tree, i):
    return jax.tree.map(lambda leaf: np.asarray(leaf[i]), tree)


def what_counts(row):
    """A row without its configuration, whose static part names all variants."""
    return row._replace(config=None, variant=None)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4), a, b)


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


@pytest.fixture(scope="module")
def study(make, spec):
    """Published MBPO's and FTFL's rows with two seeds each, in one program."""
    config = make(fixes=["none", "scale,target"], seeds=2, seed=3)
    program = build(config, spec)
    return config, program, *run(config, spec, program)


@pytest.mark.parametrize(("index", "fix"), [(0, "none"), (1, "scale,target")])
def test_rows_together_equal_rows_alone(study, make, spec, index, fix):
    _, _, state, metrics = study
    config = make(fixes=[fix], seed=3)
    program = build(config, spec)
    for i in range(2):
        # The same program with another seed: it is compiled once for both.
        alone, alone_metrics = run_seed(config, spec, program, 3 + i)
        row = 2 * index + i
        assert_close(
            what_counts(row_of(state.rows, row)), what_counts(row_of(alone.rows, 0))
        )
        assert_close(row_of(metrics, row), row_of(alone_metrics, 0))
        assert state.shared == alone.shared


def run_seed(config, spec, program, seed):
    """The run of one row, its program being that of another seed."""
    other = config if seed == config.seed else config.__class__(**{**vars(config), "seed": seed})
    first = build(other, spec).init()
    return run(other, spec, program._replace(init=lambda: first))


def test_rows_differ(study):
    _, _, state, _ = study
    rows = state.rows
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


def test_new_rows_come_from_their_seed_alone(study, make, spec):
    config, program, _, _ = study
    together = program.init().rows
    for i, seed in enumerate([3, 4, 3, 4]):
        alone = build(make(seed=seed), spec).init().rows
        assert equal(what_counts(row_of(together, i)), what_counts(row_of(alone, 0)))
    assert not equal(row_of(together.agent, 0), row_of(together.agent, 1))
    assert not equal(row_of(together.model.params, 0), row_of(together.model.params, 1))
    assert not equal(together.key[0], together.seed_key[0])


def test_everything_compiles_once(study):
    _, program, _, _ = study
    for name in ("act", "insert", "fit", "learn", "greedy"):
        assert getattr(program, name)._cache_size() == 1, name


def test_a_state_is_donated(study, make, spec):
    config, program, _, _ = study
    state = program.init()
    for function in (program.insert, program.learn):
        old = state
        state = function(old, *data_at(config, 0))
        state = state[0] if function is program.learn else state
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.rows.real, old.rows.agent)))
    old = state
    state, _ = program.fit(old)
    rings = (old.rows.real, old.rows.synthetic, old.rows.model.params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(rings))


def test_a_varied_field_changes_its_own_rows_only(make, spec):
    def rows(discount):
        config = make({"sac.utd": 1}, vary={"sac.discount": [0.99, discount]})
        return run(config, spec)[0].rows

    first, second = rows(0.9), rows(0.5)
    np.testing.assert_allclose(first.config.sac.discount, [0.99, 0.9], rtol=1e-6)
    np.testing.assert_allclose(first.config.sac.polyak, [0.005, 0.005], rtol=1e-6)
    assert equal(what_counts(row_of(first, 0)), what_counts(row_of(second, 0)))
    for i, j in ((first, second), (first, first)):
        a, b = row_of(i, 1), row_of(j, 1 if i is not j else 0)
        assert not equal(a.agent.critic, b.agent.critic)
        assert equal(a.real, b.real) and equal(a.seed_key, b.seed_key)


def test_reset_draws_new_weights_and_keeps_data_and_model(study, make, spec):
    config, program, _, _ = study
    state, _ = one_turn(program, run(config, spec, program)[0], config, INSERTS + LEARNS)
    before = jax.tree.map(np.array, state)
    first = jax.tree.map(np.array, program.init().rows.agent)
    state = program.reset_agent(state)
    rows = state.rows
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
    for optimiser in rows.agent[4:]:
        np.testing.assert_array_equal(optimiser.count, np.zeros(4))
    again = program.reset_agent(jax.tree.map(jnp.array, state)).rows.agent
    assert not equal(again.actor, rows.agent.actor)


def test_actions_are_uniform_at_first_and_the_policys_afterwards(study):
    config, program, _, _ = study
    state = program.init()
    obs = np.random.default_rng(0).normal(size=(4, D)).astype(np.float32)
    uniform = np.stack([program.act(state, obs, t) for t in range(config.random_steps)])
    # Rows of one seed explore alike, so two of the four are samples of their own.
    assert stats.kstest(uniform[:, :2].ravel(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(uniform[:, :2].reshape(-1, 4).T) - np.eye(4)).max() < 0.6
    other = program.act(state, obs + 1, 0)
    np.testing.assert_array_equal(uniform[0], other)
    # A new policy is narrow, about the greedy action.
    greedy = program.greedy(state, obs[:, None].repeat(4, 1))[:, 0]
    later = np.stack([program.act(state, obs, config.random_steps + t) for t in range(50)])
    assert np.abs(later.mean(0) - greedy).max() < 0.1
    assert (later.std(0) > 0).all() and later.std() > 0
    assert uniform.std(0).min() > 4 * later.std(0).max()
    assert len(np.unique(later[:, 0, 0])) == 50


def test_plain_sac_has_no_model_and_learns_from_real_data(make, spec):
    config = make(algo="sac", seeds=2)
    program = build(config, spec)
    state, metrics = run(config, spec, program)
    assert state.rows.model is None and state.rows.synthetic is None
    assert config.real_batch == config.sac.batch == 20
    assert "synthetic_reward_mean" not in metrics
    assert all(np.isfinite(values).all() for values in metrics.values())
    np.testing.assert_array_equal(state.rows.agent.critic_optimiser.count, [2 * LEARNS] * 2)
    assert state.shared.step == INSERTS + LEARNS and state.shared.blocks == 0
    assert not equal(state.rows.agent.actor, build(config, spec).init().rows.agent.actor)


def test_the_real_ring_holds_what_was_given(study):
    config, _, state, _ = study
    count = INSERTS + LEARNS
    given = [data_at(config, t) for t in range(count)]
    for name in Transition._fields:
        rows = np.stack([getattr(transition, name) for transition, _ in given], 1)
        np.testing.assert_array_equal(getattr(state.rows.real.data, name)[:, :count], rows)
    np.testing.assert_array_equal(
        state.rows.real.valid[:, :count], np.stack([valid for _, valid in given], 1)
    )
    assert not state.rows.real.valid[:, count:].any()
