"""The probabilistic ensemble: its loss and its predictions. For one row; `fitting` trains it.

Chua et al. (2018) and Janner et al. (2019); the weighted likelihood of Seitzer et al. (2022).
Everything is learned and scored on the code's z (`targets`). A member never needs another, so its
loss and its training are written for one member; parameters lie stacked, leaves (E, ...).
"""

import functools

import chex
import jax
import jax.numpy as jnp
import optax

from dynajax import nets
from dynajax.config import ModelConfig
from dynajax.models import targets
from dynajax.types import Array, EnvSpec, Model, Params

#: L2 decay of the first layer, the second, those between, and the last (Chua et al., 2018).
DECAY_FIRST, DECAY_SECOND, DECAY_MIDDLE, DECAY_LAST = 2.5e-5, 5e-5, 7.5e-5, 1e-4


def init(config: ModelConfig, spec: EnvSpec, key: Array) -> Model:
    """A new ensemble with the code of MBPO as published."""
    network = nets.member(config.width, config.depth, spec.obs_dim)
    inputs = spec.obs_dim + spec.action_dim
    params = {"layers": nets.stacked_init(network, key, config.members, inputs)}
    if config.learned_bounds:
        shape = config.members, spec.obs_dim + 1
        params["bounds"] = {
            "low": jnp.full(shape, config.log_variance_min, jnp.float32),
            "high": jnp.full(shape, config.log_variance_max, jnp.float32),
        }
    return Model(
        params=params,
        optimiser=jax.vmap(optimiser(config).init)(params),
        code=targets.identity_code(spec.obs_dim),
        input_mean=jnp.zeros(inputs),
        input_std=jnp.ones(inputs),
        unit=jnp.ones(spec.obs_dim + 1),
        varied=jnp.zeros(spec.obs_dim + 1, bool),
        elites=jnp.arange(config.elites),
        fits=jnp.zeros((), jnp.int32),
    )


def optimiser(config: ModelConfig) -> optax.GradientTransformation:
    """Of each member."""
    return optax.adam(config.learning_rate, eps=1e-8)


def soft_clamp(raw: Array, low: Array | float, high: Array | float) -> Array:
    """`raw` bent softly under `high`, then over `low` (Chua et al., 2018, appendix A)."""
    raw = high - jax.nn.softplus(high - raw)
    return low + jax.nn.softplus(raw - low)


def member_distribution(config: ModelConfig, params: Params, inputs: Array) -> tuple[Array, Array]:
    """Mean and log-variance of z from one member: normalised (..., D+A) -> (..., D+1) twice."""
    outputs = params["layers"]["head"]["bias"].shape[0] // 2
    network = nets.member(config.width, config.depth, outputs - 1)
    mean, raw = jnp.split(nets.apply(network, params["layers"], inputs), 2, -1)
    if config.learned_bounds:
        return mean, soft_clamp(raw, params["bounds"]["low"], params["bounds"]["high"])
    return mean, soft_clamp(raw, config.log_variance_min, config.log_variance_max)


def distribution(config: ModelConfig, params: Params, inputs: Array) -> tuple[Array, Array]:
    """Mean and log-variance of z from every member, each on inputs of its own.

    Args:
      inputs: (E, ..., D+A), normalised.

    Returns:
      (E, ..., D+1) twice.
    """
    return jax.vmap(functools.partial(member_distribution, config))(params, inputs)


def nll(mean: Array, log_variance: Array, z: Array, exponent: Array) -> Array:
    """mean over B and D+1 of w (e^-l (mu - z)^2 + l), w = stop_gradient(e^(exponent l)).

    (..., B, D+1) thrice -> (...). With exponent 0 the weight is 1 to the bit.
    """
    weight = jnp.exp(exponent * jax.lax.stop_gradient(log_variance))
    terms = weight * (jnp.exp(-log_variance) * jnp.square(mean - z) + log_variance)
    return terms.mean((-2, -1))


def decay(layers: Params) -> Array:
    """sum over layers (and members) of lambda/2 |W|^2."""
    hidden = len(layers) - 1
    rates = [DECAY_FIRST, DECAY_SECOND, *[DECAY_MIDDLE] * hidden][:hidden]
    ordered = [layers[f"hidden_{i}"] for i in range(hidden)] + [layers["head"]]
    return sum(
        (
            0.5 * rate * jnp.square(layer["kernel"]).sum()
            for rate, layer in zip([*rates, DECAY_LAST], ordered, strict=True)
        ),
        start=jnp.zeros(()),
    )


def loss(config: ModelConfig, params: Params, inputs: Array, z: Array, exponent: Array) -> Array:
    """What a member minimises: its NLL, decay, and its share of the price of learned bounds.

    Chua et al. learn bounds that all members have in common; here each has its own, so that no
    member waits for another.
    """
    value = nll(*member_distribution(config, params, inputs), z, exponent)
    value += config.weight_decay * decay(params["layers"])
    if config.learned_bounds:
        spread = params["bounds"]["high"].sum() - params["bounds"]["low"].sum()
        value += config.bound_penalty / config.members * spread
    return value


def normalise(model: Model, obs: Array, action: Array) -> Array:
    """The network's inputs: (..., D), (..., A) -> (..., D+A)."""
    chex.assert_equal_shape_prefix([obs, action], obs.ndim - 1)
    chex.assert_axis_dimension(model.input_mean, -1, obs.shape[-1] + action.shape[-1])
    return (jnp.concatenate([obs, action], -1) - model.input_mean) / model.input_std


def predict(
    config: ModelConfig, model: Model, members: Array, obs: Array, action: Array
) -> tuple[Array, Array]:
    """Mean and log-variance of z by the named members, each on its own part.

    Args:
      members: (K,) which.
      obs, action: (K, B, D), (K, B, A).

    Returns:
      (K, B, D+1) twice.
    """
    chosen = jax.tree.map(lambda p: p[members], model.params)
    return distribution(config, chosen, normalise(model, obs, action))
