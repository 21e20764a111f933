"""Rollouts: how long, in which member, and which of their transitions may be used."""

import dataclasses
import fractions
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import replay, settings, trust
from dynajax.agents import make_agent
from dynajax.agents.sac import td_target
from dynajax.mbpo import Algorithm
from dynajax.models import ensemble, rollouts
from dynajax.runtime.program import build
from dynajax.types import Minibatch, Shared, Transition

B = 8  # starts


@functools.partial(jax.jit, static_argnums=(1, 2))
def model_step(config, spec, agent, state, model, obs, key):
    """One step in the model by the agent's policy, with no rule of trust."""
    policy, rule = functools.partial(agent.act, state), trust.TrustRule(None, spec, len(obs))
    asked = rollouts.asked(rule, model)
    alive = jnp.ones(len(obs), bool)
    return rollouts.model_step(config, spec, rule, policy, asked, None, obs, alive, 0, 1, key)[1]


def shared(step=0, blocks=0):
    return Shared(jnp.array(step, jnp.int32), jnp.array(blocks, jnp.int32))


def counter(x, *others):
    return jnp.stack([jnp.asarray(x, jnp.float32), *others], -1)


@pytest.fixture(scope="module")
def row(make, spec):
    """A row whose real ring is full: x counts 0, 1, 2, ... and y names the transition."""
    config = make({"rollout.horizon": 3})
    row = jax.jit(Algorithm(config, spec).init)(config, jnp.array(0), jnp.array(0))
    names = jnp.arange(120.0)
    obs = counter(jnp.zeros(120), names, jnp.zeros(120))
    real = replay.pack(row.real_buffer.data._replace(obs=obs), jnp.ones(120, bool))
    return row._replace(real=real)


# --- length ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "length"), [(0, 1), (20, 1), (39, 1), (40, 2), (60, 3), (99, 4), (100, 5), (900, 5)]
)
def test_horizon_grows_between_two_steps(make, step, length):
    config = make({"rollout.horizon": "20,100,1,5"})
    assert rollouts.horizon(config, jnp.array(step)) == length


@pytest.mark.parametrize("schedule", [(0, 49, 1, 50), (20, 80, 5, 1), (20000, 150000, 1, 15)])
def test_a_horizon_changes_at_whole_steps(make, schedule):
    """Where float32's share of the way would be late or early."""
    start, stop, first, last = schedule
    config = make({"rollout.horizon": schedule, "replay.synthetic": 400})
    for step in range(start, stop + 1, max(1, (stop - start) // 1000)):
        exact = first + math.floor(
            fractions.Fraction((step - start) * (last - first), stop - start)
        )
        assert rollouts.horizon(config, jnp.array(step)) == exact


def test_a_constant_horizon_is_a_plain_number(make):
    assert rollouts.horizon(make({"rollout.horizon": 3}), jnp.array(7)) == 3
    assert type(rollouts.horizon(make(), jnp.array(7))) is int


def test_thirteen_of_256_are_real_on_paper(make):
    assert make({"learn.batch": 256}).real_batch == 13
    assert make({"learn.batch": 256, "rollout.real_fraction": 0.5}).real_batch == 128


# --- one step in the model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def constant_model(make, spec):
    """A model whose member e says "s + e + 1, reward 10 (e + 1)", almost for certain."""
    config = make({"model.log_variance_min": -60.0})
    init = jax.jit(ensemble.init, static_argnums=1)
    model = init(config.model, spec, jax.random.PRNGKey(0))
    head = jax.tree.map(jnp.zeros_like, model.params["layers"]["head"])
    for e in range(3):
        says = jnp.array([e + 1.0] * 3 + [10 * (e + 1.0)] + [-50.0] * 4)
        head["bias"] = head["bias"].at[e].set(says)
    model = model._replace(
        params={"layers": {**model.params["layers"], "head": head}},
        elites=jnp.array([2, 0], jnp.int32),
    )
    agent = make_agent(settings.base(), spec)
    agent = dataclasses.replace(agent, config=dataclasses.replace(agent.config, hidden=(8, 8)))
    state = jax.jit(agent.init)(jax.random.PRNGKey(1))
    return model, functools.partial(model_step, config, spec, agent, state)


def with_bias(model, bias):
    """The model with another bias of its output layers."""
    layers = model.params["layers"]
    return model._replace(params={"layers": {**layers, "head": {**layers["head"], "bias": bias}}})


def test_each_elite_takes_an_equal_share_with_its_own_weights(constant_model):
    model, imagine = constant_model
    obs = jnp.arange(B * 3.0).reshape(B, 3) / 100
    shares = []
    for i in range(8):
        step, finite, store, weight, penalty, _ = imagine(model, obs, jax.random.PRNGKey(i))
        moved = np.asarray(step.next_obs - obs)
        np.testing.assert_allclose(moved, np.round(moved[:, :1]) * np.ones(3), atol=1e-5)
        np.testing.assert_allclose(step.reward, 10 * moved[:, 0], rtol=1e-5)
        # Member 1 is no elite.
        assert sorted(np.round(moved[:, 0])) == [1] * 4 + [3] * 4
        assert finite.all() and store.all() and weight is None and penalty is None
        shares.append(moved[0, 0].round())
    assert set(shares) == {1, 3}  # who takes which share is drawn anew


@pytest.mark.parametrize(("size", "each"), [(7, [4, 3]), (1, [1])])
def test_states_that_do_not_divide_leave_the_last_elite_fewer(constant_model, size, each):
    model, imagine = constant_model
    obs = jnp.arange(size * 3.0).reshape(size, 3) / 100
    step, finite, *_ = imagine(model, obs, jax.random.PRNGKey(0))
    moved = np.asarray(step.next_obs - obs)[:, 0].round()
    assert finite.shape == (size,) and set(moved) <= {1, 3}
    np.testing.assert_allclose(step.reward, 10 * moved, rtol=1e-5)
    assert [len(list(of_one)) for _, of_one in itertools.groupby(moved)] == each


def test_state_and_reward_are_sampled(constant_model):
    model, imagine = constant_model
    bias = model.params["layers"]["head"]["bias"].at[:, 4:].set(2 * jnp.log(0.1))
    model = with_bias(model, bias)
    obs = jnp.zeros((4000, 3))
    step, *_ = imagine(model, obs, jax.random.PRNGKey(0))
    low = np.asarray(step.next_obs[:, 0]) < 2
    z = np.concatenate([step.next_obs, step.reward[:, None]], 1)[low] - [1, 1, 1, 10]
    # The bounds bend log-variances near them a little: 0.5 is 5 above.
    np.testing.assert_allclose(z.std(0), 0.1, rtol=0.06)
    assert np.abs(np.corrcoef(z.T) - np.eye(4)).max() < 0.1


def test_terminations_of_the_model_end_episodes(constant_model):
    model, imagine = constant_model
    obs = jnp.full((B, 3), 3.0)  # 3 + 1 stays under 5, 3 + 3 does not
    step, *_ = imagine(model, obs, jax.random.PRNGKey(0))
    np.testing.assert_array_equal(step.discount, np.where(step.next_obs[:, 0] > 5, 0, 1))
    assert step.discount.sum() == 4


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("output", [1, 3])  # a state, the reward
def test_predictions_that_are_not_finite_are_marked(constant_model, bad, output):
    model, imagine = constant_model
    model = with_bias(model, model.params["layers"]["head"]["bias"].at[0, output].set(bad))
    obs = jnp.ones((B, 3))
    step, finite, store, weight, penalty, _ = imagine(model, obs, jax.random.PRNGKey(0))
    good = np.asarray(finite)
    assert good.sum() == 4
    np.testing.assert_array_equal(store, good)
    assert weight is None and penalty is None
    np.testing.assert_allclose(step.next_obs[good], 4, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in step)


# --- rollouts of several steps ---------------------------------------------------------------


def counting(config, spec, rule, policy, model, trusted, obs, alive, h, length, key):
    """Instead of a model: x grows by 1, y stays; the reward tells which fit and which state."""
    next_obs = obs + jnp.array([1.0, 0.0, 0.0])
    ended = (obs[:, 0] == 1) & (obs[:, 1] % 3 == 0)
    finite = ~((obs[:, 0] == 0) & (obs[:, 1] % 3 == 1))
    reward = 10.0 * model.fits + obs[:, 0]
    action = jnp.zeros((len(obs), 2))
    transition = Transition(obs, action, reward, 1.0 - ended, next_obs)
    return trusted, rollouts.ModelStep(transition, finite, finite, None, None, jnp.zeros(len(obs)))


def roll_out(row, spec, shared, length):
    """The synthetic ring after the rollouts of a step, and their figures."""
    starts_key, key = jax.random.split(jax.random.PRNGKey(0))
    slots = replay.draw(starts_key, row.real_buffer, shared.step + 1, (B,))
    row, metrics = Algorithm(row.config, spec).roll_out(row, shared, length, slots, key)
    return row.synthetic_buffer, metrics


def test_rows_keep_apart_and_stop(row, spec, monkeypatch):
    monkeypatch.setattr(rollouts, "imagine", counting)
    ring, metrics = roll_out(row, spec, shared(step=119), 3)
    obs, new = (np.asarray(x).reshape(8, B, 3) for x in (ring.data.obs, ring.data.next_obs))
    valid = np.asarray(ring.valid).reshape(8, B)
    assert metrics.keys() == {"valid_fraction"}
    np.testing.assert_allclose(metrics["valid_fraction"], valid[:3].mean(), rtol=1e-6)
    assert not valid[3:].any()  # three blocks of the ring's eight are written
    names = obs[0, :, 1]
    assert set(names % 3) == {0, 1, 2}
    # A third begins with a prediction that is not finite, a third ends after its second step.
    length = np.select([names % 3 == 1, names % 3 == 0], [0, 2], 3)
    np.testing.assert_array_equal(valid[:3], np.arange(3)[:, None] < length)
    for i in range(2):
        goes_on = valid[i + 1]
        np.testing.assert_array_equal(obs[i + 1][goes_on], new[i][goes_on])
        np.testing.assert_array_equal(obs[i + 1, :, 1], names)
    ends = np.asarray(ring.data.discount).reshape(8, B)[:3] == 0
    np.testing.assert_array_equal(ends[1][valid[1]], (names % 3 == 0)[valid[1]])
    assert not ends[0][valid[0]].any()


@pytest.mark.parametrize("length", [1, 3])
def test_ring_positions_after_several_steps(make, spec, monkeypatch, length):
    """A program's synthetic ring of eight blocks of which each `learn` writes the next ones."""
    monkeypatch.setattr(rollouts, "imagine", counting)
    program = build(make({"rollout.horizon": length, "learn.utd": 1}), spec)
    state = program.init()
    one = Transition(*(np.zeros(s, np.float32) for s in ((1, 3), (1, 2), 1, 1, (1, 3))))
    for t in range(4):
        model = state.learners.model._replace(fits=jnp.full(1, t + 1, jnp.int32))
        state = state._replace(learners=state.learners._replace(model=model))
        state, metrics = program.learn(state, one, np.ones(1, bool))
    assert state.shared.step == 4 and state.shared.blocks == 4 * length
    rewards = np.asarray(state.learners.synthetic_buffer.data.reward).reshape(8, B)
    expected, valid = np.zeros(8), np.zeros(8, bool)
    for block in range(4 * length):
        # y is 0, so each ends in its second step, and stays where it was in its third.
        expected[block % 8] = 10 * (block // length + 1) + min(block % length, 1)
        valid[block % 8] = block % length < 2
    np.testing.assert_array_equal(rewards, expected[:, None] * np.ones(B))
    np.testing.assert_array_equal(
        state.learners.synthetic_buffer.valid[0].reshape(8, B), np.stack([valid] * B, 1)
    )
    assert 10 <= metrics["synthetic_reward_mean"][0] <= 41


def test_positions_stay_right_after_two_billion_transitions(row, spec, monkeypatch):
    """Long horizons pass the largest int32 within the length of a usual run."""
    monkeypatch.setattr(rollouts, "imagine", counting)
    # 2^31 transitions are 2^28 blocks of 8, and 2^28 + 5 is a multiple of the ring's 7 blocks.
    late = shared(step=119, blocks=2**28 + 5)
    sizes = dataclasses.replace(row.config.replay, synthetic=56)
    ring = replay.init(56, 3, 2)
    old = ring.data._replace(reward=jnp.arange(56.0) - 1000)
    ring = replay.pack(old, jnp.ones(56, bool))
    row = row._replace(config=dataclasses.replace(row.config, replay=sizes), synthetic=ring)
    ring, _ = roll_out(row, spec, late, 2)
    written = np.asarray(ring.data.reward).reshape(7, B)[:, 0] >= 0
    np.testing.assert_array_equal(np.flatnonzero(written), [0, 1])
    one = Transition(*(jnp.zeros(s) for s in (3, 2, (), (), 3)))
    learn = jax.jit(Algorithm(row.config, spec).learn)
    _, metrics = learn(row, late, one, jnp.array(True))
    # Drawn from all seven blocks, of which three are new: not from the first slot only.
    assert -960 < metrics["synthetic_reward_mean"] < -100


@pytest.mark.parametrize("rule", ["none", "penalty", "infoprop", "weight"])
def test_a_reward_is_read_from_the_imagined_state(make, spec, rule):
    """From the sampled one, a rule's own too, not from its mean; a rule of trust sees it so."""
    settings = {"model.reward_from": "next_state", "rollout.reward_noise": 0.0}
    if rule == "penalty":
        settings["trust.scale"] = 0.0
    config = make(settings, trust=rule)
    model = ensemble.init(config.model, spec, jax.random.PRNGKey(1))
    seen = []
    judge = trust.make_rule(config, spec)

    class Watched(type(judge)):
        def apply(self, state, predictions, h, length, key):
            seen.append(predictions)
            return super().apply(state, predictions, h, length, key)

    judge = Watched(judge.config if hasattr(judge, "own") else None, spec, B)
    obs = jax.random.normal(jax.random.PRNGKey(2), (B, spec.obs_dim))
    action = jnp.zeros((B, spec.action_dim))
    _, imagined = rollouts.model_step(
        config,
        spec,
        judge,
        lambda *_: (action, None),
        rollouts.asked(judge, model),
        judge.init(),
        obs,
        jnp.ones(B, bool),
        0,
        1,
        jax.random.PRNGKey(3),
    )
    next_obs = imagined.transition.next_obs
    means, _ = ensemble.predict_all(config.model, model, obs, action, next_obs)
    at_means, _ = ensemble.predict_all(config.model, model, obs, action)
    if rule != "none":
        said = seen[0].mean[..., -1] * model.unit[-1]
        np.testing.assert_allclose(said, means[..., -1], rtol=1e-5, atol=1e-5)
    if rule in ("infoprop", "weight"):
        # What is common to all members' words, or their mean.
        if rule == "weight":
            np.testing.assert_allclose(
                imagined.transition.reward, means[..., -1].mean(0), rtol=1e-4, atol=1e-5
            )
        return
    # Each row's reward is one member's word on the row's own sample.
    nearest = np.abs(np.asarray(means[..., -1]) - imagined.transition.reward).min(0)
    np.testing.assert_allclose(nearest, 0, atol=1e-5)
    assert (np.abs(np.asarray(at_means[..., -1]) - imagined.transition.reward).min(0) > 1e-4).any()


# --- value expansion -------------------------------------------------------------------------


def test_a_target_reaches_further_by_hand():
    """Three transitions: one goes on twice, one once, one has ended."""
    seen, going = [], []

    def step(calls, obs, alive, h):
        seen.append(np.asarray(obs))
        going.append(np.asarray(alive))
        ended = jnp.array([h == 1, False, False])
        further = Transition(
            obs=obs,
            action=jnp.zeros((3, 1)),
            reward=10.0 * (h + 1) + jnp.arange(3.0),
            discount=1.0 - ended,
            next_obs=obs + 1,
        )
        kept = jnp.array([True, h == 0, True])
        price = jnp.array([2.0, -4.0, 100.0])
        weight = jnp.array([0.5, 0.25, 0.1])
        return calls + 1, rollouts.ModelStep(
            further, jnp.ones(3, bool), kept, weight, None, log_prob=price
        )

    real = Transition(
        obs=jnp.zeros((3, 1)),
        action=jnp.ones((3, 1)),
        reward=jnp.array([1.0, 2.0, 3.0]),
        discount=jnp.array([1.0, 1.0, 0.0]),
        next_obs=jnp.array([[5.0], [6.0], [7.0]]),
    )
    batch = Minibatch(real, jnp.array([True, False, True]), None)
    calls, after, metrics = rollouts.expand(step, 0, batch, 2, 0.5, jnp.array(0.1))
    assert calls == 2
    np.testing.assert_array_equal(seen[0][:, 0], [5, 6, 7])
    # A hole is expanded as the others are, and no rule is told of it.
    np.testing.assert_array_equal(going, [[True, False, False], [True, False, False]])
    # 1 + .5 (10 - .2) + .25 (20 - .2); 2 + .5 (11 + .4); ended.
    np.testing.assert_allclose(after.data.reward, [10.85, 7.7, 3.0], rtol=1e-6)
    # Ended at the second step; .5 on; ended before.
    np.testing.assert_allclose(after.data.discount, [0.0, 0.5, 0.0])
    np.testing.assert_array_equal(after.data.next_obs[:, 0], [7, 7, 7])
    np.testing.assert_array_equal(after.data.obs, real.obs)
    np.testing.assert_array_equal(after.data.action, real.action)
    np.testing.assert_array_equal(after.valid, batch.valid)
    np.testing.assert_allclose(after.weight, [0.25, 0.25, 1.0])
    np.testing.assert_allclose(metrics["expanded_steps"], 1.0)


def test_an_expanded_target_is_the_agents_own_of_the_longer_return(make, spec):
    """SAC's target of the expanded transition, against the sum written out."""
    config = make({"rollout.value_expansion_steps": 1})
    agent = make_agent(config, spec)
    state = agent.init(jax.random.PRNGKey(0))._replace(log_temperature=jnp.log(0.3))
    model = ensemble.init(config.model, spec, jax.random.PRNGKey(1))
    row = jax.jit(Algorithm(config, spec).init)(config, jnp.array(0), jnp.array(0))
    algorithm, key = Algorithm(config, spec), jax.random.PRNGKey(2)
    step = algorithm._step(algorithm._asked(row._replace(model=model)), state, 1, key)
    obs, next_obs = jax.random.normal(jax.random.PRNGKey(3), (2, B, 3))
    data = Transition(obs, jnp.zeros((B, 2)), jnp.arange(8.0), jnp.ones(B), next_obs)
    batch = Minibatch(data, jnp.ones(B, bool), None)
    temperature = agent.temperature(state)
    _, after, _ = rollouts.expand(step, None, batch, 1, 0.9, temperature)
    _, one = step(None, next_obs, jnp.ones(B, bool), 0)
    first = data.reward + 0.9 * (one.transition.reward - 0.3 * one.log_prob)
    next_q, log_prob = jnp.arange(B) - 3.0, jnp.linspace(-1, 1, B)
    expected = first + 0.81 * one.transition.discount * (next_q - 0.3 * log_prob)
    target = td_target(0.9, after.data, next_q, jnp.array(0.3), log_prob)
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-5)
    # The price is that of the imagined action.
    action, log_prob = agent.act(
        state, next_obs, jax.random.split(jax.random.fold_in(key, 0), 3)[0]
    )
    np.testing.assert_allclose(one.transition.action, action, rtol=1e-6)
    np.testing.assert_allclose(one.log_prob, log_prob, rtol=1e-5)


def test_all_data_may_be_real_and_only_targets_imagined(make, spec):
    config = make(
        {"rollout.fresh": True, "rollout.real_fraction": 1.0, "rollout.value_expansion_steps": 1}
    )
    algorithm = Algorithm(config, spec)
    row = jax.jit(algorithm.init)(config, jnp.array(0), jnp.array(0))
    real = replay.pack(row.real_buffer.data._replace(discount=jnp.ones(120)), jnp.ones(120, bool))
    one = Transition(*(jnp.ones(s) for s in (3, 2, (), (), 3)))
    learn = jax.jit(algorithm.learn)
    after, metrics = learn(row._replace(real=real), shared(step=119), one, jnp.array(True))
    assert after.synthetic is None and config.synthetic_batch == 0
    assert "synthetic_reward_mean" not in metrics and "valid_fraction" not in metrics
    np.testing.assert_allclose(metrics["expanded_steps"], 1.0)
    assert all(np.isfinite(value).all() for value in metrics.values())


# --- on top ----------------------------------------------------------------------------------


def test_figures_of_a_step_are_means_over_real_and_synthetic_updates(make, spec, monkeypatch):
    config = make(
        {"rollout.fresh": True, "rollout.on_top": True, "rollout.value_expansion_steps": 1}
    )
    algorithm = Algorithm(config, spec)
    row = jax.jit(algorithm.init)(config, jnp.array(0), jnp.array(0))

    def update(self, state, data, weight, counts, noise):
        return state, {"what_came": data.action[:, 0].mean(), "counted": counts.mean()}

    monkeypatch.setattr(type(algorithm.agent(row)), "update", update)
    # Real actions are 3, and imagined ones 1 at most.
    data = row.real_buffer.data._replace(action=jnp.full((120, 2), 3.0), discount=jnp.ones(120))
    real = replay.pack(data, jnp.ones(120, bool))
    one = Transition(jnp.ones(3), jnp.full(2, 3.0), jnp.ones(()), jnp.ones(()), jnp.ones(3))
    learn = jax.jit(algorithm.learn)
    _, metrics = learn(row._replace(real=real), shared(step=119), one, jnp.array(True))
    assert 1 <= metrics["what_came"] <= 2
    np.testing.assert_allclose(metrics["counted"], 1.0)
    np.testing.assert_allclose(metrics["expanded_steps"], 1.0)
