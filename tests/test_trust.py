"""Test trust rules: the rule none costs nothing, the penalty by hand, and the effects of a rule."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import replay, trust
from dynajax.mbpo import MBPO, _gradient_step
from dynajax.models import MODELS, ensemble, fit_data, make_model, neural, targets, training
from dynajax.models.base import DynamicsModel, Gaussian
from dynajax.models.head_rescaling import rescale_heads
from dynajax.models.model_env import ModelEnv
from dynajax.runs.progress import Progress
from dynajax.runs.writer import RunWriter
from dynajax.runtime.program import build
from dynajax.synthetic import RolloutStarts, SourceKeys, UpdateInputs
from dynajax.trust.penalty import Penalty, PenaltyFields
from dynajax.types import Shared, TargetTransform, Transition, UsageError
from jaxprs import equations

B, E, K, D, A = 8, 3, 2, 3, 2
OBS = jnp.asarray(np.random.default_rng(0).normal(size=(B, D)), jnp.float32)
ACTIVE = jnp.ones(B, bool)
KEY = jax.random.PRNGKey(3)
TARGET_STD = jnp.array([0.5, 2.0, 10.0, 3.0])
SHARED = Shared(jnp.array(119), jnp.array(0))


def policy(obs, key):
    noise = jax.random.normal(key, (len(obs), A))
    return jnp.tanh(obs[:, :A] + 0.1 * noise), -noise.sum(-1)


@pytest.fixture(scope="module")
def model(make, spec):
    """Return a configuration whose bounds affect no log-variance, and its new ensemble."""
    config = make({"model.log_variance_min": -60, "model.log_variance_max": 60})
    dynamics = make_model(config.model, spec)
    state = jax.jit(lambda: ensemble.init(dynamics, jax.random.PRNGKey(0)))()
    stats = state.stats._replace(change_std=TARGET_STD)
    return config, state._replace(stats=stats, elites=jnp.array([2, 0], jnp.int32))


def model_env(config, spec, rule, state):
    env = ModelEnv(config, spec, rule, make_model(config.model, spec), state, policy)
    return env.select_members()


def model_step(config, spec, rule, state):
    """Return the rule's state and the model step after one step of rollouts from `OBS`."""

    @jax.jit
    def step(state):
        return model_env(config, spec, rule, state).step(None, OBS, ACTIVE, 0, 1, KEY)

    return step(state)


# --- Without a rule -------------------------------------------------------------------------------


def published_step(config, spec, state, obs, key):
    """Return a step of the rollouts of Janner et al. (2019), without any trust rule."""
    action_key, order_key, noise_key = jax.random.split(key, 3)
    action, _ = policy(obs, action_key)
    order = jax.random.permutation(order_key, state.elites)
    dynamics = make_model(config.model, spec)
    means, log_variances = ensemble.predict_all(dynamics, state, obs, action)
    member = jnp.repeat(order, B // K)
    mean, log_variance = (x[member, jnp.arange(B)] for x in (means, log_variances))
    noise = jax.random.normal(noise_key, mean.shape)
    z = mean + jnp.exp(0.5 * log_variance) * noise
    next_obs, reward = targets.decode(state.stats.transform, obs, z)
    ended = jax.vmap(spec.termination)(obs, action, next_obs)
    return Transition(obs, action, reward, 1.0 - ended.astype(jnp.float32), next_obs)


def matmul_shapes(function, *arguments) -> list[tuple[int, ...]]:
    """Return the shapes of the results of all matmuls in a function's program."""
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    return [
        equation.outvars[0].aval.shape
        for equation in equations(program)
        if equation.primitive.name == "dot_general"
    ]


def test_rule_none_equals_the_published_rollouts_bitwise(model, spec):
    config, state = model
    rule = trust.make_rule(config, spec)
    assert type(rule) is trust.TrustRule and config.trust_name == "none"
    trust_state, step = model_step(config, spec, rule, state)
    expected = jax.jit(lambda: published_step(config, spec, state, OBS, KEY))()
    chex.assert_trees_all_equal(step.transition, expected)
    assert trust_state is None and step.weight is None and step.penalty is None
    assert step.continue_mask.all() and step.keep_mask.all()


def test_all_members_are_evaluated_only_if_the_rule_needs_them(make, spec):
    layers = [8, 8, 2 * (D + 1)]
    shapes = {}
    for name in ("none", "penalty"):
        config = make(trust=name)
        rule = trust.make_rule(config, spec)
        state = ensemble.init(make_model(config.model, spec), KEY)
        env = model_env(config, spec, rule, state)
        shapes[name] = matmul_shapes(env.step, None, OBS, ACTIVE, 0, 1, KEY)
    # Each elite predicts its own share; or every member predicts all states.
    assert shapes["none"] == [(K, B // K, width) for width in layers]
    assert shapes["penalty"] == [(E, B, width) for width in layers]


def test_reward_from_the_next_state_is_predicted_once(make, spec):
    config = make({"model.reward_from": "next_state"})
    rule = trust.make_rule(config, spec)
    state = ensemble.init(make_model(config.model, spec), KEY)
    env = model_env(config, spec, rule, state)
    layers = [8, 8, 2 * (D + 1), *[config.model.width] * neural.REWARD_DEPTH, 2]
    shapes = matmul_shapes(env.step, None, OBS, ACTIVE, 0, 1, KEY)
    assert shapes == [(K, B // K, width) for width in layers]


def test_rule_none_adds_nothing_to_fits_and_learner_states(make, spec):
    counts = {}
    for name in ("none", "penalty"):
        config = make(trust=name)
        algorithm = MBPO(config, spec)
        learner = jax.eval_shape(algorithm.init, config, jnp.array(0), jnp.array(0))
        counts[name] = len(matmul_shapes(algorithm.fit, learner, SHARED))
        if name == "none":
            fit = functools.partial(training.fit, make_model(config.model, spec), [()])
            key = learner.key
            arguments = learner.variant, learner.model, learner.real_buffer, key, key, 5
            assert len(matmul_shapes(fit, *arguments)) == counts[name] > 0
            # The buffer has weights, and the learner a trust state, only if a rule needs them.
            assert learner.trust is None and learner.synthetic.weight is None
    assert counts["penalty"] > counts["none"]


# --- Penalty --------------------------------------------------------------------------------------


def penalty(kind, scale, mean, variance):
    """Return the rule's penalty for means and variances (E, B, D+1)."""
    mean, variance = jnp.asarray(mean, jnp.float32), jnp.asarray(variance, jnp.float32)
    rule = Penalty(PenaltyFields(kind, scale), None, mean.shape[1])
    predictions = trust.Predictions(mean, variance, jnp.zeros(mean.shape[1], int), mean[0])
    state, output = rule.apply(None, predictions, 0, 1, KEY)
    assert state is None
    assert all(part is None for part in output._replace(reward_penalty=None))
    return output.reward_penalty


def test_penalty_of_two_members_and_one_dimension_by_hand():
    mean, variance = [[[1.0], [5.0]], [[3.0], [5.0]]], [[[4.0], [0.25]], [[9.0], [0.04]]]
    # Half of the larger standard deviation: 3, and 0.5.
    np.testing.assert_allclose(penalty("aleatoric", 0.5, mean, variance), [1.5, 0.25])
    # 1 and 3 deviate by 1 from their mean; equal means do not deviate.
    np.testing.assert_allclose(penalty("epistemic", 0.5, mean, variance), [0.5, 0.0])
    np.testing.assert_allclose(penalty("epistemic", -2.0, mean, variance), [-2.0, 0.0])


def test_penalty_is_a_norm_over_dimensions():
    # ||(3, 4)|| = 5 against ||(1, 1)||; the deviations of the means are 1 and 2.
    mean, variance = [[[0.0, 1.0]], [[2.0, 5.0]]], [[[9.0, 16.0]], [[1.0, 1.0]]]
    np.testing.assert_allclose(penalty("aleatoric", 1.0, mean, variance), [5.0])
    np.testing.assert_allclose(penalty("epistemic", 1.0, mean, variance), [np.sqrt(5)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["aleatoric", "epistemic"])
@pytest.mark.parametrize(("far", "apart"), [(0, 1e-12), (1e4, 0.1), (1e6, 1.0), (0, 1e15)])
@pytest.mark.parametrize("variance", [1e-30, 1e-9, 1.0, 1e30])
def test_penalty_is_accurate_in_float32(kind, far, apart, variance):
    rng = np.random.default_rng(1)
    mean = np.float32(far + apart * rng.normal(size=(5, 6, 4)))
    variances = np.float32(variance * np.exp(rng.normal(size=(5, 6, 4))))
    result = penalty(kind, 1.5, mean, variances)
    m, v = mean.astype(np.float64), variances.astype(np.float64)
    u = {
        "aleatoric": np.sqrt(v.sum(-1)).max(0),
        "epistemic": np.sqrt(((m - m.mean(0)) ** 2).mean(0).sum(-1)),
    }
    np.testing.assert_allclose(result, 1.5 * u[kind], rtol=0.02)


@pytest.mark.parametrize("kind", ["aleatoric", "epistemic"])
def test_penalty_is_in_standard_deviations_of_the_reward(make, model, spec, kind):
    config, state = model
    settings = {"trust.kind": kind, "trust.scale": 0.7}
    rule = trust.make_rule(make(settings, trust="penalty"), spec)
    _, plain = model_step(config, spec, trust.TrustRule(None, spec, B), state)
    _, penalized = model_step(config, spec, rule, state)
    mean, log_variance = ensemble.predict_all(
        make_model(config.model, spec), state, OBS, plain.transition.action
    )
    std = np.asarray(TARGET_STD)
    u = penalty(kind, 0.7, mean / std, jnp.exp(log_variance) / std**2)
    loss = plain.transition.reward - penalized.transition.reward
    np.testing.assert_allclose(loss, u * std[-1], rtol=1e-3)
    np.testing.assert_allclose(penalized.penalty, u * std[-1], rtol=1e-4)
    assert (np.asarray(loss) > 1e-3).all()
    np.testing.assert_allclose(
        penalized.transition.next_obs, plain.transition.next_obs, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["aleatoric", "epistemic"])
def test_standard_units_do_not_depend_on_the_target_transform(make, model, spec, kind):
    """The same predictions under the transforms of none and scale: the same penalty and sample."""
    config, plain = model
    transform = TargetTransform(
        plain.stats.transform.skip,
        jnp.array([0.3, -1.0, 4.0, 0.2]),
        TARGET_STD / 7,
        jnp.zeros(()),
    )
    dynamics = make_model(config.model, spec)
    scaled = rescale_heads(dynamics, plain, transform, jnp.zeros(D + 1, bool), KEY)
    rule = trust.make_rule(make({"trust.kind": kind}, trust="penalty"), spec)
    one, other = (model_step(config, spec, rule, state)[1] for state in (plain, scaled))
    chex.assert_trees_all_close(one.transition, other.transition, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"settings": {"trust.scale": -1}},
        {"settings": {"trust.scale": -1, "trust.kind": "aleatoric"}},
        {"vary": {"trust.scale": [1, -1]}},
    ],
)
def test_bonus_is_only_for_epistemic_uncertainty(make, arguments):
    pattern = r"^--set trust\.scale=-1: .*trust\.kind=epistemic"
    with pytest.raises(UsageError, match=pattern) as error:
        make(trust="penalty", **arguments)
    assert "\n" not in str(error.value)
    settings = {**arguments.get("settings", {}), "trust.scale": -1, "trust.kind": "epistemic"}
    assert make(settings, trust="penalty").trust.scale == -1


# --- Effects of a rule's output -------------------------------------------------------------------


class Ending(trust.TrustRule):
    """End every other rollout, and say nothing about what is kept."""

    needs_all_members = True

    def apply(self, state, predictions, h, horizon, key):
        return state, trust.TrustOutput(continue_mask=jnp.arange(self.batch) % 2 == 0)


def test_transition_that_ends_a_rollout_is_not_kept(model, spec):
    config, state = model
    _, step = model_step(config, spec, Ending(None, spec, B), state)
    np.testing.assert_array_equal(step.continue_mask, np.arange(B) % 2 == 0)
    np.testing.assert_array_equal(step.keep_mask, step.continue_mask)


class Strict(trust.TrustRule):
    """Ends rollouts and does not keep some transitions.

    Its state counts calls and contains the weight, the penalty, and whether anything is kept.
    """

    needs_all_members = True
    uses_weights = True
    metrics = ("penalty", "weight")

    def init(self):
        zero = jnp.zeros((), jnp.int32)
        values = {name: jnp.ones(()) for name in ("weight", "penalty", "keep")}
        return {"calls": zero, "holdout": zero, **values}

    def calibrate(self, state, predictions, mask):
        chex.assert_equal_shape_prefix([predictions.sample, mask], 1)
        return {**state, "holdout": state["holdout"] + mask.sum().astype(jnp.int32)}

    def sample(self, predictions, h, key):
        return jnp.zeros_like(predictions.sample) + h

    def apply(self, state, predictions, h, horizon, key):
        index = jnp.arange(self.batch)
        output = trust.TrustOutput(
            continue_mask=~((index % 4 == 1) & (h == 1)),
            keep_mask=(index % 4 != 2) & (state["keep"] > 0),
            reward_penalty=jnp.broadcast_to(state["penalty"], self.batch),
            weight=jnp.broadcast_to(state["weight"] * (10.0 * horizon + h), self.batch),
        )
        return {**state, "calls": state["calls"] + 1}, output


@pytest.fixture
def strict(make, spec, monkeypatch):
    """Return a configuration with that rule, which is registered as by a user."""
    monkeypatch.setitem(trust.TRUST, "strict", Strict)
    return make({"rollout.horizon": 3}, trust="strict")


def make_learner(config, spec):
    """Return a learner with a full real buffer, and scales that are not those of its transform."""
    learner = jax.jit(MBPO(config, spec).init)(config, jnp.array(0), jnp.array(0))
    numbers = jnp.arange(120.0)
    obs = jnp.stack([numbers / 100, numbers, numbers], -1)
    data = learner.real_buffer.unpack()._replace(obs=obs)
    stats = learner.model.stats._replace(change_std=jnp.array([0.5, 2.0, 10.0, 4.0]))
    return learner._replace(
        real_buffer=replay.of_transitions(data, jnp.ones(120, bool)),
        model=learner.model._replace(stats=stats),
    )


def with_trust(learner, **values):
    """Return the learner with other values in the state of its rule."""
    changed = {name: jnp.float32(value) for name, value in values.items()}
    return learner._replace(trust={**learner.trust, **changed})


def first_transition(learner):
    return jax.tree.map(lambda x: x[0], learner.real_buffer.unpack())


def test_outputs_of_a_rule_are_applied_to_buffered_rollouts(strict, spec):
    algorithm = MBPO(strict, spec)

    @jax.jit
    def roll_out(learner):
        source, keys = algorithm.source(learner), SourceKeys(KEY, KEY, KEY)
        env = algorithm.model_env(learner)
        return source.add_rollouts(learner, SHARED, env, jnp.arange(B), 3, keys)

    after, metrics = roll_out(make_learner(strict, spec))

    def by_step(x):
        return np.asarray(x).reshape(8, B, *x.shape[1:])

    valid, weight = by_step(after.synthetic.valid), by_step(after.synthetic.weight)
    data = jax.tree.map(by_step, after.synthetic.unpack())
    index = np.arange(B)
    # Left out by `keep_mask`; ended by `continue_mask` and then invalid.
    np.testing.assert_array_equal(valid[0], index % 4 != 2)
    np.testing.assert_array_equal(valid[1], index % 4 != 2)
    np.testing.assert_array_equal(valid[2], ~np.isin(index % 4, (1, 2)))
    assert not valid[3:].any()
    for h in range(3):
        # The rule's sample is h in standard units; the penalty is one deviation of the reward.
        change = data.next_obs[h] - data.obs[h]
        np.testing.assert_allclose(change, h * np.array([[0.5, 2.0, 10.0]] * B), rtol=1e-5)
        np.testing.assert_allclose(data.reward[h], h * 4.0 - 4.0, rtol=1e-6)
        np.testing.assert_array_equal(weight[h], 30 + h)
    assert_metrics(metrics, valid[:3].mean(1))
    assert after.trust == {"calls": 3, "holdout": 0, "weight": 1, "penalty": 1, "keep": 1}


def assert_metrics(metrics, kept):
    """Check the metrics of three steps with `Strict`, of which `kept` (3,) are learned from."""
    np.testing.assert_allclose(
        [metrics[f"accepted_fraction_{h}"] for h in (1, 2, 3)], kept, rtol=1e-6
    )
    np.testing.assert_allclose(metrics["valid_fraction"], kept.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["penalty"], 4.0, rtol=1e-6)
    weight = np.average(30.0 + np.arange(3), weights=kept)
    np.testing.assert_allclose(metrics["weight"], weight, rtol=1e-6)


def make_on_the_fly(make, mixing, **settings):
    """Return a configuration with the rule `strict` and rollouts of three steps on the fly."""
    settings = {"rollout.source": "on_the_fly", "rollout.mixing": mixing, **settings}
    return make({"rollout.horizon": 3, **settings}, trust="strict")


@pytest.mark.parametrize("mixing", ["mixed", "separate"])
def test_outputs_of_a_rule_are_logged_for_rollouts_on_the_fly(make, strict, spec, mixing):
    config = make_on_the_fly(make, mixing)
    learner = make_learner(config, spec)
    learn = jax.jit(MBPO(config, spec).learn)
    _, metrics = learn(learner, SHARED, first_transition(learner), jnp.array(True))
    index = np.arange(config.num_parallel_rollouts) % 4
    kept = [(index != 2).mean(), (index != 2).mean(), np.isin(index, (0, 3)).mean()]
    assert_metrics(metrics, np.array(kept))


def test_rule_is_calibrated_on_the_holdout_at_each_fit(strict, spec):
    algorithm, learner = MBPO(strict, spec), make_learner(strict, spec)
    holdout_key = algorithm._holdout_key(learner)
    data = fit_data.split(strict.model, learner.real_buffer, holdout_key)
    after, _ = jax.jit(algorithm.fit)(learner, SHARED)
    assert after.trust["holdout"] == data.holdout_mask.sum() > 10


def test_weights_and_masks_reach_the_losses(strict, spec):
    """A reward of weight 0 does not affect the critics, and that of an invalid transition nothing."""
    learner = make_learner(strict, spec)
    learn = jax.jit(MBPO(strict, spec).learn)
    transition = Transition(*(jnp.zeros(s) for s in (D, A, (), (), D)))

    def learned(**values):
        changed = with_trust(learner, **values)
        after, metrics = learn(changed, SHARED, transition, jnp.array(True))
        return after.agent, metrics

    def differ(a, b):
        return not np.array_equal(a.critic["hidden_0"]["kernel"], b.critic["hidden_0"]["kernel"])

    plain, metrics = learned()
    assert differ(plain, learned(penalty=-1000)[0]) and metrics["valid_fraction"] > 0.5
    weightless, _ = learned(weight=0)
    chex.assert_trees_all_equal(weightless.critic, learned(weight=0, penalty=-1000)[0].critic)
    # All transitions in the synthetic buffer are invalid.
    real, metrics = learned(keep=0)
    chex.assert_trees_all_equal(real, learned(keep=0, penalty=-1000)[0])
    assert metrics["valid_fraction"] == 0
    # The real transition of each minibatch still counts.
    for agent in (weightless, real):
        assert differ(learner.agent, agent) and differ(agent, plain)


@pytest.mark.parametrize("lacking", [{"keep": 0}, {"weight": 0}])
@pytest.mark.parametrize("mixing", ["mixed", "separate"])
def test_update_in_which_no_transition_counts_changes_nothing(make, strict, spec, mixing, lacking):
    """Neither by momentum nor by decay, nor the temperature by an entropy of 0."""
    config = make_on_the_fly(make, mixing, **{"rollout.real_fraction": 0.0})
    algorithm, learner = MBPO(config, spec), make_learner(config, spec)
    learn = jax.jit(algorithm.learn)
    transition = first_transition(learner)
    # The first agent step gives the optimizers a momentum.
    learner, _ = learn(learner, SHARED, transition, jnp.array(True))
    learner = with_trust(learner, **lacking)
    after, metrics = learn(learner, SHARED, transition, jnp.array(True))
    assert (metrics["valid_fraction"] > 0) == ("weight" in lacking)
    if mixing == "mixed":
        chex.assert_trees_all_equal(after.agent, learner.agent)
        return
    # Only the updates on real transitions have an effect.
    source, agent, expected = algorithm.source(learner), algorithm.agent(learner), learner.agent
    keys = algorithm._split_keys(learner, source)
    real, _ = algorithm._sample_real(learner, SHARED, source, keys)
    noise = agent.noise(keys.update, 2 * config.learn.utd)
    gradient_step = jax.jit(functools.partial(_gradient_step, agent, may_be_empty=False))
    for u in range(config.learn.utd):
        batch = replay.to_minibatch(jax.tree.map(lambda x, u=u: x[u], real))
        expected, _ = gradient_step(expected, batch, noise[2 * u])
    chex.assert_trees_all_close(after.agent, expected, rtol=1e-4, atol=1e-6)


def test_weight_of_an_invalid_transition_may_be_nan(make, spec):
    """Even if products are computed one by one, where 0 times NaN is NaN."""
    config = make(
        {"rollout.source": "on_the_fly", "rollout.real_fraction": 0.5}, trust="uncertainty_weight"
    )
    algorithm, learner = MBPO(config, spec), make_learner(config, spec)
    params = jax.tree.map(lambda x: x.at[2].set(jnp.nan), learner.model.params)
    model = learner.model._replace(params=params, elites=jnp.array([0, 1], jnp.int32))
    learner = learner._replace(model=model)
    agent, source = algorithm.agent(learner), algorithm.source(learner)
    real = replay.gather(learner.real_buffer, jnp.arange(config.real_batch))
    obs = learner.real_buffer.unpack().obs[: config.num_parallel_rollouts]
    env = algorithm.model_env(learner).select_members()
    noise = env.draw_rollout(KEY, 1, len(obs))
    inputs = UpdateInputs(real, starts=RolloutStarts(obs, noise))
    with jax.disable_jit():
        _, (batch,), metrics = source.minibatches(env, None, inputs)
        noise = agent.noise(KEY, 1)[0]
        state, _ = _gradient_step(agent, learner.agent, batch, noise, may_be_empty=False)
    assert metrics["valid_fraction"] == 0 and np.isnan(batch.weight).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_state_of_a_rule_is_in_the_checkpoint(strict, spec, tmp_path):
    program = build(strict, spec)
    state = program.init()
    changed = {name: value + 7 for name, value in state.learners.trust.items()}
    state = state._replace(learners=state.learners._replace(trust=changed))

    def open_writer():
        parameters = program.parameters()
        return RunWriter(
            tmp_path,
            strict,
            program.spec,
            program.placement,
            "test",
            parameters,
            Progress(strict, quiet=True),
            False,
        )

    with open_writer() as writer:
        writer.begin(0, 0, ())
        writer.save(10, state, {}, {})
    with open_writer() as writer:
        restored = writer.restore(program.shapes())
    assert restored.step == 10
    chex.assert_trees_all_equal(restored.state.learners.trust, state.learners.trust)
    chex.assert_trees_all_equal(restored.state, state)


# --- Value weight of a model whose reward depends on the next state -------------------------------


class BadStates(DynamicsModel):
    """Members predict different next states, all wrong, and the exact reward of a next state."""

    has_variance = True

    def init(self, key, members):
        return {"offset": 0.3 * jax.random.normal(key, (members, 1))}

    def predict_joint(self, params, stats, obs, action):
        state = jnp.broadcast_to(params["offset"], obs.shape)
        z = jnp.concatenate([state, jnp.zeros_like(obs[..., :1])], -1)
        return Gaussian(z, jnp.full_like(z, -10.0))

    def predict_reward(self, params, stats, obs, action, next_obs):
        reward = next_obs.sum(-1, keepdims=True)
        return Gaussian(reward, jnp.full_like(reward, -10.0))

    def loss(self, params, stats, batch):
        return jnp.zeros(())

    def output_heads(self):
        return ()


@pytest.mark.parametrize("per_transition", [False, True])
def test_value_weight_counts_the_rewards_of_wrong_next_states(
    make, spec, monkeypatch, per_transition
):
    """Without discounting, TD targets are rewards, and those of the model's next states are wrong."""
    monkeypatch.setitem(MODELS, "bad", BadStates)
    settings = {
        "model.network": "bad",
        "model.reward_from": "next_state",
        "learn.discount": 0.0,
        "trust.per_transition": per_transition,
    }
    config = make({"rollout.source": "on_the_fly", **settings}, trust="value_weight")
    algorithm = MBPO(config, spec._replace(termination=None))
    keys = jax.random.split(KEY, 3)
    obs = jax.random.normal(keys[0], (120, D))
    next_obs = obs + jax.random.normal(keys[1], (120, D))
    data = Transition(obs, jnp.zeros((120, A)), next_obs.sum(-1), jnp.ones(120), next_obs)

    @jax.jit
    def calibrated():
        learner = algorithm.init(config, jnp.array(0), jnp.array(0))
        learner = learner._replace(real_buffer=replay.of_transitions(data, jnp.ones(120, bool)))
        split = algorithm.begin_fit(learner).data
        learner = algorithm._calibrate(learner, learner.model, split)
        env = algorithm.model_env(learner)
        _, step = env.step(learner.trust, OBS, ACTIVE, 0, 1, KEY)
        predicted = env.state.params["offset"] * D
        return learner.trust, step.weight, predicted, split

    state, weight, offsets, split = calibrated()
    held = np.asarray(split.holdout_mask) > 0
    truth = np.asarray(split.holdout.reward)[held]
    error = np.var(np.asarray(split.holdout.obs).sum(-1)[held] - truth) / np.var(truth)
    np.testing.assert_allclose(state.error, error, rtol=1e-4)
    if per_transition:
        # Nothing else differs between the members.
        error = np.var(np.asarray(offsets)) / state.td_variance
    np.testing.assert_allclose(weight, np.full(B, 1 / (1 + error)), rtol=1e-4)
