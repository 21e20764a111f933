"""A fit of the ensemble: its split, its schedules, its elites, and what is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynajax import replay, trust
from dynajax.config import ModelConfig
from dynajax.models import ensemble, fit_data, rollouts, targets, training
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
    "score_size": 60,
    "learning_rate": 3e-3,
}
FIXED, EARLY = ModelConfig(**SIZES), ModelConfig(**SIZES, schedule="early_stop")
HOLDOUT = jax.random.PRNGKey(5)


# Traced: every field of a configuration that scales arithmetic, the variant, the data, the keys.
@jax.jit
def fit(config, model, data, key, variant):
    return training.fit(config, VARIANTS, variant, model, data, HOLDOUT, key, config.fit_steps)[:2]


init = jax.jit(ensemble.init, static_argnums=1)
KEY = jax.random.PRNGKey(1)
NONE, SCALE = jnp.array(0), jnp.array(1)

#: s' = F s + G a, r = w s
F, G, W = np.array([[0.9, 0.2], [-0.1, 0.8]]), np.array([[0.3], [0.5]]), np.array([1.0, -0.5])


def linear_data(seed=0, size=N, filled=N):
    rng = np.random.default_rng(seed)
    obs, action = rng.normal(size=(size, D)), rng.uniform(-1, 1, (size, A))
    data = Transition(obs, action, obs @ W, np.ones(size), obs @ F.T + action @ G.T)
    return replay.pack(
        Transition(*(jnp.asarray(x, jnp.float32) for x in data)), jnp.arange(size) < filled
    )


def changed(data, **columns):
    """The ring with other values of some fields of its transitions."""
    return replay.pack(data.data._replace(**columns), data.valid)


def held_out(data, config=FIXED):
    """Which slots a fit may not learn from, from what it does learn from."""
    return np.asarray(data.valid) & (np.asarray(fit_data.split(config, data, HOLDOUT).weights) == 0)


def forward(layers, inputs):
    """Outputs (E, B, 2 (D+1)) by numpy in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), layers)
    x = np.asarray(inputs, np.float64)
    for i in range(len(params) - 1):
        layer = params[f"hidden_{i}"]
        x = x @ layer["kernel"] + layer["bias"][:, None]
        x = x / (1 + np.exp(-x))  # swish
    return x @ params["head"]["kernel"] + params["head"]["bias"][:, None]


def holdout_scores(model, data):
    """Mean squared error in z of each member on the whole holdout, by numpy."""
    chosen = held_out(data)
    obs, action, reward, _, new = (np.asarray(x, np.float64)[chosen] for x in data.data)
    skip, shift, scale, _ = (np.asarray(x, np.float64) for x in model.code)
    z = (np.concatenate([new - skip * obs, reward[:, None]], 1) - shift) / scale
    inputs = (np.concatenate([obs, action], 1) - model.input_mean) / model.input_std
    mean = forward(model.params["layers"], np.broadcast_to(inputs, (E, *inputs.shape)))
    return ((mean[..., : D + 1] - z) ** 2).mean((1, 2))


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- the split -------------------------------------------------------------------------------


def test_a_transition_keeps_its_side_of_the_split():
    size = 4000
    sides = []
    for filled in (1000, 2500, 4000):
        data = linear_data(size=size, filled=filled)
        split = fit_data.split(FIXED, data, HOLDOUT)
        weights = np.asarray(split.weights)
        assert not weights[filled:].any()
        # The index list of a fit is the training split, each slot once, and then filler.
        count = int(split.training_size)
        np.testing.assert_array_equal(split.training[:count], np.flatnonzero(weights))
        assert 1 - count / filled == pytest.approx(0.2, abs=0.03)
        sides.append(weights[:1000])
    np.testing.assert_array_equal(sides[0], sides[1])
    np.testing.assert_array_equal(sides[0], sides[2])


def test_holes_are_on_neither_side():
    data = linear_data()
    data = replay.pack(data.data, jnp.arange(N) % 3 > 0)
    split = fit_data.split(ModelConfig(score_size=N), data, HOLDOUT)
    training = set(np.asarray(split.training)[: int(split.training_size)].tolist())
    chosen = np.asarray(split.scored_weights) == 1
    scored = np.asarray(split.scored.reward)[chosen]
    held = set(np.flatnonzero(np.isin(data.data.reward, scored)).tolist())
    assert training.isdisjoint(held)
    assert training | held == set(np.flatnonzero(np.arange(N) % 3 > 0).tolist())


def test_a_long_holdout_is_scored_at_even_spaces():
    data = linear_data()
    data = changed(data, reward=jnp.arange(N, dtype=jnp.float32))
    slots = np.flatnonzero(held_out(data))
    assert len(slots) > 60
    split = fit_data.split(FIXED, data, HOLDOUT)
    expected = slots[np.arange(60) * len(slots) // 60]
    np.testing.assert_array_equal(split.scored.reward, expected)
    assert split.scored_weights.all()


def test_the_holdout_never_reaches_the_parameters():
    data = linear_data()
    held = held_out(data)[:, None]
    clean = data.data
    poisoned = changed(
        data,
        obs=clean.obs + 1e6 * held,
        reward=clean.reward - 1e6 * held[:, 0],
        next_obs=clean.next_obs * (1 - 1e6 * held),
    )
    model = init(FIXED, SPEC, KEY)
    ours, metrics = fit(FIXED, model, data, KEY, SCALE)
    theirs, spoiled = fit(FIXED, model, poisoned, KEY, SCALE)
    assert equal(ours._replace(elites=0), theirs._replace(elites=0))
    assert spoiled["score"] > 1e6 * metrics["score"]
    # and the same change to a transition of the training split is seen
    rolled = jax.tree.map(lambda x: jnp.roll(x, 1, 0), poisoned.data)
    learned = replay.pack(rolled, poisoned.valid)
    assert not equal(ours.params, fit(FIXED, model, learned, KEY, SCALE)[0].params)


def test_something_is_held_out_however_little_there_is():
    data = linear_data(filled=50)
    split = fit_data.split(ModelConfig(**SIZES, holdout=0.001), data, HOLDOUT)
    assert split.scored_weights.sum() >= 1
    assert 40 < split.training_size < 50


# --- the fit ---------------------------------------------------------------------------------


def test_members_draw_their_own_minibatches():
    model = init(FIXED, SPEC, KEY)
    same = jax.tree.map(lambda p: jnp.stack([p[0]] * E), model.params["layers"])
    model = model._replace(params={"layers": same})
    layers = fit(FIXED, model, linear_data(), KEY, SCALE)[0].params["layers"]
    kernels = np.asarray(layers["hidden_0"]["kernel"])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(kernels[i] - kernels[j]).max() > 1e-4


def test_fixed_schedule_runs_its_steps_and_goes_on_from_the_last_fit():
    data = linear_data()
    first, metrics = fit(FIXED, init(FIXED, SPEC, KEY), data, KEY, NONE)
    assert metrics["fit_steps"] == 60 and first.fits == 1
    np.testing.assert_array_equal(first.optimiser[0].count, [60] * E)
    second, _ = fit(FIXED, first, data, jax.random.PRNGKey(2), NONE)
    assert second.fits == 2
    np.testing.assert_array_equal(second.optimiser[0].count, [120] * E)
    # Without learning, a fit gives back what it was given: nothing is drawn anew.
    still, _ = fit(
        ModelConfig(**SIZES | {"learning_rate": 0.0}), second, data, jax.random.PRNGKey(3), NONE
    )
    assert equal(still.params, second.params)


@pytest.mark.parametrize(
    ("over", "means"),
    [
        (1, [1, 2, 3, 4]),  # the last
        (2, [1, 1.5, 2.25, 3.125]),  # the mean of two, then half of what is new
        (9, [1, 1.5, 2, 2.5]),  # the mean of all
    ],
)
def test_averaged_weights_by_hand(over, means, monkeypatch):
    # a step that adds one to every weight
    unit = optax.stateless(lambda gradient, _: jax.tree.map(jnp.ones_like, gradient))
    monkeypatch.setattr(
        training,
        "optimiser",
        lambda config: unit._replace(update=lambda g, s, p: (unit.update(g, ())[0], s)),
    )
    config, data = ModelConfig(**SIZES, average_steps=over), linear_data()
    model = init(config, SPEC, KEY)
    for steps, mean in enumerate(means, 1):
        split = fit_data.split(config, data, HOLDOUT)
        after = training.train(config, model, data, split, KEY, steps)
        for old, new in zip(
            jax.tree.leaves(model.params), jax.tree.leaves(after.params), strict=True
        ):
            np.testing.assert_allclose(new - old, mean, rtol=1e-5)


def test_averaging_takes_the_noise_of_the_steps_away():
    scores, data = {}, [linear_data(seed) for seed in range(4)]
    for over in (1, 30):
        config = ModelConfig(**SIZES | {"fit_steps": 600, "average_steps": over})
        fits = [fit(config, init(config, SPEC, KEY), one, KEY, SCALE)[0] for one in data]
        scores[over] = np.mean([holdout_scores(*pair) for pair in zip(fits, data, strict=True)])
    assert scores[30] < 0.75 * scores[1], scores


def test_members_one_after_the_other_learn_what_they_learn_together(monkeypatch):
    data, trained = linear_data(), []
    model = init(FIXED, SPEC, KEY)
    split = fit_data.split(FIXED, data, HOLDOUT)
    for alone in (True, False):
        monkeypatch.setattr(training.compiler, "small_caches", lambda alone=alone: alone)
        trained.append(training.train(FIXED, model, data, split, KEY, 100))
    for one, other in zip(*(jax.tree.leaves(m) for m in trained), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    assert not equal(trained[0].params["layers"], model.params["layers"])
    assert trained[0].params.keys() == {"layers"}


def test_rows_surveyed_in_turn_begin_their_fits_as_they_do_together():
    rows = [linear_data(seed, filled=filled) for seed, filled in ((0, N), (1, 90))]
    data = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    model = init(FIXED, SPEC, KEY)

    def begin(variant, data):
        return training.begin(FIXED, VARIANTS, variant, model, data, HOLDOUT)

    def begun(variants, data):
        text = str(jax.make_jaxpr(jax.vmap(begin))(variants, data))
        return jax.vmap(begin)(variants, data), text.count(f"f32[2,{N},{D + 1}]")

    variants = jnp.array([1, 2])
    together, shown = begun(variants, data)
    with backend.compiling_for("gpu"):
        in_turn, hidden = begun(variants, data)
    assert shown and not hidden  # the raw targets of all rows
    for one, other in zip(*(jax.tree.leaves(x) for x in (together, in_turn)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert not equal(in_turn[1].weights[0], in_turn[1].weights[1])


def test_learned_bounds_move_with_their_member():
    config = ModelConfig(**SIZES, learned_bounds=True)
    begun = init(config, SPEC, KEY)
    model, _ = fit(config, begun, linear_data(), KEY, SCALE)
    for name in ("low", "high"):
        moved = np.asarray(model.params["bounds"][name] - begun.params["bounds"][name])
        assert (np.abs(moved) > 1e-4).all()
        assert len({moved[e].tobytes() for e in range(E)}) == E


def test_inputs_have_unit_variance_over_the_training_split():
    data = linear_data(3)
    model, _ = fit(FIXED, init(FIXED, SPEC, KEY), data, KEY, NONE)
    training = ~held_out(data)
    inputs = np.concatenate([data.data.obs, data.data.action], 1)[training].astype(np.float64)
    np.testing.assert_allclose(model.input_mean, inputs.mean(0), atol=1e-6)
    np.testing.assert_allclose(model.input_std, inputs.std(0), rtol=1e-5)


def test_units_are_those_of_the_raw_targets_whatever_the_code():
    data = linear_data(3)
    training = ~held_out(data)
    obs, _, reward, _, new = (np.asarray(x, np.float64)[training] for x in data.data)
    for variant, skip in enumerate((1, 1, 0)):
        model, _ = fit(FIXED, init(FIXED, SPEC, KEY), data, KEY, jnp.array(variant))
        raw = np.concatenate([new - skip * obs, reward[:, None]], 1)
        np.testing.assert_allclose(model.unit, raw.std(0), rtol=1e-5)


def test_predictions_for_the_holdout_are_in_those_units():
    data = linear_data(filled=240)
    split = fit_data.split(FIXED, data, HOLDOUT)
    in_units = jax.jit(training.on_holdout)
    held = held_out(data)
    obs, action, reward, _, new = (np.asarray(x, np.float64)[held] for x in data.data)
    for variant, skip in enumerate((1, 1, 0)):
        model, _ = fit(FIXED, init(FIXED, SPEC, KEY), data, KEY, jnp.array(variant))
        predictions = in_units(FIXED, model, split)
        n = int(split.scored_weights.sum())
        assert n == held.sum()
        shift, scale, unit = (
            np.asarray(x, np.float64) for x in (model.code.shift, model.code.scale, model.unit)
        )
        truth = (np.concatenate([new - skip * obs, reward[:, None]], 1) - shift) / unit
        np.testing.assert_allclose(predictions.sample[:n], truth, rtol=1e-3, atol=1e-4)
        inputs = (np.concatenate([obs, action], 1) - model.input_mean) / model.input_std
        out = forward(model.params["layers"], np.broadcast_to(inputs, (E, *inputs.shape)))
        mean, raw = out[..., : D + 1], out[..., D + 1 :]
        variance = np.exp(np.asarray(ensemble.soft_clamp(raw, -10.0, 0.5), np.float64))
        np.testing.assert_allclose(
            predictions.mean[:, :n], mean * scale / unit, rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(
            predictions.variance[:, :n], variance * (scale / unit) ** 2, rtol=1e-3
        )


def test_elites_are_the_best_on_the_holdout():
    data = linear_data(filled=230)  # its holdout is small enough to be scored whole
    assert 10 < held_out(data).sum() < 60
    for bad in range(E):
        model = init(FIXED, SPEC, KEY)
        head = model.params["layers"]["head"]
        head = {**head, "bias": head["bias"].at[bad].set(5.0)}
        model = model._replace(params={"layers": {**model.params["layers"], "head": head}})
        model, metrics = fit(FIXED, model, data, KEY, NONE)
        scores = holdout_scores(model, data)
        np.testing.assert_array_equal(model.elites, np.argsort(scores)[:2])
        assert bad not in model.elites
        np.testing.assert_allclose(metrics["score"], np.sort(scores)[:2].mean(), rtol=1e-4)


def early(**changes):
    """The early-stopped fit of a new model."""
    config = ModelConfig(**{**SIZES, "fit_steps": 200, **changes}, schedule="early_stop")
    data = linear_data(filled=240)
    model, metrics = fit(config, init(config, SPEC, KEY), data, KEY, NONE)
    return holdout_scores(model, data), int(metrics["fit_steps"])


def test_early_stop_restores_each_members_best_weights(monkeypatch):
    seen = []
    errors = training._errors

    def watched(model, mean, data):
        scores = errors(model, mean, data)
        jax.debug.callback(lambda x: seen.append(np.array(x)), scores, ordered=True)
        return scores

    monkeypatch.setattr(training, "_errors", watched)
    # Steps so large that rounds make members worse, until for a while none has gained.
    config = ModelConfig(
        **SIZES | {"fit_steps": 4000, "learning_rate": 0.1}, min_gain=0.0, schedule="early_stop"
    )
    # A function of its own, for `fit` may have been traced before.
    train = jax.jit(
        lambda *inputs: training.fit(config, VARIANTS, NONE, *inputs, HOLDOUT, KEY, 4000)
    )
    data = linear_data(filled=240)
    _, metrics, _ = train(init(config, SPEC, KEY), data)
    jax.effects_barrier()
    *rounds, last = seen
    assert len(rounds) == metrics["fit_steps"] // 20
    assert len(rounds) < 200 and (rounds[-1] > np.min(rounds, 0)).all()
    assert (rounds[-1] > 1.05 * np.min(rounds, 0)).any()
    np.testing.assert_allclose(last, np.min(rounds, 0), rtol=1e-5)


def test_early_stop_ends_at_patience_and_at_its_cap():
    # Nothing is learned: a first round, and three of 20 steps without a gain.
    assert early(learning_rate=0.0)[1] == 80
    # Of all gains even the smallest counts, so it goes on to the cap.
    assert early(min_gain=0.0)[1] == 200


@pytest.fixture(scope="module")
def learned():
    """A model of the linear system after twenty fits."""
    model = init(FIXED, SPEC, KEY)
    for key in jax.random.split(KEY, 20):
        model, metrics = fit(FIXED, model, linear_data(), key, SCALE)
    return model, metrics


def r_squared(predicted, true):
    return 1 - ((predicted - true) ** 2).mean(0) / true.var(0)


def test_a_linear_system_is_learned(learned, make):
    model, metrics = learned
    assert metrics["r2_state"] > 0.95 and metrics["r2_reward"] > 0.95
    # One step of a rollout reproduces the system.
    whole = make({"model.members": E, "model.elites": 2, "model.width": 16})
    obs = np.random.default_rng(9).normal(size=(200, D)).astype(np.float32)
    rule = trust.TrustRule(None, SPEC, 200)

    def policy(obs, key):
        return jax.random.uniform(key, (200, A), minval=-1), jnp.zeros(200)

    @jax.jit
    def model_step(model, obs):
        asked = rollouts.asked(rule, model)
        return rollouts.model_step(
            whole, SPEC, rule, policy, asked, None, obs, jnp.ones(len(obs), bool), 0, 1, KEY
        )[1]

    step, finite, store, *_ = model_step(model, obs)
    true = obs @ F.T + np.asarray(step.action) @ G.T
    assert finite.all() and store.all()
    assert (r_squared(np.asarray(step.next_obs) - obs, true - obs) > 0.95).all()
    assert r_squared(np.asarray(step.reward), obs @ W) > 0.95
    np.testing.assert_array_equal(step.obs, obs)
    np.testing.assert_array_equal(step.discount, np.ones(200))


def test_a_channel_that_begins_to_vary_is_fitted_to_for_the_first_time():
    """A sparse reward, and an observation that has not moved: no weight explodes."""
    data = linear_data()
    still = changed(
        data,
        obs=data.data.obs.at[:, 1].set(0),
        next_obs=data.data.next_obs.at[:, 1].set(0),
        reward=jnp.zeros(N),
    )
    split = fit_data.split(FIXED, data, HOLDOUT)
    rare = jnp.zeros(N).at[split.training[0]].set(1e-3)
    both, auto = jnp.array(1), [(), ("scale", "auto")]
    config = ModelConfig(**SIZES | {"fit_steps": 1, "learning_rate": 0.0})

    @jax.jit
    def begin(model, data):
        return training.begin(config, auto, both, model, data, HOLDOUT)[0]

    first = begin(init(config, SPEC, KEY), still)
    np.testing.assert_array_equal(first.varied, [True, False, False])
    np.testing.assert_array_equal(first.code.scale[1:], [1, 1])
    moments = jax.tree.map(jnp.ones_like, first.optimiser)
    second = begin(first._replace(optimiser=moments), changed(data, reward=rare))
    assert second.varied.all() and second.code.scale[2] < 1e-4
    columns = np.array([1, 2, 4, 5])  # means and log-variances of the channels that begin
    head, adam = second.params["layers"]["head"], second.optimiser[0]
    # As new weights are, and no moments; those of the other channel go on.
    kernel = np.asarray(head["kernel"])[..., columns]
    assert 0 < np.abs(kernel).max() <= 2 / (2 * np.sqrt(16)) * 1.0001
    assert not np.asarray(head["bias"])[:, columns].any()
    for moment in (adam.mu, adam.nu):
        assert not np.asarray(moment["layers"]["head"]["kernel"])[..., columns].any()
        assert np.asarray(moment["layers"]["head"]["kernel"])[..., [0, 3]].all()
    # The channel that moves now has a k of its own; the other's stays.
    expected = targets._smaller_variance(data.data.obs, data.data.next_obs, split.weights)
    assert second.code.skip[1] == expected[1] and second.code.skip[0] == first.code.skip[0]


def test_units_do_not_matter_to_scale():
    def in_units(obs_unit, reward_unit):
        data = linear_data()
        plain = data.data
        return changed(
            data,
            obs=plain.obs * obs_unit,
            next_obs=plain.next_obs * obs_unit,
            reward=plain.reward * reward_unit,
        )

    changes = [(np.array([1e-3, 1e3], np.float32), 30.0), (np.array([70.0, 0.02]), 1e-3)]
    scores = {
        name: [
            float(fit(FIXED, init(FIXED, SPEC, KEY), data, KEY, variant)[1]["score"])
            for data in [linear_data(), *(in_units(*change) for change in changes)]
        ]
        for name, variant in (("scale", SCALE), ("none", NONE), ("both", jnp.array(2)))
    }
    for name in ("scale", "both"):
        np.testing.assert_allclose(scores[name], scores[name][0], rtol=1e-3)
    assert max(scores["none"][1:]) > 10 * scores["none"][0]


def test_a_filled_ring_is_what_add_leaves():
    """The data of these tests have the form of the real ring."""
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), linear_data())
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), replay.init(N, D, A))


def test_a_fit_takes_steps_in_proportion_to_its_data():
    epochs = ModelConfig(**SIZES, epochs=2.0)
    lengths = [int(training.length(epochs, jnp.array(n))) for n in (0, 1, 160, 170, 10_000)]
    # 2 n / 32 rounded up, at least one, at most fit_steps.
    assert lengths == [1, 1, 10, 11, 60]
    assert training.length(FIXED, jnp.array(7)) == 60
    model, data = init(FIXED, SPEC, KEY), linear_data()
    train = jax.jit(
        lambda config, steps: training.fit(
            config, VARIANTS, SCALE, model, data, HOLDOUT, KEY, steps
        )
    )
    dynamic, metrics, _ = train(epochs, jnp.array(11))
    fixed, *_ = train(FIXED, jnp.array(11))
    longer, *_ = train(epochs, jnp.array(12))
    assert metrics["fit_steps"] == 11
    kernels = [m.params["layers"]["head"]["kernel"] for m in (dynamic, fixed, longer)]
    np.testing.assert_allclose(kernels[0], kernels[1], rtol=1e-5, atol=1e-7)
    assert not np.allclose(kernels[0], kernels[2], atol=1e-6)


def test_a_reward_that_is_a_step_in_the_next_state_is_learned_from_it():
    """The step is sharp in (s, a) too, but there it lies across the inputs."""
    data = linear_data()
    reward = (data.data.next_obs[:, 0] > 0.3).astype(jnp.float32)
    data = changed(data, reward=reward)
    r2 = {}
    for reward_from in ("inputs", "next_state"):
        config = ModelConfig(**SIZES | {"fit_steps": 300}, reward_from=reward_from)
        _, metrics = fit(config, init(config, SPEC, KEY), data, KEY, SCALE)
        r2[reward_from] = float(metrics["r2_reward"])
    assert r2["next_state"] > 0.5, r2


def _products(jaxpr):
    """The precision of every matmul in a program, inner ones too."""
    for equation in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]


@pytest.mark.parametrize("default", ["bfloat16", "tensorfloat32"])
def test_statistics_are_in_full_precision_whatever_products_are_made_in(default):
    model, data = init(FIXED, SPEC, KEY), linear_data()

    def begin(model, data):
        return training.begin(FIXED, [("scale", "auto")], jnp.array(0), model, data, HOLDOUT)

    with jax.default_matmul_precision(default):
        precisions = list(_products(jax.make_jaxpr(begin)(model, data).jaxpr))
        trained = jax.make_jaxpr(lambda p: ensemble.loss(FIXED, model, p, data.data))(
            jax.tree.map(lambda x: x[0], model.params)
        )
    highest = jax.lax.Precision.HIGHEST
    # Sums have no precision but their own.
    assert set(precisions) <= {(highest, highest)}
    # What learns is made as the default says.
    assert (highest, highest) not in set(_products(trained.jaxpr))
