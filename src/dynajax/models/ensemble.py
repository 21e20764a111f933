"""The probabilistic ensemble: its loss and its predictions. For one row; `fitting` trains it.

Chua et al. (2018) and Janner et al. (2019); the weighted likelihood of Seitzer et al. (2022).
Everything is learned and scored on the code's z (`targets`). A member never needs another, so its
loss and its training are written for one member; parameters lie stacked, leaves (E, ...).
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from dynajax import nets
from dynajax.config import ModelConfig
from dynajax.models import targets
from dynajax.types import Array, EnvSpec, ModelState, Params, Transition

#: A member's: config, model, the member's parameters, inputs (..., X) -> means and log-variances.
Prediction = Callable[..., tuple[Array, Array]]

#: Hidden layers of the network that reads the reward from the next state.
REWARD_DEPTH = 2

#: L2 decay of the first layer, the second, those between, and the last (Chua et al., 2018).
DECAY_FIRST, DECAY_SECOND, DECAY_MIDDLE, DECAY_LAST = 2.5e-5, 5e-5, 7.5e-5, 1e-4


def init(config: ModelConfig, spec: EnvSpec, key: Array) -> ModelState:
    """A new ensemble with the code of MBPO as published."""
    network = nets.member(config.width, config.depth, spec.obs_dim)
    inputs = spec.obs_dim + spec.action_dim
    params = {"layers": nets.stacked_init(network, key, config.members, inputs)}
    if config.reward_from == "next_state":
        params["reward"] = nets.stacked_init(
            _reward_network(config),
            jax.random.fold_in(key, 1),
            config.members,
            inputs + spec.obs_dim,
        )
    if config.learned_bounds:
        shape = config.members, spec.obs_dim + 1
        params["bounds"] = {
            "low": jnp.full(shape, config.log_variance_min, jnp.float32),
            "high": jnp.full(shape, config.log_variance_max, jnp.float32),
        }
    return ModelState(
        params=params,
        optimiser=jax.vmap(optimiser(config).init)(params),
        code=targets.identity_transform(spec.obs_dim),
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


def _reward_network(config: ModelConfig) -> nets.MLP:
    """(..., 2D+A) -> (..., 2)."""
    return nets.member(config.width, REWARD_DEPTH, 0)


def _moments(config: ModelConfig, params: Params, output: Array) -> tuple[Array, Array]:
    """Mean and clamped log-variance of the last X channels of z: (..., 2X) -> (..., X) twice."""
    mean, raw = jnp.split(output, 2, -1)
    if not config.learned_bounds:
        return mean, soft_clamp(raw, config.log_variance_min, config.log_variance_max)
    low, high = (params["bounds"][name][-mean.shape[-1] :] for name in ("low", "high"))
    return mean, soft_clamp(raw, low, high)


def from_inputs(
    config: ModelConfig, model: ModelState, params: Params, obs: Array, action: Array
) -> tuple[Array, Array]:
    """Mean and log-variance of z from (s, a) by one member: (..., D), (..., A) -> (..., D+1) twice.

    Args:
      model: for its code and the normalisation of inputs.
      params: the member's.
    """
    inputs = normalise(model, obs, action)
    outputs = params["layers"]["head"]["bias"].shape[0] // 2
    network = nets.member(config.width, config.depth, outputs - 1)
    return _moments(config, params, nets.apply(network, params["layers"], inputs))


def from_next_state(
    config: ModelConfig,
    model: ModelState,
    params: Params,
    obs: Array,
    action: Array,
    next_obs: Array,
) -> tuple[Array, Array]:
    """Of the reward's channel alone, from (s, a, s'): (..., D), (..., A), (..., D) -> (..., 1) twice.

    Args:
      model, params: as in `from_inputs`.
    """
    dim = obs.shape[-1]
    following = (next_obs - model.input_mean[:dim]) / model.input_std[:dim]
    inputs = jnp.concatenate([normalise(model, obs, action), following], -1)
    return _moments(config, params, nets.apply(_reward_network(config), params["reward"], inputs))


def with_reward(moments: tuple[Array, Array], reward: tuple[Array, Array]) -> tuple[Array, Array]:
    """Moments (..., D+1) with the reward's (..., 1) in the place of their own."""
    mean, log_variance = (
        jnp.concatenate([whole[..., :-1], last], -1)
        for whole, last in zip(moments, reward, strict=True)
    )
    return mean, log_variance


def member_prediction(
    config: ModelConfig,
    model: ModelState,
    params: Params,
    obs: Array,
    action: Array,
    next_obs: Array | None = None,
) -> tuple[Array, Array]:
    """Mean and log-variance of z from one member: (..., D), (..., A) -> (..., D+1) twice.

    Args:
      model, params: as in `from_inputs`.
      next_obs: (..., D) what the reward is read from, where it is; the member's own mean by default.
    """
    moments = from_inputs(config, model, params, obs, action)
    if config.reward_from == "inputs":
        return moments
    if next_obs is None:
        next_obs, _ = targets.decode(model.code, obs, moments[0])
    return with_reward(moments, from_next_state(config, model, params, obs, action, next_obs))


def each(
    predict: Prediction, config: ModelConfig, model: ModelState, *inputs: Array
) -> tuple[Array, Array]:
    """A member's prediction by every member, each on its own part: (E, B, ...) -> (E, B, ...) twice.

    Args:
      predict: `member_prediction`, `from_inputs` or `from_next_state`.
    """
    return jax.vmap(functools.partial(predict, config, model))(model.params, *inputs)


def broadcast_to_members(model: ModelState, x: Array) -> Array:
    """The same for every member: (...) -> (E, ...)."""
    members = jax.tree.leaves(model.params)[0].shape[0]
    return jnp.broadcast_to(x, (members, *x.shape))


def predict_all(
    config: ModelConfig, model: ModelState, obs: Array, action: Array, *next_obs: Array
) -> tuple[Array, Array]:
    """`member_prediction` of every member for the same: (B, D), (B, A) -> (E, B, D+1) twice."""
    inputs = (broadcast_to_members(model, x) for x in (obs, action, *next_obs))
    return each(member_prediction, config, model, *inputs)


def elites(model: ModelState) -> ModelState:
    """The model's elites as an ensemble, best first: leaves (K, ...)."""
    return model._replace(
        params=jax.tree.map(lambda p: p[model.elites], model.params),
        elites=jnp.arange(model.elites.size),
    )


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


def loss(config: ModelConfig, model: ModelState, params: Params, batch: Transition) -> Array:
    """What a member minimises: its NLL, decay, and its share of the price of learned bounds.

    Chua et al. learn bounds that all members have in common; here each has its own, so that no
    member waits for another.

    Args:
      model: for its code and the normalisation of inputs.
      params: the member's.
      batch: leaves (B, ...).
    """
    z = targets.encode(model.code, batch.obs, batch.reward, batch.next_obs)
    prediction = member_prediction(config, model, params, batch.obs, batch.action, batch.next_obs)
    value = nll(*prediction, z, model.code.exponent)
    value += config.weight_decay * decay(params["layers"])
    if config.reward_from == "next_state":
        value += config.weight_decay * decay(params["reward"])
    if config.learned_bounds:
        spread = params["bounds"]["high"].sum() - params["bounds"]["low"].sum()
        value += config.bound_penalty / config.members * spread
    return value


def normalise(model: ModelState, obs: Array, action: Array) -> Array:
    """The network's inputs: (..., D), (..., A) -> (..., D+A)."""
    chex.assert_equal_shape_prefix([obs, action], obs.ndim - 1)
    chex.assert_axis_dimension(model.input_mean, -1, obs.shape[-1] + action.shape[-1])
    return (jnp.concatenate([obs, action], -1) - model.input_mean) / model.input_std
