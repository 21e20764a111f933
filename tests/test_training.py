"""Test fits of the ensemble: split of the data, schedules, elites, and what is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynajax import replay, trust
from dynajax.config import ModelConfig
from dynajax.models import (
    ensemble,
    evaluation,
    fit_data,
    likelihoods,
    make_model,
    targets,
    training,
)
from dynajax.models.model_env import ModelEnv
from dynajax.models.training import FitInputs, MemberState
from dynajax.types import EnvSpec, Transition
from dynajax.xla import backend
from jaxprs import equations

D, A, E, N = 2, 1, 3, 400
SPEC = EnvSpec("line", D, A, 50, ("x", "v"), None)
VARIANTS = [(), ("scale",), ("scale", "target")]
SIZES = {
    "members": E,
    "elites": 2,
    "width": 16,
    "depth": 2,
    "batch": 32,
    "fit_steps": 60,
    "round_steps": 20,
    "patience": 3,
    "max_holdout": 60,
    "learning_rate": 3e-3,
}
FIXED = ModelConfig(**SIZES)
HOLDOUT = jax.random.PRNGKey(5)


# Fields of the configuration that scale arithmetic are traced, as are variant, data and key.
@jax.jit
def fit(config, state, buffer, key, variant):
    dynamics = make_model(config, SPEC)
    result = training.fit(
        dynamics, VARIANTS, variant, state, buffer, HOLDOUT, key, config.fit_steps
    )
    return result[:2]


@jax.jit
def init(config, key):
    return ensemble.init(make_model(config, SPEC), key)


def train_members(config, state, buffer, steps):
    """Return all members after so many steps on the data, as in the middle of a fit."""
    data = fit_data.split(config, buffer, HOLDOUT)
    members = MemberState(state.params, state.opt_state)
    inputs = FitInputs(state.stats, data, members, jax.random.split(KEY, config.members))
    return training.train_members(make_model(config, SPEC), inputs, buffer, steps, "float32")


KEY = jax.random.PRNGKey(1)
NONE, SCALE = jnp.array(0), jnp.array(1)

#: s' = F s + G a, r = w s
F, G, W = np.array([[0.9, 0.2], [-0.1, 0.8]]), np.array([[0.3], [0.5]]), np.array([1.0, -0.5])


def linear_data(seed=0, size=N, filled=N):
    rng = np.random.default_rng(seed)
    obs, action = rng.normal(size=(size, D)), rng.uniform(-1, 1, (size, A))
    data = Transition(obs, action, obs @ W, np.ones(size), obs @ F.T + action @ G.T)
    return replay.of_transitions(
        Transition(*(jnp.asarray(x, jnp.float32) for x in data)), jnp.arange(size) < filled
    )


def changed(data, **columns):
    """Return the buffer with other values of some fields of its transitions."""
    return replay.of_transitions(data.unpack()._replace(**columns), data.valid)


def held_out(data, config=FIXED):
    """Return which slots are in the holdout: those that are valid and not in the training split."""
    return np.asarray(data.valid) & (np.asarray(fit_data.split(config, data, HOLDOUT).weights) == 0)


def mlp(layers, inputs):
    """Return outputs (E, B, 2 (D+1)) by NumPy in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), layers)
    x = np.asarray(inputs, np.float64)
    for i in range(len(params) - 1):
        layer = params[f"hidden_{i}"]
        x = x @ layer["kernel"] + layer["bias"][:, None]
        x = x / (1 + np.exp(-x))  # swish
    return x @ params["head"]["kernel"] + params["head"]["bias"][:, None]


def holdout_errors(model, data):
    """Return each member's mean squared error in z on the whole holdout, by NumPy."""
    chosen = held_out(data)
    obs, action, reward, _, new = (np.asarray(x, np.float64)[chosen] for x in data.unpack())
    skip, shift, scale, _ = (np.asarray(x, np.float64) for x in model.stats.transform)
    z = (np.concatenate([new - skip * obs, reward[:, None]], 1) - shift) / scale
    inputs = (np.concatenate([obs, action], 1) - model.stats.input_mean) / model.stats.input_std
    mean = mlp(model.params["network"], np.broadcast_to(inputs, (E, *inputs.shape)))
    return ((mean[..., : D + 1] - z) ** 2).mean((1, 2))


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- Training split and holdout -------------------------------------------------------------------


def test_transition_stays_on_its_side_of_the_split():
    size = 4000
    sides = []
    for filled in (1000, 2500, 4000):
        data = linear_data(size=size, filled=filled)
        split = fit_data.split(FIXED, data, HOLDOUT)
        weights = np.asarray(split.weights)
        assert not weights[filled:].any()
        # The slots of the training split come first, each of them once, and then padding.
        count = int(split.training_size)
        np.testing.assert_array_equal(split.training[:count], np.flatnonzero(weights))
        assert 1 - count / filled == pytest.approx(0.2, abs=0.03)
        sides.append(weights[:1000])
    np.testing.assert_array_equal(sides[0], sides[1])
    np.testing.assert_array_equal(sides[0], sides[2])


def test_invalid_transitions_are_on_neither_side_of_the_split():
    data = linear_data()
    data = replay.of_transitions(data.unpack(), jnp.arange(N) % 3 > 0)
    split = fit_data.split(ModelConfig(max_holdout=N), data, HOLDOUT)
    training = set(np.asarray(split.training)[: int(split.training_size)].tolist())
    chosen = np.asarray(split.holdout_mask) == 1
    rewards = np.asarray(split.holdout.reward)[chosen]
    held = set(np.flatnonzero(np.isin(data.unpack().reward, rewards)).tolist())
    assert training.isdisjoint(held)
    assert training | held == set(np.flatnonzero(np.arange(N) % 3 > 0).tolist())


def test_large_holdout_is_evenly_subsampled():
    data = linear_data()
    data = changed(data, reward=jnp.arange(N, dtype=jnp.float32))
    slots = np.flatnonzero(held_out(data))
    assert len(slots) > 60
    split = fit_data.split(FIXED, data, HOLDOUT)
    expected = slots[np.arange(60) * len(slots) // 60]
    np.testing.assert_array_equal(split.holdout.reward, expected)
    assert split.holdout_mask.all()


def test_holdout_does_not_affect_the_parameters():
    data = linear_data()
    held = held_out(data)[:, None]
    clean = data.unpack()
    poisoned = changed(
        data,
        obs=clean.obs + 1e6 * held,
        reward=clean.reward - 1e6 * held[:, 0],
        next_obs=clean.next_obs * (1 - 1e6 * held),
    )
    model = init(FIXED, KEY)
    clean_fit, metrics = fit(FIXED, model, data, KEY, SCALE)
    poisoned_fit, poisoned_metrics = fit(FIXED, model, poisoned, KEY, SCALE)
    assert equal(clean_fit._replace(elites=0), poisoned_fit._replace(elites=0))
    assert poisoned_metrics["holdout_mse"] > 1e6 * metrics["holdout_mse"]
    # The same change to transitions of the training split does affect them.
    rolled = jax.tree.map(lambda x: jnp.roll(x, 1, 0), poisoned.unpack())
    learned = replay.of_transitions(rolled, poisoned.valid)
    assert not equal(clean_fit.params, fit(FIXED, model, learned, KEY, SCALE)[0].params)


def test_holdout_of_little_data_is_not_empty():
    data = linear_data(filled=50)
    split = fit_data.split(ModelConfig(**SIZES, holdout=0.001), data, HOLDOUT)
    assert split.holdout_mask.sum() >= 1
    assert 40 < split.training_size < 50


# --- Fits -----------------------------------------------------------------------------------------


def test_members_sample_different_minibatches():
    model = init(FIXED, KEY)
    same = jax.tree.map(lambda p: jnp.stack([p[0]] * E), model.params["network"])
    model = model._replace(params={"network": same})
    layers = fit(FIXED, model, linear_data(), KEY, SCALE)[0].params["network"]
    kernels = np.asarray(layers["hidden_0"]["kernel"])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(kernels[i] - kernels[j]).max() > 1e-4


def test_fit_of_fixed_length_continues_from_the_last_fit():
    data = linear_data()
    first, metrics = fit(FIXED, init(FIXED, KEY), data, KEY, NONE)
    assert metrics["fit_steps"] == 60 and first.num_fits == 1
    np.testing.assert_array_equal(first.opt_state[0].count, [60] * E)
    second, _ = fit(FIXED, first, data, jax.random.PRNGKey(2), NONE)
    assert second.num_fits == 2
    np.testing.assert_array_equal(second.opt_state[0].count, [120] * E)
    # With a learning rate of 0 a fit returns the same weights, so none are initialized again.
    unchanged, _ = fit(
        ModelConfig(**SIZES | {"learning_rate": 0.0}), second, data, jax.random.PRNGKey(3), NONE
    )
    assert equal(unchanged.params, second.params)


@pytest.mark.parametrize(
    ("over", "means"),
    [
        (1, [1, 2, 3, 4]),  # the last one
        (2, [1, 1.5, 2.25, 3.125]),  # the mean of two, then of the mean and the new one
        (9, [1, 1.5, 2, 2.5]),  # the mean of all
    ],
)
def test_weight_averages_by_hand(over, means, monkeypatch):
    # Each step adds one to every weight.
    unit = optax.stateless(lambda gradient, _: jax.tree.map(jnp.ones_like, gradient))
    monkeypatch.setattr(
        training,
        "optimizer",
        lambda config: unit._replace(update=lambda g, s, p: (unit.update(g, ())[0], s)),
    )
    config, data = ModelConfig(**SIZES, weight_averaging_steps=over), linear_data()
    model = init(config, KEY)
    for steps, mean in enumerate(means, 1):
        after = train_members(config, model, data, steps)
        for old, new in zip(
            jax.tree.leaves(model.params), jax.tree.leaves(after.params), strict=True
        ):
            np.testing.assert_allclose(new - old, mean, rtol=1e-5)


def test_weight_averaging_reduces_the_holdout_error():
    errors, data = {}, [linear_data(seed) for seed in range(4)]
    for over in (1, 30):
        config = ModelConfig(**SIZES | {"fit_steps": 600, "weight_averaging_steps": over})
        fits = [fit(config, init(config, KEY), one, KEY, SCALE)[0] for one in data]
        errors[over] = np.mean([holdout_errors(*pair) for pair in zip(fits, data, strict=True)])
    assert errors[30] < 0.75 * errors[1], errors


def test_members_trained_sequentially_equal_members_trained_together(monkeypatch):
    data, trained, model = linear_data(), [], init(FIXED, KEY)
    for in_turn in (True, False):
        lowering = backend.CPU._replace(fits_in_turn=in_turn)
        monkeypatch.setattr(backend, "lowering", lambda lowering=lowering: lowering)
        trained.append(train_members(FIXED, model, data, 100))
    for one, other in zip(*(jax.tree.leaves(m) for m in trained), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    assert not equal(trained[0].params["network"], model.params["network"])
    assert trained[0].params.keys() == {"network"}


def test_data_of_learners_analyzed_sequentially_equal_those_analyzed_together():
    buffers = [linear_data(seed, filled=filled) for seed, filled in ((0, N), (1, 90))]
    data = jax.tree.map(lambda *x: jnp.stack(x), *buffers)
    dynamics, model = make_model(FIXED, SPEC), init(FIXED, KEY)
    variants = jnp.array([1, 2])

    def prepared():
        """Return the results, and how often the raw targets of all learners occur in the program."""
        function = jax.vmap(
            lambda variant, data: training.prepare(
                dynamics, VARIANTS, variant, model, data, HOLDOUT
            )
        )
        text = str(jax.make_jaxpr(function)(variants, data))
        return function(variants, data), text.count(f"f32[2,{N},{D + 1}]")

    together, count_together = prepared()
    with backend.compiling_for("gpu"):
        in_turn, count_in_turn = prepared()
    assert count_together and not count_in_turn
    for one, other in zip(*(jax.tree.leaves(x) for x in (together, in_turn)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert not equal(in_turn[1].weights[0], in_turn[1].weights[1])


def test_learned_bounds_differ_between_members():
    config = ModelConfig(**SIZES, learned_bounds=True)
    initial = init(config, KEY)
    model, _ = fit(config, initial, linear_data(), KEY, SCALE)
    for name in ("low", "high"):
        moved = np.asarray(model.params["bounds"][name] - initial.params["bounds"][name])
        assert (np.abs(moved) > 1e-4).all()
        assert len({moved[e].tobytes() for e in range(E)}) == E


def test_input_statistics_are_those_of_the_training_split():
    data = linear_data(3)
    model, _ = fit(FIXED, init(FIXED, KEY), data, KEY, NONE)
    training = ~held_out(data)
    inputs = np.concatenate([data.unpack().obs, data.unpack().action], 1)[training].astype(
        np.float64
    )
    np.testing.assert_allclose(model.stats.input_mean, inputs.mean(0), atol=1e-6)
    np.testing.assert_allclose(model.stats.input_std, inputs.std(0), rtol=1e-5)


def test_unit_of_trust_rules_is_the_change_with_every_transform():
    data = linear_data(3)
    training = ~held_out(data)
    obs, _, reward, _, new = (np.asarray(x, np.float64)[training] for x in data.unpack())
    change = np.concatenate([new - obs, reward[:, None]], 1)
    for variant, skip in enumerate((1, 1, 0)):
        model, _ = fit(FIXED, init(FIXED, KEY), data, KEY, jnp.array(variant))
        assert (model.stats.transform.skip == skip).all()
        np.testing.assert_allclose(model.stats.change_std, change.std(0), rtol=1e-5)


def test_holdout_predictions_are_in_standard_units():
    data = linear_data(filled=240)
    split = fit_data.split(FIXED, data, HOLDOUT)
    dynamics = make_model(FIXED, SPEC)
    predict = jax.jit(lambda state, data: evaluation.holdout_predictions(dynamics, state, data))
    held = held_out(data)
    obs, action, reward, _, new = (np.asarray(x, np.float64)[held] for x in data.unpack())
    for variant, skip in enumerate((1, 1, 0)):
        model, _ = fit(FIXED, init(FIXED, KEY), data, KEY, jnp.array(variant))
        predictions = predict(model, split)
        n = int(split.holdout_mask.sum())
        assert n == held.sum()
        stats = model.stats
        shift, scale, unit = (
            np.asarray(x, np.float64)
            for x in (stats.transform.shift, stats.transform.scale, stats.change_std)
        )
        truth = (np.concatenate([new - skip * obs, reward[:, None]], 1) - shift) / unit
        np.testing.assert_allclose(predictions.sample[:n], truth, rtol=1e-3, atol=1e-4)
        inputs = (np.concatenate([obs, action], 1) - model.stats.input_mean) / model.stats.input_std
        out = mlp(model.params["network"], np.broadcast_to(inputs, (E, *inputs.shape)))
        mean, raw = out[..., : D + 1], out[..., D + 1 :]
        variance = np.exp(np.asarray(likelihoods.soft_clamp(raw, -10.0, 0.5), np.float64))
        np.testing.assert_allclose(
            predictions.mean[:, :n], mean * scale / unit, rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(
            predictions.variance[:, :n], variance * (scale / unit) ** 2, rtol=1e-3
        )


def test_elites_have_the_lowest_holdout_error():
    data = linear_data(filled=230)  # so little that the whole holdout is evaluated
    assert 10 < held_out(data).sum() < 60
    for bad in range(E):
        model = init(FIXED, KEY)
        head = model.params["network"]["head"]
        head = {**head, "bias": head["bias"].at[bad].set(5.0)}
        model = model._replace(params={"network": {**model.params["network"], "head": head}})
        model, metrics = fit(FIXED, model, data, KEY, NONE)
        errors = holdout_errors(model, data)
        np.testing.assert_array_equal(model.elites, np.argsort(errors)[:2])
        assert bad not in model.elites
        np.testing.assert_allclose(metrics["holdout_mse"], np.sort(errors)[:2].mean(), rtol=1e-4)


def early_stop_length(**changes):
    """Return the number of steps of an early-stopped fit of a new model."""
    config = ModelConfig(**{**SIZES, "fit_steps": 200, **changes}, schedule="early_stop")
    _, metrics = fit(config, init(config, KEY), linear_data(filled=240), KEY, NONE)
    return metrics["fit_steps"]


def test_early_stop_restores_the_best_weights_of_each_member(monkeypatch):
    evaluated = []
    errors_of = evaluation._errors

    def recorded(state, mean, data):
        errors = errors_of(state, mean, data)
        jax.debug.callback(lambda x: evaluated.append(np.array(x)), errors, ordered=True)
        return errors

    monkeypatch.setattr(evaluation, "_errors", recorded)
    # The learning rate is so large that rounds make members worse, until none has improved for long.
    config = ModelConfig(
        **SIZES | {"fit_steps": 4000, "learning_rate": 0.1}, min_gain=0.0, schedule="early_stop"
    )
    dynamics = make_model(config, SPEC)
    # A new function, because `fit` may have been traced before.
    train = jax.jit(
        lambda *inputs: training.fit(dynamics, VARIANTS, NONE, *inputs, HOLDOUT, KEY, 4000)
    )
    _, metrics, _ = train(init(config, KEY), linear_data(filled=240))
    jax.effects_barrier()
    *rounds, last = evaluated
    assert len(rounds) == metrics["fit_steps"] // 20
    assert len(rounds) < 200 and (rounds[-1] > np.min(rounds, 0)).all()
    assert (rounds[-1] > 1.05 * np.min(rounds, 0)).any()
    np.testing.assert_allclose(last, np.min(rounds, 0), rtol=1e-5)


def test_early_stop_ends_after_patience_or_at_the_limit():
    # Nothing is learned: a first round, and three rounds of 20 steps without improvement.
    assert early_stop_length(learning_rate=0.0) == 80
    # Every improvement counts, so the fit continues to the limit.
    assert early_stop_length(min_gain=0.0) == 200


@pytest.fixture(scope="module")
def learned():
    """Return a model of the linear system after twenty fits, and the metrics of the last one."""
    model = init(FIXED, KEY)
    for key in jax.random.split(KEY, 20):
        model, metrics = fit(FIXED, model, linear_data(), key, SCALE)
    return model, metrics


def r_squared(predicted, true):
    return 1 - ((predicted - true) ** 2).mean(0) / true.var(0)


def test_linear_system_is_learned(learned, make):
    model, metrics = learned
    assert metrics["r2_state"] > 0.95 and metrics["r2_reward"] > 0.95
    # One step of a rollout reproduces the system.
    config = make({"model.members": E, "model.elites": 2, "model.width": 16})
    obs = np.random.default_rng(9).normal(size=(200, D)).astype(np.float32)

    def policy(obs, key):
        return jax.random.uniform(key, (200, A), minval=-1), jnp.zeros(200)

    @jax.jit
    def model_step(model, obs):
        rule, dynamics = trust.TrustRule(None, SPEC, 200), make_model(config.model, SPEC)
        env = ModelEnv(config, SPEC, rule, dynamics, model, policy).select_members()
        return env.step(None, obs, jnp.ones(len(obs), bool), 0, 1, KEY)[1]

    step, continues, keep, *_ = model_step(model, obs)
    true = obs @ F.T + np.asarray(step.action) @ G.T
    assert continues.all() and keep.all()
    assert (r_squared(np.asarray(step.next_obs) - obs, true - obs) > 0.95).all()
    assert r_squared(np.asarray(step.reward), obs @ W) > 0.95
    np.testing.assert_array_equal(step.obs, obs)
    np.testing.assert_array_equal(step.discount, np.ones(200))


def test_dimension_that_starts_to_vary_gets_new_output_weights():
    """A sparse reward, and a dimension of the observation that was constant: no weight explodes."""
    data = linear_data()
    constant = changed(
        data,
        obs=data.unpack().obs.at[:, 1].set(0),
        next_obs=data.unpack().next_obs.at[:, 1].set(0),
        reward=jnp.zeros(N),
    )
    split = fit_data.split(FIXED, data, HOLDOUT)
    rare = jnp.zeros(N).at[split.training[0]].set(1e-3)
    config = ModelConfig(**SIZES | {"fit_steps": 1, "learning_rate": 0.0})
    dynamics, variants, variant = make_model(config, SPEC), [(), ("scale", "auto")], jnp.array(1)

    @jax.jit
    def prepare(model, data):
        return training.prepare(dynamics, variants, variant, model, data, HOLDOUT)[0]

    first = prepare(init(config, KEY), constant)
    np.testing.assert_array_equal(first.stats.has_varied, [True, False, False])
    np.testing.assert_array_equal(first.stats.transform.scale[1:], [1, 1])
    moments = jax.tree.map(jnp.ones_like, first.opt_state)
    second = prepare(first._replace(opt_state=moments), changed(data, reward=rare))
    assert second.stats.has_varied.all() and second.stats.transform.scale[2] < 1e-4
    columns = np.array([1, 2, 4, 5])  # means and log-variances of the new dimensions
    head, adam = second.params["network"]["head"], second.opt_state[0]
    # Their weights are initial ones, without moments; those of the other dimension stay.
    kernel = np.asarray(head["kernel"])[..., columns]
    assert 0 < np.abs(kernel).max() <= 2 / (2 * np.sqrt(16)) * 1.0001
    assert not np.asarray(head["bias"])[:, columns].any()
    for moment in (adam.mu, adam.nu):
        assert not np.asarray(moment["network"]["head"]["kernel"])[..., columns].any()
        assert np.asarray(moment["network"]["head"]["kernel"])[..., [0, 3]].all()
    # k is chosen for the new dimension only.
    expected = targets._smaller_variance(data.unpack().obs, data.unpack().next_obs, split.weights)
    skips = second.stats.transform.skip, first.stats.transform.skip
    assert skips[0][1] == expected[1] and skips[0][0] == skips[1][0]


@pytest.mark.parametrize(("before", "after"), [(1e-9, 1.0), (1.0, 1e-9)])
def test_output_weights_are_new_after_a_jump_of_the_scale(before, after):
    """Adam would hardly move a head whose second moment is multiplied by 1e18."""
    config = ModelConfig(**SIZES | {"fit_steps": 1, "learning_rate": 0.0})
    dynamics, data = make_model(config, SPEC), linear_data()

    @jax.jit
    def prepare(model, data):
        return training.prepare(dynamics, VARIANTS, SCALE, model, data, HOLDOUT)[0]

    first = prepare(init(config, KEY), changed(data, reward=before * data.unpack().reward))
    first = first._replace(opt_state=jax.tree.map(jnp.ones_like, first.opt_state))
    second = prepare(first, changed(data, reward=after * data.unpack().reward))
    kernel = np.asarray(second.params["network"]["head"]["kernel"])
    assert np.isfinite(kernel).all() and 0.01 < np.abs(kernel[..., [2, 5]]).max() < 1
    for moment in (second.opt_state[0].mu, second.opt_state[0].nu):
        assert not np.asarray(moment["network"]["head"]["kernel"])[..., [2, 5]].any()
        assert np.asarray(moment["network"]["head"]["kernel"])[..., [0, 1, 3, 4]].all()


def test_scale_does_not_depend_on_units():
    def in_other_units(obs_unit, reward_unit):
        data = linear_data()
        plain = data.unpack()
        return changed(
            data,
            obs=plain.obs * obs_unit,
            next_obs=plain.next_obs * obs_unit,
            reward=plain.reward * reward_unit,
        )

    changes = [(np.array([1e-3, 1e3], np.float32), 30.0), (np.array([70.0, 0.02]), 1e-3)]
    changes += [(np.array([1e-7, 1e-12], np.float32), 1e-10)]
    metrics = {
        name: [
            fit(FIXED, init(FIXED, KEY), data, KEY, variant)[1]
            for data in [linear_data(), *(in_other_units(*change) for change in changes)]
        ]
        for name, variant in (("scale", SCALE), ("none", NONE), ("both", jnp.array(2)))
    }
    errors = {name: [float(m["holdout_mse"]) for m in each] for name, each in metrics.items()}
    for name in ("scale", "both"):
        np.testing.assert_allclose(errors[name], errors[name][0], rtol=1e-3)
        for measure in ("r2_state_dims", "r2_reward"):
            each = [m[measure] for m in metrics[name]]
            np.testing.assert_allclose(each, [each[0]] * len(each), rtol=1e-2, atol=1e-3)
    assert np.isfinite(metrics["none"][-1]["r2_state_dims"]).all()
    assert max(errors["none"][1:]) > 10 * errors["none"][0]


def test_buffers_of_these_tests_equal_the_real_one_in_shape():
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), linear_data())
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), replay.init(N, D, A))


def test_fit_length_is_proportional_to_the_data():
    epochs = ModelConfig(**SIZES, epochs=2.0)
    lengths = [int(training.num_steps(epochs, jnp.array(n))) for n in (0, 1, 160, 170, 10_000)]
    # 2 n / 32 rounded up, at least one, at most fit_steps.
    assert lengths == [1, 1, 10, 11, 60]
    assert training.num_steps(FIXED, jnp.array(7)) == 60
    model, data = init(FIXED, KEY), linear_data()
    train = jax.jit(
        lambda config, steps: training.fit(
            make_model(config, SPEC), VARIANTS, SCALE, model, data, HOLDOUT, KEY, steps
        )
    )
    dynamic, metrics, _ = train(epochs, jnp.array(11))
    fixed, *_ = train(FIXED, jnp.array(11))
    longer, *_ = train(epochs, jnp.array(12))
    assert metrics["fit_steps"] == 11
    kernels = [m.params["network"]["head"]["kernel"] for m in (dynamic, fixed, longer)]
    np.testing.assert_allclose(kernels[0], kernels[1], rtol=1e-5, atol=1e-7)
    assert not np.allclose(kernels[0], kernels[2], atol=1e-6)


def test_reward_that_is_a_step_function_of_the_next_state_is_learned():
    """It is a step function of (s, a) too, but across several inputs."""
    data = linear_data()
    reward = (data.unpack().next_obs[:, 0] > 0.3).astype(jnp.float32)
    data = changed(data, reward=reward)
    r2 = {}
    for reward_from in ("inputs", "next_state"):
        config = ModelConfig(**SIZES | {"fit_steps": 300}, reward_from=reward_from)
        _, metrics = fit(config, init(config, KEY), data, KEY, SCALE)
        r2[reward_from] = float(metrics["r2_reward"])
    assert r2["next_state"] > 0.5, r2


def matmul_precisions(function, *arguments):
    """Return the precisions of all matmuls in a function's program."""
    return {
        equation.params["precision"]
        for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        if equation.primitive.name == "dot_general"
    }


@pytest.mark.parametrize("default", ["bfloat16", "tensorfloat32"])
def test_statistics_are_in_full_precision_whatever_the_default(default):
    dynamics, model, data = make_model(FIXED, SPEC), init(FIXED, KEY), linear_data()

    def prepare(model, data):
        variant = jnp.array(0)
        return training.prepare(dynamics, [("scale", "auto")], variant, model, data, HOLDOUT)

    member = jax.tree.map(lambda x: x[0], model.params)
    with jax.default_matmul_precision(default):
        of_statistics = matmul_precisions(prepare, model, data)
        of_loss = matmul_precisions(dynamics.loss, member, model.stats, data.unpack())
    highest = jax.lax.Precision.HIGHEST
    # Sums do not depend on the default.
    assert of_statistics <= {(highest, highest)}
    # Gradient steps use the default.
    assert of_loss and (highest, highest) not in of_loss
