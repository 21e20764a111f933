"""The ensemble: its loss by numpy, its split, its fit, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import nets, replay
from dynajax.agents import sac
from dynajax.config import ModelConfig
from dynajax.models import ensemble, rollouts
from dynajax.types import EnvSpec, Replay, Transition

pytestmark = pytest.mark.usefixtures("quick_compilation")

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
    return ensemble.fit(config, VARIANTS, variant, model, data, HOLDOUT, key)


init = jax.jit(ensemble.init, static_argnums=1)
KEY = jax.random.PRNGKey(1)
NONE, SCALE = jnp.array(0), jnp.array(1)

#: s' = F s + G a, r = w s
F, G, W = np.array([[0.9, 0.2], [-0.1, 0.8]]), np.array([[0.3], [0.5]]), np.array([1.0, -0.5])


def linear_data(seed=0, size=N, filled=N):
    rng = np.random.default_rng(seed)
    obs, action = rng.normal(size=(size, D)), rng.uniform(-1, 1, (size, A))
    data = Transition(obs, action, obs @ W, np.ones(size), obs @ F.T + action @ G.T)
    return Replay(
        Transition(*(jnp.asarray(x, jnp.float32) for x in data)), jnp.arange(size) < filled
    )


def held_out(data, config=FIXED):
    """Which slots a fit may not learn from, from what it does learn from."""
    return np.asarray(data.valid) & (np.asarray(ensemble.split(config, data, HOLDOUT).weights) == 0)


def forward(members, inputs):
    """Outputs (E, B, 2 (D+1)) by numpy in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), members)
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
    mean = forward(model.params["members"], np.broadcast_to(inputs, (E, *inputs.shape)))
    return ((mean[..., : D + 1] - z) ** 2).mean((1, 2))


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- the loss --------------------------------------------------------------------------------


def test_soft_clamp_by_hand():
    low, high = -10.0, 0.5
    clamped = ensemble.soft_clamp(jnp.array([-1000.0, -10.0, -4.0, 0.5, 1000.0]), low, high)

    def softplus(x):
        return np.log1p(np.exp(x))

    inner = 0.5 - softplus(0.5 + 4.0)
    expected = [
        -10.0,
        -10 + softplus(0.5 - softplus(10.5) + 10),
        -10 + softplus(inner + 10),
        # first from above: 0.5 - log 2; then from below
        -10 + softplus(10.5 - np.log(2)),
        # the second bend lifts the upper bound by a little
        -10 + softplus(10.5),
    ]
    np.testing.assert_allclose(clamped, expected, rtol=1e-5)


def test_likelihood_by_hand():
    mean, z = jnp.array([[[1.0, 0.0]]]), jnp.array([[[3.0, 1.0]]])
    log_variance = jnp.log(jnp.array([[[4.0, 0.5]]]))
    # ((1-3)^2 / 4 + log 4 + 1 / 0.5 + log 0.5) / 2, no half before it
    expected = (1 + np.log(4) + 2 + np.log(0.5)) / 2
    np.testing.assert_allclose(ensemble.nll(mean, log_variance, z, 0.0), [expected], rtol=1e-6)


@pytest.mark.parametrize(
    ("depth", "rates"),
    [
        (1, [2.5e-5, 1e-4]),
        (2, [2.5e-5, 5e-5, 1e-4]),
        (4, [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]),
    ],
)
def test_decay_by_layer(depth, rates):
    names = [f"hidden_{i}" for i in range(depth)] + ["head"]
    # Layer i has 3 members x 2 x 2 weights of value i + 1; biases are free.
    members = {
        name: {"kernel": jnp.full((3, 2, 2), i + 1.0), "bias": jnp.full((3, 2), 9.0)}
        for i, name in enumerate(names)
    }
    expected = sum(0.5 * rate * 12 * (i + 1) ** 2 for i, rate in enumerate(rates))
    np.testing.assert_allclose(ensemble.decay(members), expected, rtol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_whole_loss_by_numpy(learned):
    config = ModelConfig(
        members=E, elites=2, width=5, depth=4, weight_decay=300.0, learned_bounds=learned
    )
    params = init(config, SPEC, KEY).params
    if learned:
        params = {
            **params,
            "log_variance_min": jnp.array([-5.0, -3.0, -4.0]),
            "log_variance_max": jnp.array([0.0, 1.0, 2.0]),
        }
    rng = np.random.default_rng(0)
    inputs, z = rng.normal(size=(E, 6, D + A)), rng.normal(size=(E, 6, D + 1))
    value = jax.jit(ensemble.loss)(config, params, jnp.float32(inputs), jnp.float32(z), 0.5)
    out = forward(params["members"], inputs)
    mean, raw = out[..., : D + 1], out[..., D + 1 :]
    low, high = (
        ([-5.0, -3.0, -4.0], [0.0, 1.0, 2.0]) if learned else (np.full(3, -10.0), np.full(3, 0.5))
    )
    low, high = np.array(low), np.array(high)
    log_var = high - np.logaddexp(0, high - raw)
    log_var = low + np.logaddexp(0, log_var - low)
    terms = np.exp(0.5 * log_var) * (np.exp(-log_var) * (mean - z) ** 2 + log_var)
    expected = terms.mean((1, 2)).sum()
    names = ["hidden_0", "hidden_1", "hidden_2", "hidden_3", "head"]
    for name, rate in zip(names, [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4], strict=True):
        kernel = np.asarray(params["members"][name]["kernel"], np.float64)
        expected += 300 * 0.5 * rate * (kernel**2).sum()
    expected += 0.01 * (high.sum() - low.sum()) if learned else 0
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_initial_weights_differ_and_scale_by_the_fan_in_of_one_member():
    network = nets.member(100, 2, 4)
    params = nets.stacked_init(network, jax.random.PRNGKey(0), 5, 16)
    for name, fan_in in (("hidden_0", 16), ("hidden_1", 100), ("head", 100)):
        kernel = np.asarray(params[name]["kernel"])
        unit = 1 / (2 * np.sqrt(fan_in))
        # A normal cut off at two standard deviations keeps 0.88 of its spread.
        assert np.abs(kernel).max() <= 2 * unit * 1.0001
        np.testing.assert_allclose(kernel.std((1, 2)), 0.8796 * unit, rtol=0.08)
        assert len({kernel[i].tobytes() for i in range(5)}) == 5
        assert not params[name]["bias"].any()


# --- the split -------------------------------------------------------------------------------


def test_a_transition_keeps_its_side_of_the_split():
    size = 4000
    sides = []
    for filled in (1000, 2500, 4000):
        data = linear_data(size=size, filled=filled)
        split = ensemble.split(FIXED, data, HOLDOUT)
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
    data = data._replace(valid=jnp.arange(N) % 3 > 0)
    split = ensemble.split(ModelConfig(score_size=N), data, HOLDOUT)
    training = set(np.asarray(split.training)[: int(split.training_size)].tolist())
    chosen = np.asarray(split.scored_weights) == 1
    scored = np.asarray(split.scored.reward)[chosen]
    held = set(np.flatnonzero(np.isin(data.data.reward, scored)).tolist())
    assert training.isdisjoint(held)
    assert training | held == set(np.flatnonzero(np.arange(N) % 3 > 0).tolist())


def test_a_long_holdout_is_scored_at_even_spaces():
    data = linear_data()
    data = data._replace(data=data.data._replace(reward=jnp.arange(N, dtype=jnp.float32)))
    slots = np.flatnonzero(held_out(data))
    assert len(slots) > 60
    split = ensemble.split(FIXED, data, HOLDOUT)
    expected = slots[np.arange(60) * len(slots) // 60]
    np.testing.assert_array_equal(split.scored.reward, expected)
    assert split.scored_weights.all()


def test_the_holdout_never_reaches_the_parameters():
    data = linear_data()
    held = held_out(data)[:, None]
    clean = data.data
    poisoned = data._replace(
        data=clean._replace(
            obs=clean.obs + 1e6 * held,
            reward=clean.reward - 1e6 * held[:, 0],
            next_obs=clean.next_obs * (1 - 1e6 * held),
        )
    )
    model = init(FIXED, SPEC, KEY)
    ours, metrics = fit(FIXED, model, data, KEY, SCALE)
    theirs, spoiled = fit(FIXED, model, poisoned, KEY, SCALE)
    assert equal(ours._replace(elites=0), theirs._replace(elites=0))
    assert spoiled["score"] > 1e6 * metrics["score"]
    # and the same change to a transition of the training split is seen
    learned = poisoned._replace(data=jax.tree.map(lambda x: jnp.roll(x, 1, 0), poisoned.data))
    assert not equal(ours.params, fit(FIXED, model, learned, KEY, SCALE)[0].params)


# --- the fit ---------------------------------------------------------------------------------


def test_members_draw_their_own_minibatches():
    model = init(FIXED, SPEC, KEY)
    same = jax.tree.map(lambda p: jnp.stack([p[0]] * E), model.params["members"])
    model = model._replace(params={**model.params, "members": same})
    members = fit(FIXED, model, linear_data(), KEY, SCALE)[0].params["members"]
    kernels = np.asarray(members["hidden_0"]["kernel"])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(kernels[i] - kernels[j]).max() > 1e-4


def test_fixed_schedule_runs_its_steps_and_goes_on_from_the_last_fit():
    data = linear_data()
    first, metrics = fit(FIXED, init(FIXED, SPEC, KEY), data, KEY, NONE)
    assert metrics["fit_steps"] == 60 and first.optimiser.count == 60 and first.fits == 1
    second, _ = fit(FIXED, first, data, jax.random.PRNGKey(2), NONE)
    assert second.optimiser.count == 120 and second.fits == 2
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
    monkeypatch.setattr(
        nets, "adam_step", lambda p, g, o, rate: (jax.tree.map(lambda x: x + 1, p), o)
    )
    config, data = ModelConfig(**SIZES, average_steps=over), linear_data()
    model = init(config, SPEC, KEY)
    for steps, mean in enumerate(means, 1):
        split = ensemble.split(config, data, HOLDOUT)
        after = ensemble.train_steps(config, model, data, split, KEY, steps)
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
    data, found = linear_data(), []
    model = init(FIXED, SPEC, KEY)
    split = ensemble.split(FIXED, data, HOLDOUT)
    for alone in (True, False):
        monkeypatch.setattr(ensemble.compiler, "small_caches", lambda alone=alone: alone)
        found.append(ensemble.train_steps(FIXED, model, data, split, KEY, 100))
    for one, other in zip(*(jax.tree.leaves(m) for m in found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    assert not equal(found[0].params["members"], model.params["members"])
    assert equal(found[0].params["log_variance_max"], model.params["log_variance_max"])


def test_inputs_have_unit_variance_over_the_training_split():
    data = linear_data(3)
    model, _ = fit(FIXED, init(FIXED, SPEC, KEY), data, KEY, NONE)
    training = ~held_out(data)
    inputs = np.concatenate([data.data.obs, data.data.action], 1)[training].astype(np.float64)
    np.testing.assert_allclose(model.input_mean, inputs.mean(0), atol=1e-6)
    np.testing.assert_allclose(model.input_std, inputs.std(0), rtol=1e-5)


def test_elites_are_the_best_on_the_holdout():
    data = linear_data(filled=240)  # its holdout is small enough to be scored whole
    assert 10 < held_out(data).sum() < 60
    for bad in range(E):
        model = init(FIXED, SPEC, KEY)
        head = model.params["members"]["head"]
        head = {**head, "bias": head["bias"].at[bad].set(5.0)}
        members = {**model.params["members"], "head": head}
        model = model._replace(params={**model.params, "members": members})
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
    score = ensemble.score

    def watched(config, model, data):
        scores = score(config, model, data)
        jax.debug.callback(lambda x: seen.append(np.array(x)), scores, ordered=True)
        return scores

    monkeypatch.setattr(ensemble, "score", watched)
    # Steps so large that a round can make a member worse; of all gains even the smallest counts.
    config = ModelConfig(
        **SIZES | {"fit_steps": 200, "learning_rate": 0.1}, min_gain=0.0, schedule="early_stop"
    )
    # A function of its own, for `fit` may have been traced before.
    train = jax.jit(lambda *inputs: ensemble.fit(config, VARIANTS, NONE, *inputs, HOLDOUT, KEY))
    data = linear_data(filled=240)
    _, metrics = train(init(config, SPEC, KEY), data)
    jax.effects_barrier()
    *rounds, last = seen
    assert len(rounds) == metrics["fit_steps"] // 20
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
    agent = jax.jit(sac.init, static_argnums=1)(whole.sac, SPEC, jax.random.PRNGKey(3))
    obs = np.random.default_rng(9).normal(size=(200, D)).astype(np.float32)
    imagine = jax.jit(rollouts.imagine, static_argnums=1)
    step, finite = imagine(whole, SPEC, agent, model, obs, KEY)
    true = obs @ F.T + np.asarray(step.action) @ G.T
    assert finite.all()
    assert (r_squared(np.asarray(step.next_obs) - obs, true - obs) > 0.95).all()
    assert r_squared(np.asarray(step.reward), obs @ W) > 0.95
    np.testing.assert_array_equal(step.obs, obs)
    np.testing.assert_array_equal(step.discount, np.ones(200))


def test_units_do_not_matter_to_scale():
    def in_units(obs_unit, reward_unit):
        data = linear_data()
        plain = data.data
        return data._replace(
            data=plain._replace(
                obs=plain.obs * obs_unit,
                next_obs=plain.next_obs * obs_unit,
                reward=plain.reward * reward_unit,
            )
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
