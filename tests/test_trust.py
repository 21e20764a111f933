"""Rules of trust: none of them costs nothing, a penalty by hand, and what a verdict does."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import replay, trust
from dynajax.mbpo import Algorithm, _Fresh
from dynajax.models import ensemble, fit_data, rollouts, targets, training
from dynajax.models.recoding import rescale_head
from dynajax.runs.writer import RunWriter
from dynajax.runtime.program import build
from dynajax.trust.penalty import Penalty, PenaltyFields
from dynajax.types import Shared, TargetTransform, Transition, UsageError
from jaxprs import equations

B, E, K, D, A = 8, 3, 2, 3, 2
OBS = jnp.asarray(np.random.default_rng(0).normal(size=(B, D)), jnp.float32)
ALL = jnp.ones(B, bool)  # rollouts go on
KEY = jax.random.PRNGKey(3)


def policy(obs, key):
    noise = jax.random.normal(key, (len(obs), A))
    return jnp.tanh(obs[:, :A] + 0.1 * noise), -noise.sum(-1)


@pytest.fixture(scope="module")
def model(make, spec):
    """A new model of bounds so wide that no log-variance is bent, under another unit."""
    config = make({"model.log_variance_min": -60, "model.log_variance_max": 60})
    model = jax.jit(ensemble.init, static_argnums=1)(config.model, spec, jax.random.PRNGKey(0))
    return config, model._replace(
        unit=jnp.array([0.5, 2.0, 10.0, 3.0]), elites=jnp.array([2, 0], jnp.int32)
    )


def step(config, spec, rule, model, state=None, h=0, length=1):
    """One step of rollouts from `OBS`: the rule's state, and what was imagined."""
    arguments = config, spec, rule, policy
    inner = jax.jit(lambda *dynamic: rollouts.model_step(*arguments, *dynamic))
    return inner(rollouts.asked(rule, model), state, OBS, ALL, h, length, KEY)


# --- no rule ---------------------------------------------------------------------------------


def published(config, spec, model, obs, key):
    """A step of Janner et al.'s rollouts, where nothing knows of rules."""
    action_key, order_key, noise_key = jax.random.split(key, 3)
    action, _ = policy(obs, action_key)
    order = jax.random.permutation(order_key, model.elites)
    means, log_variances = ensemble.predict_all(config.model, model, obs, action)
    member = jnp.repeat(order, B // K)
    mean, log_variance = (x[member, jnp.arange(B)] for x in (means, log_variances))
    noise = jax.random.normal(noise_key, mean.shape)
    z = mean + jnp.exp(0.5 * log_variance) * noise
    next_obs, reward = targets.decode(model.code, obs, z)
    ended = jax.vmap(spec.termination)(obs, action, next_obs)
    return Transition(obs, action, reward, 1.0 - ended.astype(jnp.float32), next_obs)


SHARED = Shared(jnp.array(119), jnp.array(0))


def products(function, *arguments) -> list[tuple[int, ...]]:
    """Shapes of the results of all matrix products in a function's program."""

    program = jax.make_jaxpr(function)(*arguments).jaxpr
    return [
        equation.outvars[0].aval.shape
        for equation in equations(program)
        if equation.primitive.name == "dot_general"
    ]


def test_the_rule_none_is_no_rule_to_the_bit(model, spec):
    config, network = model
    rule = trust.make_rule(config, spec)
    assert type(rule) is trust.TrustRule and config.trust_name == "none"
    state, imagined = step(config, spec, rule, network)
    expected = jax.jit(lambda: published(config, spec, network, OBS, KEY))()
    chex.assert_trees_all_equal(imagined.transition, expected)
    assert state is None and imagined.weight is None and imagined.penalty is None
    assert imagined.continue_mask.all() and imagined.keep_mask.all()


def test_other_members_are_evaluated_only_where_a_rule_asks(make, spec):
    layers = [8, 8, 2 * (D + 1)]
    shapes = {}
    for name in ("none", "penalty"):
        config = make(trust=name)
        rule, model = trust.make_rule(config, spec), ensemble.init(config.model, spec, KEY)
        asked = rollouts.asked(rule, model)
        imagine = functools.partial(rollouts.model_step, config, spec, rule, policy, asked)
        shapes[name] = products(imagine, None, OBS, ALL, 0, 1, KEY)
    # Every elite on its own share alone; or every member on all.
    assert shapes["none"] == [(K, B // K, width) for width in layers]
    assert shapes["penalty"] == [(E, B, width) for width in layers]


def test_the_reward_is_read_once_from_the_next_state(make, spec):
    config = make({"model.reward_from": "next_state"})
    rule, model = trust.make_rule(config, spec), ensemble.init(config.model, spec, KEY)
    asked = rollouts.asked(rule, model)
    imagine = functools.partial(rollouts.model_step, config, spec, rule, policy, asked)
    layers = [8, 8, 2 * (D + 1), *[config.model.width] * ensemble.REWARD_DEPTH, 2]
    assert products(imagine, None, OBS, ALL, 0, 1, KEY) == [(K, B // K, width) for width in layers]


def test_a_fit_asks_no_more_without_a_rule(make, spec):
    counts = {}
    for name in ("none", "penalty"):
        config = make(trust=name)
        algorithm = Algorithm(config, spec)
        row = jax.eval_shape(algorithm.init, config, jnp.array(0), jnp.array(0))
        counts[name] = len(products(algorithm.fit, row, SHARED))
        if name == "none":
            alone = functools.partial(training.fit, config.model, [()])
            plain = products(alone, row.variant, row.model, row.real_buffer, row.key, row.key, 5)
            assert len(plain) == counts[name] > 0
            # The ring has a column of weights, and the row a state, only where a rule wants it.
            assert row.trust is None and row.synthetic_buffer.weight is None
    assert counts["penalty"] > counts["none"]


# --- the penalty -------------------------------------------------------------------------------


def penalty(kind, scale, mean, variance):
    """By the rule, of means and variances (E, B, D+1)."""
    mean, variance = jnp.asarray(mean, jnp.float32), jnp.asarray(variance, jnp.float32)
    rule = Penalty(PenaltyFields(kind, scale), None, mean.shape[1])
    predictions = trust.Predictions(mean, variance, jnp.zeros(mean.shape[1], int), mean[0])
    state, verdict = rule.apply(None, predictions, 0, 1, KEY)
    assert state is None
    assert all(part is None for part in verdict._replace(penalty=None))
    return verdict.reward_penalty


def test_the_penalty_of_two_members_and_one_channel_by_hand():
    mean, variance = [[[1.0], [5.0]], [[3.0], [5.0]]], [[[4.0], [0.25]], [[9.0], [0.04]]]
    # The larger standard deviation: 3, and 0.5; half of it
    np.testing.assert_allclose(penalty("noise", 0.5, mean, variance), [1.5, 0.25])
    # 1 and 3 lie 1 from their mean; equal ones nowhere
    np.testing.assert_allclose(penalty("spread", 0.5, mean, variance), [0.5, 0.0])
    np.testing.assert_allclose(penalty("spread", -2.0, mean, variance), [-2.0, 0.0])


def test_channels_count_together():
    # ||(3, 4)|| = 5 against ||(1, 1)||; the means' deviations are 1 and 2
    mean, variance = [[[0.0, 1.0]], [[2.0, 5.0]]], [[[9.0, 16.0]], [[1.0, 1.0]]]
    np.testing.assert_allclose(penalty("noise", 1.0, mean, variance), [5.0])
    np.testing.assert_allclose(penalty("spread", 1.0, mean, variance), [np.sqrt(5)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["noise", "spread"])
@pytest.mark.parametrize(("far", "apart"), [(0, 1e-12), (1e4, 0.1), (1e6, 1.0), (0, 1e15)])
@pytest.mark.parametrize("variance", [1e-30, 1e-9, 1.0, 1e30])
def test_float32_is_enough(kind, far, apart, variance):
    rng = np.random.default_rng(1)
    mean = np.float32(far + apart * rng.normal(size=(5, 6, 4)))
    variances = np.float32(variance * np.exp(rng.normal(size=(5, 6, 4))))
    result = penalty(kind, 1.5, mean, variances)
    m, v = mean.astype(np.float64), variances.astype(np.float64)
    u = {
        "noise": np.sqrt(v.sum(-1)).max(0),
        "spread": np.sqrt(((m - m.mean(0)) ** 2).mean(0).sum(-1)),
    }
    np.testing.assert_allclose(result, 1.5 * u[kind], rtol=0.02)


def test_a_reward_loses_the_penalty_in_units_of_its_deviation(make, model, spec):
    config, network = model
    for kind in ("noise", "spread"):
        settings = {"trust.kind": kind, "trust.scale": 0.7}
        rule = trust.make_rule(make(settings, trust="penalty"), spec)
        _, plain = step(config, spec, trust.TrustRule(None, spec, B), network)
        _, judged = step(config, spec, rule, network)
        mean, log_variance = ensemble.predict_all(
            config.model, network, OBS, plain.transition.action
        )
        unit = np.asarray(network.unit)
        u = penalty(kind, 0.7, mean / unit, jnp.exp(log_variance) / unit**2)
        loss = plain.transition.reward - judged.transition.reward
        np.testing.assert_allclose(loss, u * unit[-1], rtol=1e-3)
        np.testing.assert_allclose(judged.penalty, u * unit[-1], rtol=1e-4)
        assert (np.asarray(loss) > 1e-3).all()
        np.testing.assert_allclose(
            judged.transition.next_obs, plain.transition.next_obs, rtol=1e-4, atol=1e-5
        )


def test_units_do_not_depend_on_the_code(make, model, spec):
    """The same predictions under codes none and scale: the same penalty, and the same sample."""
    config, plain = model
    code = TargetTransform(
        plain.code.skip,
        jnp.array([0.3, -1.0, 4.0, 0.2]),
        jnp.array([0.5, 2.0, 10.0, 3.0]) / 7,
        jnp.zeros(()),
    )
    scaled = rescale_head(plain, code, jnp.zeros(D + 1, bool), KEY)
    for kind in ("noise", "spread"):
        rule = trust.make_rule(make({"trust.kind": kind}, trust="penalty"), spec)
        one, other = (step(config, spec, rule, network)[1] for network in (plain, scaled))
        chex.assert_trees_all_close(one.transition, other.transition, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"settings": {"trust.scale": -1}},
        {"settings": {"trust.scale": -1, "trust.kind": "noise"}},
        {"vary": {"trust.scale": [1, -1]}},
    ],
)
def test_a_bonus_is_for_disagreement_only(make, arguments):
    with pytest.raises(UsageError, match=r"^--set trust\.scale=-1: .*trust\.kind=spread") as error:
        make(trust="penalty", **arguments)
    assert "\n" not in str(error.value)
    settings = {"trust.kind": "spread", **arguments.get("settings", {}), "trust.scale": -1}
    assert make(settings | {"trust.kind": "spread"}, trust="penalty").trust.scale == -1


# --- what a verdict does -------------------------------------------------------------------------


class Strict(trust.TrustRule):
    """Ends rollouts and leaves transitions out; its state counts, and says what they are worth."""

    needs_all_members = True
    uses_weights = True
    figures = ("penalty", "weight")

    def init(self):
        zero = jnp.zeros((), jnp.int32)
        worth = {name: jnp.ones(()) for name in ("weight", "penalty", "store")}
        return {"calls": zero, "held": zero, **worth}

    def calibrate(self, state, predictions, counts):
        chex.assert_equal_shape_prefix([predictions.sample, counts], 1)
        return {**state, "held": state["held"] + counts.sum().astype(jnp.int32)}

    def sample(self, predictions, h, key):
        return jnp.zeros_like(predictions.sample) + h

    def apply(self, state, predictions, h, horizon, key):
        index = jnp.arange(self.batch)
        verdict = trust.TrustOutput(
            alive=~((index % 4 == 1) & (h == 1)),
            store=(index % 4 != 2) & (state["store"] > 0),
            penalty=jnp.broadcast_to(state["penalty"], self.batch),
            weight=jnp.broadcast_to(state["weight"] * (10.0 * horizon + h), self.batch),
        )
        return {**state, "calls": state["calls"] + 1}, verdict


@pytest.fixture
def strict(make, spec, monkeypatch):
    """A configuration with that rule, registered as a user would."""
    monkeypatch.setitem(trust.TRUST, "strict", Strict)
    return make({"rollout.horizon": 3}, trust="strict")


def filled_row(config, spec):
    """A row with a full real ring, and units that are not its code's."""
    row = jax.jit(Algorithm(config, spec).init)(config, jnp.array(0), jnp.array(0))
    names = jnp.arange(120.0)
    obs = jnp.stack([names / 100, names, names], -1)
    real = replay.pack(row.real_buffer.data._replace(obs=obs), jnp.ones(120, bool))
    return row._replace(
        real=real,
        model=row.model._replace(unit=jnp.array([0.5, 2.0, 10.0, 4.0])),
    )


def test_a_verdict_is_obeyed(strict, spec):
    row = filled_row(strict, spec)
    slots = jnp.arange(B)
    roll_out = jax.jit(lambda row: Algorithm(strict, spec).roll_out(row, SHARED, 3, slots, KEY))
    after, metrics = roll_out(row)
    ring = jax.tree.map(lambda x: np.asarray(x).reshape(8, B, *x.shape[1:]), after.synthetic)
    index = np.arange(B)
    # Left out by `store`; ended, and then no longer stored, by `alive`.
    np.testing.assert_array_equal(ring.valid[0], index % 4 != 2)
    np.testing.assert_array_equal(ring.valid[1], index % 4 != 2)
    np.testing.assert_array_equal(ring.valid[2], ~np.isin(index % 4, (1, 2)))
    assert not ring.valid[3:].any()
    for h in range(3):
        # The rule's sample, z = h in standard units, less one deviation of the reward.
        moved = ring.data.next_obs[h] - ring.data.obs[h]
        np.testing.assert_allclose(moved, h * np.array([[0.5, 2.0, 10.0]] * B), rtol=1e-5)
        np.testing.assert_allclose(ring.data.reward[h], h * 4.0 - 4.0, rtol=1e-6)
        np.testing.assert_array_equal(ring.weight[h], 30 + h)
    kept = ring.valid[:3].mean(1)
    _says(metrics, kept)
    assert after.trust == {"calls": 3, "held": 0, "weight": 1, "penalty": 1, "store": 1}


def _says(metrics, kept):
    """Three steps of `Strict`, of which `kept` (3,) are learned from: the reward's unit is 4."""
    np.testing.assert_allclose(
        [metrics[f"accepted_fraction_{h}"] for h in (1, 2, 3)], kept, rtol=1e-6
    )
    np.testing.assert_allclose(metrics["valid_fraction"], kept.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["penalty"], 4.0, rtol=1e-6)
    weight = np.average(30.0 + np.arange(3), weights=kept)
    np.testing.assert_allclose(metrics["weight"], weight, rtol=1e-6)


@pytest.mark.parametrize("on_top", [False, True])
def test_a_verdict_on_what_is_imagined_afresh_is_logged(make, strict, spec, on_top):
    """Of the same rule, by a whole step's learning."""
    settings = {"rollout.fresh": True, "rollout.on_top": on_top, "rollout.horizon": 3}
    config = make(settings, trust="strict")
    row = filled_row(config, spec)
    transition = jax.tree.map(lambda x: x[0], row.real_buffer.data)
    learn = jax.jit(Algorithm(config, spec).learn)
    _, metrics = learn(row, SHARED, transition, jnp.array(True))
    index = np.arange(config.num_parallel_rollouts) % 4
    _says(
        metrics,
        np.array(
            [(index != 2).mean(), (index != 2).mean(), (index == 0).mean() + (index == 3).mean()]
        ),
    )


def test_a_rule_is_calibrated_on_the_holdout_at_each_fit(strict, spec):
    algorithm, row = Algorithm(strict, spec), filled_row(strict, spec)
    data = fit_data.split(strict.model, row.real_buffer, algorithm._holdout_key(row))
    after, _ = jax.jit(algorithm.fit)(row, SHARED)
    assert after.trust["held"] == data.scored_weights.sum() > 10


def test_weights_and_holes_reach_the_losses(strict, spec):
    """A reward teaches the critics nothing where it weighs nothing, and nobody where it is a hole."""
    row = filled_row(strict, spec)
    learn = jax.jit(Algorithm(strict, spec).learn)
    one = Transition(*(jnp.zeros(s) for s in (D, A, (), (), D)))

    def learned(**worth):
        trusted = {**row.trust, **{name: jnp.float32(value) for name, value in worth.items()}}
        after, metrics = learn(row._replace(trust=trusted), SHARED, one, jnp.array(True))
        return after.agent, metrics

    def differ(a, b):
        return not np.array_equal(a.critic["hidden_0"]["kernel"], b.critic["hidden_0"]["kernel"])

    plain, metrics = learned()
    assert differ(plain, learned(penalty=-1000)[0]) and metrics["valid_fraction"] > 0.5
    weightless, _ = learned(weight=0)
    chex.assert_trees_all_equal(weightless.critic, learned(weight=0, penalty=-1000)[0].critic)
    # Nothing but holes is in the ring.
    real, metrics = learned(store=0)
    chex.assert_trees_all_equal(real, learned(store=0, penalty=-1000)[0])
    assert metrics["valid_fraction"] == 0
    # The real one of each minibatch counts all the same.
    for agent in (weightless, real):
        assert differ(row.agent, agent) and differ(agent, plain)


@pytest.mark.parametrize("on_top", [False, True])
def test_nothing_but_holes_teaches_nothing(make, strict, spec, on_top):
    """No momentum, no decay, and no entropy of no action."""
    settings = {
        "rollout.fresh": True,
        "rollout.on_top": on_top,
        "rollout.real_fraction": 0.0,
        "rollout.horizon": 3,
    }
    config = make(settings, trust="strict")
    algorithm, row = Algorithm(config, spec), filled_row(config, spec)
    learn = jax.jit(algorithm.learn)
    one = jax.tree.map(lambda x: x[0], row.real_buffer.data)
    # With a momentum.
    row, _ = learn(row, SHARED, one, jnp.array(True))
    row = row._replace(trust={**row.trust, "store": jnp.zeros(())})
    after, metrics = learn(row, SHARED, one, jnp.array(True))
    assert metrics["valid_fraction"] == 0
    if on_top:
        # What the real half taught, and no more.
        plain = make({"rollout.real_fraction": 1.0, "rollout.fresh": True})
        alone = Algorithm(plain, spec)
        real = replay.take(row.real_buffer, algorithm._slots(row, SHARED, algorithm._keys(row))[0])
        noise = alone.agent(row).noise(algorithm._keys(row).update, 2 * config.learn.utd)
        expected = row.agent
        for u in range(config.learn.utd):
            packed = jax.tree.map(lambda x, u=u: x[u], real)
            expected, _, _ = alone._update(row, expected, None, packed, None, (noise[2 * u],), None)
        chex.assert_trees_all_close(after.agent, expected, rtol=1e-4, atol=1e-6)
    else:
        chex.assert_trees_all_equal(after.agent, row.agent)


def test_a_hole_of_no_number_weighs_nothing(make, spec):
    """Not even where products are made one by one: 0 times what is no number is none."""
    config = make({"rollout.fresh": True, "rollout.real_fraction": 0.5}, trust="weight")
    algorithm, row = Algorithm(config, spec), filled_row(config, spec)
    odd = jax.tree.map(lambda x: x.at[2].set(jnp.nan), row.model.params)
    model = row.model._replace(params=odd, elites=jnp.array([0, 1], jnp.int32))
    row = row._replace(model=model)
    real = replay.take(row.real_buffer, jnp.arange(config.real_batch))
    noise = algorithm.agent(row).noise(KEY, 1)[0]
    starts = _Fresh(row.real_buffer.data.obs[: config.num_parallel_rollouts], KEY)
    with jax.disable_jit():
        agent, _, metrics = algorithm._update(row, row.agent, None, real, starts, (noise,), None)
    assert metrics["valid_fraction"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(agent))


def test_the_state_of_a_rule_is_in_the_checkpoint(strict, spec, tmp_path):
    program = build(strict, spec)
    state = program.init()
    trusted = {name: value + 7 for name, value in state.learners.trust.items()}
    state = state._replace(learners=state.learners._replace(trust=trusted))

    def journal():
        parameters = program.parameters()
        return RunWriter(
            tmp_path, strict, program.spec, program.placement, "test", parameters, True, False
        )

    with journal() as first:
        first.begin(0, 0, ())
        first.save(10, state, {}, {})
    with journal() as second:
        restored = second.restore(program.shapes())
    assert restored.step == 10
    chex.assert_trees_all_equal(restored.state.learners.trust, state.learners.trust)
    chex.assert_trees_all_equal(restored.state, state)
