"""Test dynamics models: losses and predictions against NumPy, and initial weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax.config import ModelConfig
from dynajax.models import MLPModel, ResNetModel, ensemble, likelihoods, make_model, targets
from dynajax.types import EnvSpec, Transition

D, A, E = 2, 1, 3
SPEC = EnvSpec("line", D, A, 50, ("x", "v"), None)
KEY = jax.random.PRNGKey(1)


def init(config, key=KEY):
    """Return a model and its new ensemble."""
    dynamics = make_model(config, SPEC)
    return dynamics, jax.jit(lambda: ensemble.init(dynamics, key))()


def with_transform(state, **changes):
    """Return the ensemble with other values in its target transform."""
    stats = state.stats
    transform = stats.transform._replace(**changes)
    return state._replace(stats=stats._replace(transform=transform))


def with_stats(state, **changes):
    """Return the ensemble with other statistics of its data."""
    return state._replace(stats=state.stats._replace(**changes))


def mlp(layers, inputs):
    """Return outputs (E, B, 2 (D+1)) by NumPy in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), layers)
    x = np.asarray(inputs, np.float64)
    for i in range(len(params) - 1):
        layer = params[f"hidden_{i}"]
        x = x @ layer["kernel"] + layer["bias"][:, None]
        x = x / (1 + np.exp(-x))  # swish
    return x @ params["head"]["kernel"] + params["head"]["bias"][:, None]


def test_soft_clamp_by_hand():
    low, high = -10.0, 0.5
    clamped = likelihoods.soft_clamp(jnp.array([-1000.0, -10.0, -4.0, 0.5, 1000.0]), low, high)

    def softplus(x):
        return np.log1p(np.exp(x))

    inner = 0.5 - softplus(0.5 + 4.0)
    expected = [
        -10.0,
        -10 + softplus(0.5 - softplus(10.5) + 10),
        -10 + softplus(inner + 10),
        # First from above: 0.5 - log 2; then from below.
        -10 + softplus(10.5 - np.log(2)),
        # The lower clamp raises the upper bound slightly.
        -10 + softplus(10.5),
    ]
    np.testing.assert_allclose(clamped, expected, rtol=1e-5)


def test_likelihood_by_hand():
    mean, z = jnp.array([[[1.0, 0.0]]]), jnp.array([[[3.0, 1.0]]])
    log_variance = jnp.log(jnp.array([[[4.0, 0.5]]]))
    # ((1-3)^2 / 4 + log 4 + 1 / 0.5 + log 0.5) / 2, without a factor of 1/2.
    expected = (1 + np.log(4) + 2 + np.log(0.5)) / 2
    np.testing.assert_allclose(likelihoods.nll(mean, log_variance, z, 0.0), [expected], rtol=1e-6)


@pytest.mark.parametrize(
    ("depth", "rates"),
    [
        (1, [2.5e-5, 1e-4]),
        (2, [2.5e-5, 5e-5, 1e-4]),
        (4, [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]),
    ],
)
def test_weight_decay_by_layer(depth, rates):
    names = [f"hidden_{i}" for i in range(depth)] + ["head"]
    # Layer i has 3 x 4 weights of value i + 1; biases are not decayed.
    layers = {
        name: {"kernel": jnp.full((3, 4), i + 1.0), "bias": jnp.full(4, 9.0)}
        for i, name in enumerate(names)
    }
    expected = sum(0.5 * rate * 12 * (i + 1) ** 2 for i, rate in enumerate(rates))
    decay = MLPModel(ModelConfig(depth=depth), SPEC).decay(layers)
    np.testing.assert_allclose(decay, expected, rtol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_loss_equals_numpy(learned):
    config = ModelConfig(
        members=E, elites=2, width=5, depth=4, weight_decay=300.0, learned_bounds=learned
    )
    dynamics, model = init(config)
    params = model.params
    rng = np.random.default_rng(0)
    inputs, z = rng.normal(size=(E, 6, D + A)), rng.normal(size=(E, 6, D + 1))
    low, high = np.full((E, D + 1), -10.0), np.full((E, D + 1), 0.5)
    if learned:
        # The initial bounds are those of the configuration; then each member has other ones.
        np.testing.assert_array_equal(params["bounds"]["low"], low)
        np.testing.assert_array_equal(params["bounds"]["high"], high)
        low, high = rng.uniform(-5, -3, (E, D + 1)), rng.uniform(0, 2, (E, D + 1))
        params = {**params, "bounds": {"low": jnp.float32(low), "high": jnp.float32(high)}}
    else:
        assert params.keys() == {"network"}
    # With the target transform of MBPO, z is (s' - s, r).
    batch = Transition(
        obs=inputs[..., :D],
        action=inputs[..., D:],
        reward=z[..., D],
        discount=np.ones((E, 6)),
        next_obs=inputs[..., :D] + z[..., :D],
    )
    batch = jax.tree.map(jnp.float32, batch)
    stats = with_transform(model, exponent=jnp.float32(0.5)).stats
    member_losses = jax.jit(jax.vmap(lambda params, batch: dynamics.loss(params, stats, batch)))
    values = member_losses(params, batch)
    out = mlp(params["network"], inputs)
    mean, raw = out[..., : D + 1], out[..., D + 1 :]
    low_, high_ = low[:, None], high[:, None]
    log_var = high_ - np.logaddexp(0, high_ - raw)
    log_var = low_ + np.logaddexp(0, log_var - low_)
    terms = np.exp(0.5 * log_var) * (np.exp(-log_var) * (mean - z) ** 2 + log_var)
    expected = terms.mean((1, 2))
    names = ["hidden_0", "hidden_1", "hidden_2", "hidden_3", "head"]
    for name, rate in zip(names, [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4], strict=True):
        kernel = np.asarray(params["network"][name]["kernel"], np.float64)
        expected += 300 * 0.5 * rate * (kernel**2).sum((1, 2))
    if learned:
        # The sum over the members is the cost that common bounds would have.
        expected += 0.01 / E * (high.sum(1) - low.sum(1))
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_elites_predict_their_own_inputs():
    dynamics, model = init(ModelConfig(members=E, elites=2, width=5, depth=2))
    mean, std = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 4.0, 0.5])
    model = with_stats(model, input_mean=mean, input_std=std)
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(2, 4, D)), rng.normal(size=(2, 4, A))
    elites = ensemble.select_elites(model._replace(elites=jnp.array([2, 0])))
    assert elites.elites.tolist() == [0, 1]
    mean, log_variance = jax.jit(
        lambda *inputs: ensemble.vmap_members(dynamics.predict, elites, *inputs)
    )(jnp.float32(obs), jnp.float32(action))
    inputs = (np.concatenate([obs, action], -1) - [1, 2, 3]) / [2, 4, 0.5]
    chosen = jax.tree.map(lambda x: x[np.array([2, 0])], model.params["network"])
    out = mlp(chosen, inputs)
    np.testing.assert_allclose(mean, out[..., : D + 1], rtol=1e-4, atol=1e-6)
    clamped = likelihoods.soft_clamp(out[..., D + 1 :], -10.0, 0.5)
    np.testing.assert_allclose(log_variance, clamped, rtol=1e-4, atol=1e-6)


def test_initial_weights_differ_and_scale_with_the_fan_in():
    spec = EnvSpec("wide", 10, 6, 50, (), None)
    dynamics = MLPModel(ModelConfig(width=100, depth=2), spec)
    params = dynamics.init(jax.random.PRNGKey(0), 5)["network"]
    for name, fan_in in (("hidden_0", 16), ("hidden_1", 100), ("head", 100)):
        kernel = np.asarray(params[name]["kernel"])
        unit = 1 / (2 * np.sqrt(fan_in))
        # A normal truncated at two standard deviations has 0.88 of its standard deviation.
        assert np.abs(kernel).max() <= 2 * unit * 1.0001
        np.testing.assert_allclose(kernel.std((1, 2)), 0.8796 * unit, rtol=0.08)
        assert len({kernel[i].tobytes() for i in range(5)}) == 5
        assert not params[name]["bias"].any()


def test_reward_from_the_next_state_equals_numpy():
    """In training it is the true next state, in predictions the member's own mean."""
    config = ModelConfig(members=E, elites=2, width=5, depth=2, reward_from="next_state")
    dynamics, model = init(config)
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=D + A), rng.uniform(1, 2, D + A)
    scale = rng.uniform(0.5, 2, D + 1)
    model = with_stats(model, input_mean=jnp.float32(mean), input_std=jnp.float32(std))
    model = with_transform(model, scale=jnp.float32(scale))
    obs, action, next_obs = (jnp.float32(rng.normal(size=(6, n))) for n in (D, A, D))
    inputs = (np.concatenate([obs, action], -1) - mean) / std

    def expected(next_obs):
        state = mlp(model.params["network"], np.broadcast_to(inputs, (E, *inputs.shape)))
        if next_obs is None:
            next_obs = obs + state[..., :D] * scale[:D]
        normalized = (next_obs - mean[:D]) / std[:D]
        both = np.concatenate([np.broadcast_to(inputs, (E, *inputs.shape)), normalized], -1)
        return mlp(model.params["reward_network"], both)[..., 0]

    predict = jax.jit(lambda *inputs: ensemble.predict_all(dynamics, model, *inputs))
    predicted, _ = predict(obs, action)
    np.testing.assert_allclose(predicted[..., -1], expected(None), rtol=1e-4, atol=1e-5)
    truth = np.broadcast_to(next_obs, (E, *next_obs.shape))
    given, _ = predict(obs, action, next_obs)
    np.testing.assert_allclose(given[..., -1], expected(truth), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(given[..., :-1], predicted[..., :-1])
    assert not np.allclose(given[..., -1], predicted[..., -1], atol=1e-3)


def test_state_network_gets_no_gradient_from_a_reward_from_the_next_state():
    config = ModelConfig(
        members=1, elites=1, width=5, depth=2, reward_from="next_state", weight_decay=0.0
    )
    dynamics, model = init(config)
    params = jax.tree.map(lambda x: x[0], model.params)
    ones = jnp.ones((4, D))
    batch = Transition(ones, jnp.ones((4, A)), jnp.ones(4), jnp.ones(4), 2 * ones)
    gradient = jax.jit(jax.grad(dynamics.loss))
    one, other = (
        gradient(params, model.stats, batch._replace(reward=jnp.full(4, r))) for r in (1.0, 9.0)
    )
    for layer in one["network"]:
        np.testing.assert_array_equal(
            one["network"][layer]["kernel"], other["network"][layer]["kernel"]
        )
    heads = [g["reward_network"]["head"]["bias"] for g in (one, other)]
    assert not np.allclose(*heads)


# --- Other networks and likelihoods ---------------------------------------------------------------


@pytest.mark.parametrize("reward_from", ["inputs", "next_state"])
def test_deterministic_model_has_no_variance_and_minimizes_squared_errors(reward_from):
    config = ModelConfig(
        members=E,
        elites=2,
        width=5,
        depth=2,
        weight_decay=0.0,
        likelihood="deterministic",
        reward_from=reward_from,
        learned_bounds=True,
    )
    dynamics, model = init(config)
    assert not dynamics.has_variance and "bounds" not in model.params
    rng = np.random.default_rng(0)
    obs, action, next_obs = (jnp.float32(rng.normal(size=(6, n))) for n in (D, A, D))
    reward = jnp.float32(rng.normal(size=6))
    prediction = ensemble.predict_all(dynamics, model, obs, action, next_obs)
    assert prediction.log_variance is None and prediction.mean.shape == (E, 6, D + 1)
    member = jax.tree.map(lambda x: x[1], model.params)
    batch = Transition(obs, action, reward, jnp.ones(6), next_obs)
    z = targets.encode(model.stats.transform, obs, reward, next_obs)
    expected = np.square(np.asarray(prediction.mean[1] - z, np.float64)).mean()
    np.testing.assert_allclose(dynamics.loss(member, model.stats, batch), expected, rtol=1e-5)


def test_resnet_model_has_two_layers_per_block_and_decays_kernels_only():
    config = ModelConfig(network="resnet", width=4, depth=3, members=E, elites=2)
    dynamics = make_model(config, SPEC)
    assert type(dynamics) is ResNetModel and dynamics.has_variance
    params = jax.eval_shape(lambda: dynamics.init(KEY, E))["network"]
    assert {name for name in params if name.startswith("wide")} == {"wide_0", "wide_1"}
    assert params["head"]["kernel"].shape == (E, 4, 2 * (D + 1))
    ones = jax.tree.map(lambda x: jnp.ones(x.shape[1:]), params)
    sizes = {"embed": (D + A) * 4, "blocks": 4 * 4 * 16, "head": 4 * 2 * (D + 1)}
    expected = 0.5 * (2.5e-5 * sizes["embed"] + 7.5e-5 * sizes["blocks"] + 1e-4 * sizes["head"])
    np.testing.assert_allclose(dynamics.decay(ones), expected, rtol=1e-5)
