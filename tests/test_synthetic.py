"""Test sources of synthetic data: model steps, rollouts, their buffer, and value expansion."""

import dataclasses
import fractions
import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import replay, trust
from dynajax.agents import make_agent
from dynajax.agents.sac import SAC, td_target
from dynajax.mbpo import MBPO
from dynajax.models import ensemble, make_model
from dynajax.models.model_env import ModelEnv, ModelStep
from dynajax.runtime.program import build
from dynajax.synthetic import SourceKeys, expand_targets
from dynajax.synthetic.buffered import horizon
from dynajax.types import Minibatch, Shared, Transition

B = 8  # parallel rollouts
KEY = jax.random.PRNGKey(0)


def shared(step=0, blocks=0):
    return Shared(jnp.array(step, jnp.int32), jnp.array(blocks, jnp.int32))


def new_learner(config, spec):
    return jax.jit(MBPO(config, spec).init)(config, jnp.array(0), jnp.array(0))


def with_real_data(learner, **columns):
    """Return the learner with a full real buffer, some of whose fields are given."""
    data = learner.real_buffer.unpack()._replace(**columns)
    buffer = replay.of_transitions(data, jnp.ones(learner.real_buffer.capacity, bool))
    return learner._replace(real_buffer=buffer)


@pytest.fixture(scope="module")
def learner(make, spec):
    """Return a learner with a full real buffer, in which x is 0 and y the number of the slot."""
    obs = jnp.stack([jnp.zeros(120), jnp.arange(120.0), jnp.zeros(120)], -1)
    return with_real_data(new_learner(make({"rollout.horizon": 3}), spec), obs=obs)


# --- Sizes of rollouts and minibatches ------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "length"), [(0, 1), (20, 1), (39, 1), (40, 2), (60, 3), (99, 4), (100, 5), (900, 5)]
)
def test_horizon_grows_between_two_steps(make, step, length):
    config = make({"rollout.horizon": "20,100,1,5"})
    assert horizon(config, jnp.array(step)) == length


@pytest.mark.parametrize("schedule", [(0, 49, 1, 50), (20, 80, 5, 1), (20000, 150000, 1, 15)])
def test_horizon_changes_at_exact_steps(make, schedule):
    """Fractions in float32 would be late or early."""
    start, stop, first, last = schedule
    config = make({"rollout.horizon": schedule, "replay.synthetic": 400})
    for step in range(start, stop + 1, max(1, (stop - start) // 1000)):
        exact = first + math.floor(
            fractions.Fraction((step - start) * (last - first), stop - start)
        )
        assert horizon(config, jnp.array(step)) == exact


def test_constant_horizon_is_a_python_number(make):
    assert horizon(make({"rollout.horizon": 3}), jnp.array(7)) == 3
    assert type(horizon(make(), jnp.array(7))) is int


def test_number_of_real_transitions_in_a_minibatch(make):
    assert make({"learn.batch": 256}).real_batch == 13
    assert make({"learn.batch": 256, "rollout.real_fraction": 0.5}).real_batch == 128


# --- One step in the model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def constant_model(make, spec):
    """Return a model and its step: member e predicts s + e + 1 and reward 10 (e + 1), with hardly
    any variance. The trust rule is none."""
    config = make({"model.log_variance_min": -60.0})
    dynamics, agent = make_model(config.model, spec), make_agent(config, spec)
    state = jax.jit(lambda: ensemble.init(dynamics, jax.random.PRNGKey(0)))()
    outputs = [[e + 1.0] * 3 + [10 * (e + 1.0)] + [-50.0] * 4 for e in range(3)]
    head = jax.tree.map(jnp.zeros_like, state.params["network"]["head"])
    head["bias"] = jnp.array(outputs)
    network = {**state.params["network"], "head": head}
    state = state._replace(params={"network": network}, elites=jnp.array([2, 0], jnp.int32))
    policy = functools.partial(agent.act, jax.jit(agent.init)(jax.random.PRNGKey(1)))

    @jax.jit
    def model_step(state, obs, key):
        rule, active = trust.TrustRule(None, spec, len(obs)), jnp.ones(len(obs), bool)
        env = ModelEnv(
            config, spec, rule, dynamics, state, policy, action_noise=agent.action_noise
        ).select_members()
        return env.step(None, obs, active, 0, 1, key)[1]

    return state, model_step


def output_bias(state):
    return state.params["network"]["head"]["bias"]


def with_output_bias(state, bias):
    """Return the ensemble with another bias of its output layers."""
    network = state.params["network"]
    return state._replace(
        params={"network": {**network, "head": {**network["head"], "bias": bias}}}
    )


def test_each_elite_predicts_an_equal_share_of_the_states(constant_model):
    state, model_step = constant_model
    obs = jnp.arange(B * 3.0).reshape(B, 3) / 100
    firsts = set()
    for i in range(8):
        step = model_step(state, obs, jax.random.PRNGKey(i))
        change = np.asarray(step.transition.next_obs - obs)
        np.testing.assert_allclose(change, np.round(change[:, :1]) * np.ones(3), atol=1e-5)
        np.testing.assert_allclose(step.transition.reward, 10 * change[:, 0], rtol=1e-5)
        # Member 1 is no elite.
        assert sorted(np.round(change[:, 0])) == [1] * 4 + [3] * 4
        assert step.continue_mask.all() and step.keep_mask.all()
        assert step.weight is None and step.penalty is None
        firsts.add(change[0, 0].round())
    assert firsts == {1, 3}  # the shares are redrawn at each step


@pytest.mark.parametrize(("size", "shares"), [(7, [4, 3]), (1, [1])])
def test_last_elite_predicts_fewer_states_if_they_do_not_divide_evenly(
    constant_model, size, shares
):
    state, model_step = constant_model
    obs = jnp.arange(size * 3.0).reshape(size, 3) / 100
    step = model_step(state, obs, KEY)
    change = np.asarray(step.transition.next_obs - obs)[:, 0].round()
    assert step.continue_mask.shape == (size,) and set(change) <= {1, 3}
    np.testing.assert_allclose(step.transition.reward, 10 * change, rtol=1e-5)
    assert [len(list(share)) for _, share in itertools.groupby(change)] == shares


def test_state_and_reward_are_sampled(constant_model):
    state, model_step = constant_model
    state = with_output_bias(state, output_bias(state).at[:, 4:].set(2 * jnp.log(0.1)))
    transition = model_step(state, jnp.zeros((4000, 3)), KEY).transition
    first = np.asarray(transition.next_obs[:, 0]) < 2
    samples = np.concatenate([transition.next_obs, transition.reward[:, None]], 1)
    z = samples[first] - [1, 1, 1, 10]
    # The soft clamp changes log-variances near the bounds slightly.
    np.testing.assert_allclose(z.std(0), 0.1, rtol=0.06)
    assert np.abs(np.corrcoef(z.T) - np.eye(4)).max() < 0.1


def test_predicted_terminations_set_the_discount(constant_model):
    state, model_step = constant_model
    obs = jnp.full((B, 3), 3.0)  # 3 + 1 is below 5, 3 + 3 is not
    transition = model_step(state, obs, KEY).transition
    expected = np.where(transition.next_obs[:, 0] > 5, 0, 1)
    np.testing.assert_array_equal(transition.discount, expected)
    assert transition.discount.sum() == 4


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("output", [1, 3])  # a state, the reward
def test_predictions_that_are_not_finite_are_masked(constant_model, bad, output):
    state, model_step = constant_model
    state = with_output_bias(state, output_bias(state).at[0, output].set(bad))
    step = model_step(state, jnp.ones((B, 3)), KEY)
    finite = np.asarray(step.continue_mask)
    assert finite.sum() == 4
    np.testing.assert_array_equal(step.keep_mask, finite)
    assert step.weight is None and step.penalty is None
    np.testing.assert_allclose(step.transition.next_obs[finite], 4, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in step.transition)


# --- Buffered rollouts ----------------------------------------------------------------------------


def counting_step(self, trust, obs, active, h, length, key):
    """Replace `ModelEnv.step`: x grows by 1, y stays; the reward is 10 times the fits, plus x."""
    next_obs = obs + jnp.array([1.0, 0.0, 0.0])
    ended = (obs[:, 0] == 1) & (obs[:, 1] % 3 == 0)
    finite = ~((obs[:, 0] == 0) & (obs[:, 1] % 3 == 1))
    reward = 10.0 * self.state.num_fits + obs[:, 0]
    transition = Transition(obs, jnp.zeros((len(obs), 2)), reward, 1.0 - ended, next_obs)
    return trust, ModelStep(transition, finite, finite, None, None, jnp.zeros(len(obs)))


@pytest.fixture
def counting(monkeypatch, new_programs):
    monkeypatch.setattr(ModelEnv, "step", counting_step)


def roll_out(learner, spec, shared, length):
    """Return the synthetic buffer after the rollouts of an agent step, and their metrics."""
    starts_key, key = jax.random.split(KEY)
    requests = [replay.Request(starts_key, (B,))]
    (starts,) = replay.sample_indices(learner.real_buffer, shared.step + 1, requests)
    algorithm = MBPO(learner.config, spec)
    source, keys = algorithm.source(learner), SourceKeys(starts_key, key, key)
    model_env = algorithm.model_env(learner)
    learner, metrics = source.add_rollouts(learner, shared, model_env, starts, length, keys)
    return learner.synthetic, metrics


def test_rollouts_continue_their_own_states_and_end(learner, spec, counting):
    buffer, metrics = roll_out(learner, spec, shared(step=119), 3)
    data = buffer.unpack()
    obs, next_obs = (np.asarray(x).reshape(8, B, 3) for x in (data.obs, data.next_obs))
    valid = np.asarray(buffer.valid).reshape(8, B)
    assert metrics.keys() == {"valid_fraction"}
    np.testing.assert_allclose(metrics["valid_fraction"], valid[:3].mean(), rtol=1e-6)
    assert not valid[3:].any()  # three of the eight blocks are written
    slots = obs[0, :, 1]
    assert set(slots % 3) == {0, 1, 2}
    # A third starts with a prediction that is not finite, a third ends after its second step.
    length = np.select([slots % 3 == 1, slots % 3 == 0], [0, 2], 3)
    np.testing.assert_array_equal(valid[:3], np.arange(3)[:, None] < length)
    for i in range(2):
        continues = valid[i + 1]
        np.testing.assert_array_equal(obs[i + 1][continues], next_obs[i][continues])
        np.testing.assert_array_equal(obs[i + 1, :, 1], slots)
    ends = np.asarray(data.discount).reshape(8, B)[:3] == 0
    np.testing.assert_array_equal(ends[1][valid[1]], (slots % 3 == 0)[valid[1]])
    assert not ends[0][valid[0]].any()


@pytest.mark.parametrize("length", [1, 3])
def test_each_agent_step_writes_the_next_blocks(make, spec, counting, length):
    """The synthetic buffer has eight blocks."""
    program = build(make({"rollout.horizon": length, "learn.utd": 1}), spec)
    state = program.init()
    transition = Transition(*(np.zeros(s, np.float32) for s in ((1, 3), (1, 2), 1, 1, (1, 3))))
    for t in range(4):
        model = state.learners.model._replace(num_fits=jnp.full(1, t + 1, jnp.int32))
        state = state._replace(learners=state.learners._replace(model=model))
        state, metrics = program.learn(state, transition, np.ones(1, bool))
    assert state.shared.step == 4 and state.shared.blocks == 4 * length
    buffer = state.learners.synthetic
    expected, valid = np.zeros(8), np.zeros(8, bool)
    for block in range(4 * length):
        # y is 0, so each rollout ends in its second step and keeps its observation in the third.
        expected[block % 8] = 10 * (block // length + 1) + min(block % length, 1)
        valid[block % 8] = block % length < 2
    rewards = np.asarray(buffer.unpack().reward).reshape(8, B)
    np.testing.assert_array_equal(rewards, expected[:, None] * np.ones(B))
    np.testing.assert_array_equal(buffer.valid[0].reshape(8, B), np.stack([valid] * B, 1))
    assert 10 <= metrics["synthetic_reward_mean"][0] <= 41


def test_positions_are_correct_after_two_billion_transitions(learner, spec, counting):
    """With long horizons the number of transitions of a usual run exceeds an int32."""
    # 2^31 transitions are 2^28 blocks of 8, and 2^28 + 5 is a multiple of the buffer's 7 blocks.
    late = shared(step=119, blocks=2**28 + 5)
    sizes = dataclasses.replace(learner.config.replay, synthetic=56)
    empty = replay.init(56, 3, 2)
    old = empty.unpack()._replace(reward=jnp.arange(56.0) - 1000)
    learner = learner._replace(
        config=dataclasses.replace(learner.config, replay=sizes),
        synthetic=replay.of_transitions(old, jnp.ones(56, bool)),
    )
    buffer, _ = roll_out(learner, spec, late, 2)
    written = np.asarray(buffer.unpack().reward).reshape(7, B)[:, 0] >= 0
    np.testing.assert_array_equal(np.flatnonzero(written), [0, 1])
    transition = Transition(*(jnp.zeros(s) for s in (3, 2, (), (), 3)))
    learn = jax.jit(MBPO(learner.config, spec).learn)
    _, metrics = learn(learner, late, transition, jnp.array(True))
    # Sampled from all seven blocks, of which three are new, not from the first slot only.
    assert -960 < metrics["synthetic_reward_mean"] < -100


def test_buffer_is_regenerated_every_few_steps(make, spec, counting):
    config = make({"source.regenerate_every": 3, "rollout.horizon": 2, "learn.utd": 1})
    algorithm = MBPO(config, spec)
    learner, counters = new_learner(config, spec), shared(step=config.random_steps - 1)
    learner = with_real_data(learner)
    transition = Transition(*(jnp.zeros(s) for s in (3, 2, (), (), 3)))
    learn = jax.jit(algorithm.learn)
    for t in range(5):
        # Each generation has other rewards.
        model = learner.model._replace(num_fits=jnp.array(t, jnp.int32))
        learner = learner._replace(model=model)
        learner, metrics = learn(learner, counters, transition, jnp.array(True))
        counters = algorithm.count(counters)
        assert counters.blocks == 2
        rewards = np.asarray(learner.synthetic.unpack().reward).reshape(8, B)
        valid = np.asarray(learner.synthetic.valid).reshape(8, B)
        generation = 10 * (t // 3 * 3)
        np.testing.assert_array_equal(rewards[:2], [[generation] * B, [generation + 1] * B])
        assert valid[:2].all() and not valid[2:].any()
        # Agent steps without rollouts have the metrics of the last ones.
        assert float(metrics["valid_fraction"]) == 1
        assert generation <= metrics["synthetic_reward_mean"] <= generation + 1


@pytest.mark.parametrize("source", ["buffered", "on_the_fly"])
def test_rollouts_start_from_the_newest_transitions_in_a_window(make, spec, source):
    config = make({"rollout.source": source, "rollout.start_window": 10})
    algorithm, learner = MBPO(config, spec), with_real_data(new_learner(config, spec))
    source = algorithm.source(learner)
    keys = algorithm._split_keys(learner, source)
    _, starts = algorithm._sample_real(learner, shared(step=299), source, keys)
    assert starts.shape == source.start_shape()
    # After 300 transitions the newest one is in slot 59 of 120.
    assert set(np.asarray(starts).ravel().tolist()) <= set(range(50, 60))


@pytest.mark.parametrize("rule", ["none", "penalty", "infoprop", "uncertainty_weight"])
def test_reward_is_predicted_from_the_sampled_next_state(make, spec, rule):
    """Not from its mean; the trust rule sees the same prediction."""
    settings = {"model.reward_from": "next_state"}
    if rule != "infoprop":
        settings["rollout.reward_noise"] = 0.0
    if rule == "penalty":
        settings["trust.scale"] = 0.0
    config = make(settings, trust=rule)
    dynamics = make_model(config.model, spec)
    model = ensemble.init(dynamics, jax.random.PRNGKey(1))
    recorded = []

    class Recorded(type(trust.make_rule(config, spec))):
        def apply(self, state, predictions, h, length, key):
            recorded.append(predictions)
            return super().apply(state, predictions, h, length, key)

    recording = Recorded(config.trust, spec, B)
    obs = jax.random.normal(jax.random.PRNGKey(2), (B, spec.obs_dim))
    action = jnp.zeros((B, spec.action_dim))
    env = ModelEnv(config, spec, recording, dynamics, model, lambda *_: (action, None))
    active, key = jnp.ones(B, bool), jax.random.PRNGKey(3)
    _, step = env.select_members().step(recording.init(), obs, active, 0, 1, key)
    next_obs, reward = step.transition.next_obs, step.transition.reward
    means, _ = ensemble.predict_all(dynamics, model, obs, action, next_obs)
    at_means, _ = ensemble.predict_all(dynamics, model, obs, action)
    if rule != "none":
        in_raw_units = recorded[-1].mean[..., -1] * model.stats.change_std[-1]
        np.testing.assert_allclose(in_raw_units, means[..., -1], rtol=1e-5, atol=1e-5)
    if rule == "uncertainty_weight":
        np.testing.assert_allclose(reward, means[..., -1].mean(0), rtol=1e-4, atol=1e-5)
    if rule in ("infoprop", "uncertainty_weight"):
        # The rule samples from the predictions of all members.
        return
    # Each reward is one member's prediction for the sampled next state.
    nearest = np.abs(np.asarray(means[..., -1]) - reward).min(0)
    np.testing.assert_allclose(nearest, 0, atol=1e-5)
    assert (np.abs(np.asarray(at_means[..., -1]) - reward).min(0) > 1e-4).any()


# --- Value expansion ------------------------------------------------------------------------------


def test_value_expansion_by_hand():
    """One transition is expanded by two steps, one by one step, one has terminated."""
    recorded_obs, recorded_active = [], []

    class ScriptedEnv(ModelEnv):
        """A model whose trust state counts the calls."""

        def step(self, trust, obs, active, h, length, key):
            recorded_obs.append(np.asarray(obs))
            recorded_active.append(np.asarray(active))
            ended = jnp.array([h == 1, False, False])
            transition = Transition(
                obs=obs,
                action=jnp.zeros((3, 1)),
                reward=10.0 * (h + 1) + jnp.arange(3.0),
                discount=1.0 - ended,
                next_obs=obs + 1,
            )
            keep = jnp.array([True, h == 0, True])
            log_prob = jnp.array([2.0, -4.0, 100.0])
            return trust + 1, ModelStep(transition, jnp.ones(3, bool), keep, None, None, log_prob)

    env = ScriptedEnv(*[None] * len(dataclasses.fields(ModelEnv)))
    real = Transition(
        obs=jnp.zeros((3, 1)),
        action=jnp.ones((3, 1)),
        reward=jnp.array([1.0, 2.0, 3.0]),
        discount=jnp.array([1.0, 1.0, 0.0]),
        next_obs=jnp.array([[5.0], [6.0], [7.0]]),
    )
    batch = Minibatch(real, jnp.array([True, False, True]), None)
    calls, expanded, metrics = expand_targets(env, 0, batch, 2, 0.5, jnp.array(0.1), KEY)
    assert calls == 2
    np.testing.assert_array_equal(recorded_obs[0][:, 0], [5, 6, 7])
    # An invalid transition is expanded like the others, but it does not count for the trust rule.
    np.testing.assert_array_equal(recorded_active, [[True, False, False], [True, False, False]])
    # 1 + .5 (10 - .2) + .25 (20 - .2); 2 + .5 (11 + .4); terminated.
    np.testing.assert_allclose(expanded.data.reward, [10.85, 7.7, 3.0], rtol=1e-6)
    # Terminated at the second step; .5; terminated before.
    np.testing.assert_allclose(expanded.data.discount, [0.0, 0.5, 0.0])
    np.testing.assert_array_equal(expanded.data.next_obs[:, 0], [7, 7, 7])
    np.testing.assert_array_equal(expanded.data.obs, real.obs)
    np.testing.assert_array_equal(expanded.data.action, real.action)
    np.testing.assert_array_equal(expanded.valid, batch.valid)
    assert expanded.weight is None
    np.testing.assert_allclose(metrics["expanded_steps"], 1.0)


def test_value_expansion_reaches_as_far_as_the_trust_rule_continues():
    class ScriptedEnv(ModelEnv):
        def step(self, trust, obs, active, h, length, key):
            n = len(obs)
            transition = Transition(obs, jnp.zeros((n, 1)), jnp.ones(n), jnp.ones(n), obs + 1)
            continues, keep = jnp.array([False, True]), jnp.ones(n, bool)
            return trust, ModelStep(transition, continues, keep, None, None, jnp.zeros(n))

    env = ScriptedEnv(*[None] * len(dataclasses.fields(ModelEnv)))
    zeros = jnp.zeros((2, 1))
    data = Transition(zeros, zeros, jnp.zeros(2), jnp.ones(2), zeros)
    batch = Minibatch(data, jnp.ones(2, bool), None)
    _, expanded, _ = expand_targets(env, None, batch, 3, 0.5, jnp.array(0.0), KEY)
    np.testing.assert_allclose(expanded.data.reward, [0.5, 0.875])
    np.testing.assert_allclose(expanded.data.discount, [0.5, 0.125])
    np.testing.assert_array_equal(expanded.data.next_obs[:, 0], [1, 3])


def test_expanded_target_equals_the_sum_over_both_steps(make, spec):
    """SAC's target of the expanded transition, against the sum written out."""
    config = make({"rollout.value_expansion_steps": 1})
    algorithm, agent = MBPO(config, spec), make_agent(config, spec)
    state = agent.init(KEY)._replace(log_temperature=jnp.log(0.3))
    learner = new_learner(config, spec)
    model = ensemble.init(algorithm.dynamics(learner), jax.random.PRNGKey(1))
    key = jax.random.PRNGKey(2)
    env = algorithm.model_env(learner._replace(agent=state, model=model)).select_members()
    obs, next_obs = jax.random.normal(jax.random.PRNGKey(3), (2, B, 3))
    data = Transition(obs, jnp.zeros((B, 2)), jnp.arange(8.0), jnp.ones(B), next_obs)
    batch = Minibatch(data, jnp.ones(B, bool), None)
    _, expanded, _ = expand_targets(env, None, batch, 1, 0.9, agent.temperature(state), key)
    noise = env.draw(jax.random.fold_in(key, 0), B)
    _, step = env.step(None, next_obs, jnp.ones(B, bool), 0, 1, noise)
    first = data.reward + 0.9 * (step.transition.reward - 0.3 * step.log_prob)
    next_q, log_prob = jnp.arange(B) - 3.0, jnp.linspace(-1, 1, B)
    expected = first + 0.81 * step.transition.discount * (next_q - 0.3 * log_prob)
    target = td_target(0.9, expanded.data, next_q, jnp.array(0.3), log_prob)
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-5)
    # The entropy cost is that of the action in the model.
    action, log_prob = agent.act(state, next_obs, noise.action)
    np.testing.assert_allclose(step.transition.action, action, rtol=1e-6)
    np.testing.assert_allclose(step.log_prob, log_prob, rtol=1e-5)


def test_noise_of_whole_rollouts_is_that_of_their_steps(make, spec):
    algorithm = MBPO(make(), spec)
    learner = new_learner(algorithm.config, spec)
    model = ensemble.init(algorithm.dynamics(learner), KEY)
    env = algorithm.model_env(learner._replace(model=model))
    whole = env.draw_rollout(KEY, 3, B)
    steps = [env.draw(jax.random.fold_in(KEY, h), B) for h in range(3)]
    chex.assert_trees_all_equal(whole, jax.tree.map(lambda *x: jnp.stack(x), *steps))
    assert whole.action.shape == (3, B, 2) and whole.prediction.shape == (3, B, 4)
    assert len(np.unique(whole.prediction)) == 12 * B


def learn_once(config, spec, **columns):
    """Return the learner and the metrics of one agent step with a full real buffer."""
    learner = with_real_data(new_learner(config, spec), discount=jnp.ones(120), **columns)
    transition = jax.tree.map(lambda x: x[0], learner.real_buffer.unpack())
    learn = jax.jit(MBPO(config, spec).learn)
    return learn(learner, shared(step=119), transition, jnp.array(True))


@pytest.mark.parametrize("source", ["on_the_fly", "none"])
def test_value_expansion_of_real_data_only(make, spec, source):
    config = make(
        {
            "rollout.source": source,
            "rollout.real_fraction": 1.0,
            "rollout.value_expansion_steps": 1,
        }
    )
    learner, metrics = learn_once(config, spec)
    assert learner.synthetic is None and config.synthetic_batch == 0
    assert "synthetic_reward_mean" not in metrics and "valid_fraction" not in metrics
    np.testing.assert_allclose(metrics["expanded_steps"], 1.0)
    assert all(np.isfinite(value).all() for value in metrics.values())


# --- Separate updates -----------------------------------------------------------------------------


def test_metrics_are_means_over_real_and_synthetic_updates(make, spec, monkeypatch):
    config = make(
        {
            "rollout.source": "on_the_fly",
            "rollout.mixing": "separate",
            "rollout.value_expansion_steps": 1,
        }
    )

    def update(self, state, data, weight, mask, noise):
        return state, {"action": data.action[:, 0].mean(), "count": mask.mean()}

    monkeypatch.setattr(SAC, "update", update)
    # Real actions are 3, synthetic ones at most 1.
    _, metrics = learn_once(config, spec, action=jnp.full((120, 2), 3.0))
    assert 1 <= metrics["action"] <= 2
    np.testing.assert_allclose(metrics["count"], 1.0)
    np.testing.assert_allclose(metrics["expanded_steps"], 1.0)
