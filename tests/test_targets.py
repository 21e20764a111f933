"""Test the target transform of the model, and the fixes that choose it."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynajax.config import ModelConfig
from dynajax.models import ensemble, likelihoods, make_model, targets
from dynajax.models.head_rescaling import rescale_heads
from dynajax.models.targets import Fix, parse_fixes
from dynajax.types import EnvSpec, TargetTransform, Transition, UsageError

D, N = 3, 40
SPEC = EnvSpec("walk", D, 2, 50, ("x", "y", "z"), None)
#: Every set of fixes that do not contradict each other.
COMBINATIONS = [
    names
    for size in range(len(targets.FIXES) + 1)
    for names in itertools.combinations(targets.FIXES, size)
    if not {"target", "auto"} <= set(names)
]
ALL, NONE = jnp.ones(D, bool), jnp.zeros(D, bool)


def data_of(seed):
    """Return data with a dimension that drifts slowly, one that jumps, and one that is constant."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(N, D)) * [10.0, 1.0, 0.0] + [3.0, 0.0, 7.1]
    next_obs = obs + rng.normal(size=(N, D)) * [0.1, 2.0, 0.0]
    next_obs[:, 1] = rng.normal(size=N)
    reward = rng.normal(size=N) * 0.01 + 0.5
    weights = (np.arange(N) % 5 > 0).astype(np.float32)
    return *(jnp.asarray(x, jnp.float32) for x in (obs, reward, next_obs)), jnp.asarray(weights)


def fit(names, data, old=None, first=ALL):
    return targets.fit_transform(
        [names], jnp.array(0), old or targets.identity_transform(D), first, *data
    )


# --- Encode and decode ----------------------------------------------------------------------------

numbers = st.floats(-100, 100, width=32)
scales = st.floats(np.float32(1e-3), 100, width=32)


def vectors(entries, size):
    return st.lists(entries, min_size=size, max_size=size).map(
        lambda values: np.array(values, np.float32)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        TargetTransform,
        vectors(numbers, D),
        vectors(numbers, D + 1),
        vectors(scales, D + 1),
        st.just(np.float32(0)),
    ),
    vectors(numbers, D),
    numbers,
    vectors(numbers, D),
)
def test_decode_is_the_inverse_of_encode(transform, obs, reward, next_obs):
    z = targets.encode(transform, obs, jnp.float32(reward), next_obs)
    back_obs, back_reward = targets.decode(transform, obs, z)
    # A sum of terms of up to 1e4 has seven digits.
    np.testing.assert_allclose(back_obs, next_obs, atol=5e-3)
    np.testing.assert_allclose(back_reward, reward, atol=1e-4)


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: ",".join(names) or "none")
def test_transforms_of_all_combinations_of_fixes(names):
    obs, reward, next_obs, weights = data_of(0)
    transform = fit(names, (obs, reward, next_obs, weights))
    z = targets.encode(transform, obs, reward, next_obs)
    back_obs, back_reward = targets.decode(transform, obs, z)
    np.testing.assert_allclose(back_obs, next_obs, atol=1e-5)
    np.testing.assert_allclose(back_reward, reward, atol=1e-6)
    if "scale" in names:
        training = np.asarray(z, np.float64)[np.asarray(weights) == 1]
        varies = training.std(0) > 1e-6
        assert varies[[0, 1, 3]].all() and not varies[2]
        np.testing.assert_allclose(training.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(training[:, varies].std(0), 1, rtol=1e-4)
    else:
        np.testing.assert_array_equal(transform.shift, np.zeros(D + 1))
        np.testing.assert_array_equal(transform.scale, np.ones(D + 1))
    skip = [0, 0, 0] if "target" in names else [1, 0, 0] if "auto" in names else [1, 1, 1]
    np.testing.assert_array_equal(transform.skip[:2], skip[:2])
    assert transform.exponent == (0.5 if "beta" in names else 0)


def test_encode_by_hand():
    transform = TargetTransform(
        jnp.array([1.0, 0.0]), jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 4.0, 0.5]), 0.0
    )
    z = targets.encode(transform, jnp.array([1.0, 1.0]), jnp.array(5.0), jnp.array([4.0, 10.0]))
    # (4 - 1 - 1) / 2, (10 - 0 - 2) / 4, (5 - 3) / 0.5
    np.testing.assert_allclose(z, [1, 2, 4])


# --- Rules ----------------------------------------------------------------------------------------


def test_scale_depends_on_the_training_split_only():
    obs, reward, next_obs, weights = data_of(1)
    held = (weights == 0)[:, None]
    spoiled = (obs, reward + 1e6 * held[:, 0], next_obs + 1e6 * held, weights)
    clean = fit(("scale",), (obs, reward, next_obs, weights))
    jax.tree.map(np.testing.assert_array_equal, clean, fit(("scale",), spoiled))


@pytest.mark.parametrize("constant", [0.0, 0.3, 7.1, -1234.567])
@pytest.mark.parametrize("size", [10, 5000])
def test_constant_dimension_has_std_one(constant, size):
    values = jnp.full((size, 1), constant, jnp.float32)
    mean, std = targets.moments(values, jnp.ones(size))
    assert std == 1
    np.testing.assert_allclose(mean, constant, rtol=1e-6)


@pytest.mark.parametrize(
    ("offset", "std", "given"),
    [
        (0.0, 1e-7, 1e-7),
        (0.0, 1e-14, 1e-14),
        (0.0, 1e-16, 1.0),
        (1.0, 1e-5, 1e-5),
        (1.0, 2.0**-23, 1.0),
        (1e3, 2.0**-14, 1.0),
        (1e-7, 2.0**-47, 1.0),
        (1e-7, 1e-10, 1e-10),
    ],
)
def test_std_in_the_size_of_rounding_is_that_of_a_constant_dimension(offset, std, given):
    values = jnp.float32([[offset - std], [offset + std]])
    np.testing.assert_allclose(targets.moments(values, jnp.ones(2))[1], [given], rtol=1e-2)
    np.testing.assert_array_equal(targets.varies(values, jnp.ones(2)), [given != 1])


@pytest.mark.parametrize("unit", [1.0, 1e-7, 1e-11])
def test_change_that_varies_by_rounding_only_is_constant(unit):
    """A clock moves by the same amount in each step, up to the rounding of the time."""
    clock = np.float32(unit * (0.5 + 0.01 * np.arange(N + 1)))
    obs, next_obs = (jnp.tile(x[:, None], D) for x in (clock[:-1], clock[1:]))
    change = np.asarray(next_obs - obs)[:, 0]
    assert change.std() > 0
    transform = fit(("scale",), (obs, jnp.zeros(N), next_obs, jnp.ones(N)))
    np.testing.assert_array_equal(transform.scale, np.ones(D + 1))
    np.testing.assert_allclose(transform.shift[:D], unit * 0.01, rtol=1e-4)
    moving = fit(("scale", "target"), (obs, jnp.zeros(N), next_obs, jnp.ones(N)))
    np.testing.assert_allclose(moving.scale[:D], clock[1:].std(), rtol=1e-3)


def test_moments_are_accurate_far_from_zero():
    values = 1000 + np.random.default_rng(0).normal(size=(5000, 1)) * 0.01
    values = values.astype(np.float32)
    weights = (np.arange(5000) % 3 > 0).astype(np.float32)
    mean, std = targets.moments(jnp.asarray(values), jnp.asarray(weights))
    kept = values[weights == 1].astype(np.float64)
    np.testing.assert_allclose(mean, kept.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, kept.std(0), rtol=1e-2)


def test_skip_is_chosen_at_the_first_fit_and_kept():
    first = fit(("auto", "scale"), data_of(0))
    obs, reward, next_obs, weights = data_of(0)
    # Data for which both choices would be reversed.
    reversed_data = (obs, reward * 5, next_obs[:, [1, 0, 2]] + obs * jnp.array([0, 1, 0]), weights)
    assert fit(("auto", "scale"), reversed_data).skip[0] == 0
    later = fit(("auto", "scale"), reversed_data, first, NONE)
    np.testing.assert_array_equal(later.skip, first.skip)
    assert not np.allclose(later.scale, first.scale)


def test_each_learner_gets_the_transform_of_its_variant():
    variants, data = [(), ("scale", "target"), ("auto", "beta")], data_of(0)
    together = jax.vmap(
        lambda i: targets.fit_transform(variants, i, targets.identity_transform(D), ALL, *data)
    )(jnp.arange(3))
    for i, names in enumerate(variants):
        alone = fit(names, data)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), together, alone
        )


def test_registered_fix_of_a_user(monkeypatch):
    def slope(obs, next_obs, weights):
        centred = obs - weights @ obs / weights.sum()
        return (weights @ (centred * next_obs)) / jnp.maximum(weights @ centred**2, 1e-9)

    monkeypatch.setitem(targets.FIXES, "slope", Fix("least squares of s' on s", skip=slope))
    names = parse_fixes("slope,scale")
    assert names == ("scale", "slope")
    with pytest.raises(UsageError, match="target and slope contradict"):
        parse_fixes("target,slope")
    obs, reward, next_obs, weights = data_of(2)
    transform = fit(names, (obs, reward, next_obs, weights))
    kept = np.asarray(weights) == 1
    for i in range(2):
        expected = np.polyfit(np.asarray(obs)[kept, i], np.asarray(next_obs)[kept, i], 1)[0]
        np.testing.assert_allclose(transform.skip[i], expected, rtol=1e-3, atol=1e-4)


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("none", ()),
        ("scale", ("scale",)),
        ("scale,target", ("scale", "target")),
        (" target , scale ", ("scale", "target")),
        ("beta,auto,scale", ("scale", "auto", "beta")),
    ],
)
def test_parse_fixes(text, names):
    assert parse_fixes(text) == names


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("scael", "did you mean scale"),
        ("scale,targte", "did you mean target"),
        ("xyz", "choose none, or from scale, target, auto, beta"),
        ("scale,none", "choose none, or from"),
        ("scale,scale", "scale is given twice"),
        ("target,auto", "target and auto contradict each other"),
    ],
)
def test_invalid_fixes_are_refused(text, says):
    with pytest.raises(UsageError) as error:
        parse_fixes(text)
    assert str(error.value).startswith(f"--fix={text}: ") and says in str(error.value)
    assert "\n" not in str(error.value)


# --- Changes of the target transform, and the weighted likelihood ---------------------------------


def two_transforms(rng, exponent=0.0):
    """Return transforms with the same k, whose scales differ by orders of magnitude."""
    skip = jnp.array([1.0, 0.0, 0.7])
    return (
        TargetTransform(
            skip,
            jnp.asarray(rng.normal(size=D + 1), jnp.float32),
            jnp.asarray(np.exp(rng.normal(size=D + 1) * 2), jnp.float32),
            jnp.asarray(exponent, jnp.float32),
        )
        for _ in range(2)
    )


#: The default bounds of log-variances, and bounds that affect none.
BOUNDS = {"default": {}, "wide": {"log_variance_min": -60, "log_variance_max": 60}}
NO_NEW_DIMS = jnp.zeros(D + 1, bool)


@pytest.mark.parametrize("reward_from", ["inputs", "next_state"])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_rescaled_heads_keep_decoded_predictions(bounds, reward_from):
    """The means in any case, the standard deviations unless the bounds of log-variances affect them."""
    config = ModelConfig(
        members=2, elites=1, width=8, depth=1, reward_from=reward_from, **BOUNDS[bounds]
    )
    dynamics = make_model(config, SPEC)
    model = jax.jit(lambda: ensemble.init(dynamics, jax.random.PRNGKey(0)))()
    rng = np.random.default_rng(0)
    old, new = two_transforms(rng)
    before = model._replace(stats=model.stats._replace(transform=old))
    after = rescale_heads(dynamics, before, new, NO_NEW_DIMS, jax.random.PRNGKey(1))
    obs, action = rng.normal(size=(2, 2, 5, 3)).astype(np.float32)

    def decoded(model):
        mean, log_variance = ensemble.vmap_members(dynamics.predict, model, obs, action[..., :2])
        skip, shift, scale, _ = (np.asarray(x, np.float64) for x in model.stats.transform)
        raw = np.asarray(mean, np.float64) * scale + shift
        raw[..., :D] += skip * obs
        return raw, scale * np.exp(0.5 * np.asarray(log_variance, np.float64))

    (mean, std), (mean_after, std_after) = decoded(before), decoded(after)
    np.testing.assert_allclose(mean, mean_after, rtol=1e-4, atol=1e-5)
    if bounds == "wide":
        np.testing.assert_allclose(std, std_after, rtol=1e-4, atol=1e-5)
    heads = [m.params["network"]["head"]["bias"] for m in (before, after)]
    assert not np.allclose(*heads)


@pytest.mark.parametrize(
    ("likelihood", "exponent"), [("gaussian", 0.0), ("gaussian", 0.5), ("deterministic", 0.0)]
)
@pytest.mark.parametrize("reward_from", ["inputs", "next_state"])
def test_rescaled_moments_equal_those_of_the_new_gradient(reward_from, likelihood, exponent):
    config = ModelConfig(
        members=1,
        elites=1,
        width=8,
        depth=1,
        weight_decay=0.0,
        reward_from=reward_from,
        likelihood=likelihood,
        **BOUNDS["wide"],
    )
    dynamics = make_model(config, SPEC)
    model = jax.jit(lambda: ensemble.init(dynamics, jax.random.PRNGKey(0)))()
    rng = np.random.default_rng(0)
    old, new = two_transforms(rng, exponent)
    obs, action, reward, next_obs = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, D), (5, 2), 5, (5, D))
    )
    batch = Transition(obs, action, reward, jnp.ones(5), next_obs)

    def gradient(model):
        member = jax.tree.map(lambda x: x[0], model.params)
        grads = jax.grad(dynamics.loss)(member, model.stats, batch)
        return jax.tree.map(lambda x: x[None], grads)

    before = model._replace(stats=model.stats._replace(transform=old))
    adam, rest = before.opt_state
    old_gradient = gradient(before)
    adam = adam._replace(mu=old_gradient, nu=jax.tree.map(jnp.square, old_gradient))
    before = before._replace(opt_state=(adam, rest))
    after = rescale_heads(dynamics, before, new, NO_NEW_DIMS, jax.random.PRNGKey(1))
    expected = gradient(after)
    moments = after.opt_state[0]
    squared = jax.tree.map(jnp.square, expected)
    for head in dynamics.output_heads():
        chex.assert_trees_all_close(head.get(moments.mu), head.get(expected), rtol=1e-3, atol=1e-5)
        chex.assert_trees_all_close(head.get(moments.nu), head.get(squared), rtol=2e-3, atol=1e-5)
    if likelihood == "gaussian" and not exponent:
        # The other layers get the same gradient, because the loss has no unit.
        chex.assert_trees_all_close(moments.mu, expected, rtol=1e-3, atol=1e-5)
        chex.assert_trees_all_close(moments.nu, squared, rtol=2e-3, atol=1e-5)


def test_scale_is_at_least_a_hundredth_of_the_range():
    values = np.zeros((200_000, 2), np.float32)
    values[5] = [1e-3, 1.0]
    values[:, 1] += np.random.default_rng(0).normal(size=len(values))
    _, scale = targets.unit_variance(jnp.asarray(values), jnp.ones(len(values)))
    # One success in 200,000 has a standard deviation of 2e-6.
    np.testing.assert_allclose(scale[0], 1e-5, rtol=1e-5)
    np.testing.assert_allclose(scale[1], values[:, 1].std(), rtol=1e-3)
    constant = targets.unit_variance(jnp.full((50, 1), 0.3), jnp.ones(50))
    assert constant[1] == 1
    # The holdout does not count.
    weights = jnp.ones(len(values)).at[5].set(0)
    assert targets.unit_variance(jnp.asarray(values), weights)[1][0] == 1


def likelihood_inputs():
    rng = np.random.default_rng(0)
    return (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(3, 2, 5, D + 1)))


def test_exponent_zero_is_bitwise_the_plain_likelihood():
    mean, log_variance, z = likelihood_inputs()

    def plain(mean, log_variance):
        return (jnp.exp(-log_variance) * jnp.square(mean - z) + log_variance).mean((1, 2))

    def weighted(mean, log_variance):
        return likelihoods.nll(mean, log_variance, z, jnp.zeros(()))

    def gradients(function):
        return jax.grad(lambda *inputs: function(*inputs).sum(), (0, 1))(mean, log_variance)

    np.testing.assert_array_equal(weighted(mean, log_variance), plain(mean, log_variance))
    jax.tree.map(np.testing.assert_array_equal, gradients(weighted), gradients(plain))


def test_weighted_likelihood_and_gradient_equal_numpy():
    mean, log_variance, z = likelihood_inputs()
    m, v, y = (np.asarray(x, np.float64) for x in (mean, log_variance, z))
    weight = np.exp(0.5 * v)
    value = likelihoods.nll(mean, log_variance, z, 0.5)
    expected = (weight * (np.exp(-v) * (m - y) ** 2 + v)).mean((1, 2))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    slope = jax.grad(lambda given: likelihoods.nll(mean, given, z, 0.5).sum())(log_variance)
    # No gradient flows through the weight.
    expected = weight * (1 - np.exp(-v) * (m - y) ** 2) / (5 * (D + 1))
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


def test_registered_object_that_is_no_fix_is_refused(monkeypatch):
    monkeypatch.setitem(targets.FIXES, "three", 3)
    with pytest.raises(
        UsageError, match=r"--fix=three: 3 is registered as 'three'; it must be a Fix"
    ):
        parse_fixes("three")
