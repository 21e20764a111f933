"""The ensemble: its loss by numpy, and the weights that it begins with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import nets
from dynajax.config import ModelConfig
from dynajax.models import ensemble
from dynajax.types import EnvSpec, Transition

D, A, E = 2, 1, 3
SPEC = EnvSpec("line", D, A, 50, ("x", "v"), None)
init = jax.jit(ensemble.init, static_argnums=1)


def forward(layers, inputs):
    """Outputs (E, B, 2 (D+1)) by numpy in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), layers)
    x = np.asarray(inputs, np.float64)
    for i in range(len(params) - 1):
        layer = params[f"hidden_{i}"]
        x = x @ layer["kernel"] + layer["bias"][:, None]
        x = x / (1 + np.exp(-x))  # swish
    return x @ params["head"]["kernel"] + params["head"]["bias"][:, None]


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
    layers = {
        name: {"kernel": jnp.full((3, 2, 2), i + 1.0), "bias": jnp.full((3, 2), 9.0)}
        for i, name in enumerate(names)
    }
    expected = sum(0.5 * rate * 12 * (i + 1) ** 2 for i, rate in enumerate(rates))
    np.testing.assert_allclose(ensemble.decay(layers), expected, rtol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_whole_loss_by_numpy(learned):
    config = ModelConfig(
        members=E, elites=2, width=5, depth=4, weight_decay=300.0, learned_bounds=learned
    )
    model = init(config, SPEC, jax.random.PRNGKey(1))
    params = model.params
    rng = np.random.default_rng(0)
    inputs, z = rng.normal(size=(E, 6, D + A)), rng.normal(size=(E, 6, D + 1))
    low, high = np.full((E, D + 1), -10.0), np.full((E, D + 1), 0.5)
    if learned:
        # As they are at first, and then each member's own.
        np.testing.assert_array_equal(params["bounds"]["low"], low)
        np.testing.assert_array_equal(params["bounds"]["high"], high)
        low, high = rng.uniform(-5, -3, (E, D + 1)), rng.uniform(0, 2, (E, D + 1))
        params = {**params, "bounds": {"low": jnp.float32(low), "high": jnp.float32(high)}}
    else:
        assert params.keys() == {"layers"}
    # Under MBPO's own code z is (s' - s, r).
    batch = Transition(
        obs=inputs[..., :D],
        action=inputs[..., D:],
        reward=z[..., D],
        discount=np.ones((E, 6)),
        next_obs=inputs[..., :D] + z[..., :D],
    )
    batch = jax.tree.map(jnp.float32, batch)
    model = model._replace(code=model.code._replace(exponent=jnp.float32(0.5)))
    member_losses = jax.jit(jax.vmap(functools.partial(ensemble.loss, config, model)))
    values = member_losses(params, batch)
    out = forward(params["layers"], inputs)
    mean, raw = out[..., : D + 1], out[..., D + 1 :]
    low_, high_ = low[:, None], high[:, None]
    log_var = high_ - np.logaddexp(0, high_ - raw)
    log_var = low_ + np.logaddexp(0, log_var - low_)
    terms = np.exp(0.5 * log_var) * (np.exp(-log_var) * (mean - z) ** 2 + log_var)
    expected = terms.mean((1, 2))
    names = ["hidden_0", "hidden_1", "hidden_2", "hidden_3", "head"]
    for name, rate in zip(names, [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4], strict=True):
        kernel = np.asarray(params["layers"][name]["kernel"], np.float64)
        expected += 300 * 0.5 * rate * (kernel**2).sum((1, 2))
    if learned:
        # All members together pay what common bounds would cost.
        expected += 0.01 / E * (high.sum(1) - low.sum(1))
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_elites_predict_on_their_own_parts():
    config = ModelConfig(members=E, elites=2, width=5, depth=2)
    model = init(config, SPEC, jax.random.PRNGKey(1))
    moments = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 4.0, 0.5])
    model = model._replace(input_mean=moments[0], input_std=moments[1])
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(2, 4, D)), rng.normal(size=(2, 4, A))
    elites = ensemble.elites(model._replace(elites=jnp.array([2, 0])))
    assert elites.elites.tolist() == [0, 1]
    mean, log_variance = jax.jit(ensemble.each, static_argnums=0)(
        ensemble.member_prediction, config, elites, jnp.float32(obs), jnp.float32(action)
    )
    inputs = (np.concatenate([obs, action], -1) - [1, 2, 3]) / [2, 4, 0.5]
    chosen = jax.tree.map(lambda x: x[np.array([2, 0])], model.params["layers"])
    out = forward(chosen, inputs)
    np.testing.assert_allclose(mean, out[..., : D + 1], rtol=1e-4, atol=1e-6)
    clamped = ensemble.soft_clamp(out[..., D + 1 :], -10.0, 0.5)
    np.testing.assert_allclose(log_variance, clamped, rtol=1e-4, atol=1e-6)


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


def test_a_reward_read_from_the_next_state_by_numpy():
    """In training from the true one; in predictions from the member's own mean."""
    config = ModelConfig(members=E, elites=2, width=5, depth=2, reward_from="next_state")
    model = init(config, SPEC, jax.random.PRNGKey(1))
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=D + A), rng.uniform(1, 2, D + A)
    scale = rng.uniform(0.5, 2, D + 1)
    model = model._replace(
        input_mean=jnp.float32(mean),
        input_std=jnp.float32(std),
        code=model.code._replace(scale=jnp.float32(scale)),
    )
    obs, action, next_obs = (jnp.float32(rng.normal(size=(6, n))) for n in (D, A, D))
    inputs = (np.concatenate([obs, action], -1) - mean) / std

    def expected(following):
        state = forward(model.params["layers"], np.broadcast_to(inputs, (E, *inputs.shape)))
        if following is None:
            following = obs + state[..., :D] * scale[:D]
        following = (following - mean[:D]) / std[:D]
        both = np.concatenate([np.broadcast_to(inputs, (E, *inputs.shape)), following], -1)
        return forward(model.params["reward"], both)[..., 0]

    predicted, _ = jax.jit(ensemble.predict_all)(config, model, obs, action)
    np.testing.assert_allclose(predicted[..., -1], expected(None), rtol=1e-4, atol=1e-5)
    truth = np.broadcast_to(next_obs, (E, *next_obs.shape))
    read, _ = jax.jit(ensemble.predict_all)(config, model, obs, action, next_obs)
    np.testing.assert_allclose(read[..., -1], expected(truth), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(read[..., :-1], predicted[..., :-1])
    assert not np.allclose(read[..., -1], predicted[..., -1], atol=1e-3)


def test_the_reward_teaches_only_what_reads_it():
    """No gradient of the state's network comes from a reward that is read from the next state."""
    config = ModelConfig(
        members=1, elites=1, width=5, depth=2, reward_from="next_state", weight_decay=0.0
    )
    model = init(config, SPEC, jax.random.PRNGKey(1))
    params = jax.tree.map(lambda x: x[0], model.params)
    ones = jnp.ones((4, D))
    batch = Transition(ones, jnp.ones((4, A)), jnp.ones(4), jnp.ones(4), 2 * ones)
    gradient = jax.jit(jax.grad(ensemble.loss, argnums=2))
    one, other = (
        gradient(config, model, params, batch._replace(reward=jnp.full(4, r))) for r in (1.0, 9.0)
    )
    for layer in one["layers"]:
        np.testing.assert_array_equal(
            one["layers"][layer]["kernel"], other["layers"][layer]["kernel"]
        )
    assert not np.allclose(one["reward"]["head"]["bias"], other["reward"]["head"]["bias"])
