"""The ensemble: a dynamics model mapped over its members (Chua et al., 2018; Janner et al., 2019).

Members lie stacked, leaves (E, ...).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dynajax.config import ModelConfig
from dynajax.models import targets
from dynajax.models.base import DynamicsModel, Gaussian
from dynajax.types import DataStats, EnvSpec, ModelState


def init(dynamics: DynamicsModel, key: Array) -> ModelState:
    """Return a new ensemble with the target transform of MBPO as published."""
    config = dynamics.config
    params = dynamics.init(key, config.members)
    return ModelState(
        params=params,
        opt_state=jax.vmap(optimizer(config).init)(params),
        stats=init_stats(dynamics.spec),
        elites=jnp.arange(config.elites),
        num_fits=jnp.zeros((), jnp.int32),
    )


def init_stats(spec: EnvSpec) -> DataStats:
    """Return the scales before the first fit."""
    inputs = spec.obs_dim + spec.action_dim
    return DataStats(
        transform=targets.identity_transform(spec.obs_dim),
        input_mean=jnp.zeros(inputs),
        input_std=jnp.ones(inputs),
        change_std=jnp.ones(spec.obs_dim + 1),
        has_varied=jnp.zeros(spec.obs_dim + 1, bool),
    )


def optimizer(config: ModelConfig) -> optax.GradientTransformation:
    """Return the optimizer of each member."""
    return optax.adam(config.learning_rate, eps=1e-8)


def vmap_members(
    predict: Callable[..., Gaussian], state: ModelState, *inputs: Float[Array, "E *B X"]
) -> Gaussian:
    """Predict with every member, each on its own inputs, leaves (E, ...).

    Args:
      predict: a method of `DynamicsModel` that predicts.
    """
    return jax.vmap(lambda params, *x: predict(params, state.stats, *x))(state.params, *inputs)


def broadcast_to_members(state: ModelState, x: Float[Array, "*X"]) -> Float[Array, " E *X"]:
    """Return the same array for every member."""
    members = jax.tree.leaves(state.params)[0].shape[0]
    return jnp.broadcast_to(x, (members, *x.shape))


def predict_all(
    dynamics: DynamicsModel,
    state: ModelState,
    obs: Float[Array, "B D"],
    action: Float[Array, "B A"],
    *next_obs: Float[Array, "B D"],
) -> Gaussian:
    """Predict the same transitions with every member, leaves (E, B, Z).

    Args:
      next_obs: see `DynamicsModel.predict`.
    """
    inputs = (broadcast_to_members(state, x) for x in (obs, action, *next_obs))
    return vmap_members(dynamics.predict, state, *inputs)


def select_elites(state: ModelState) -> ModelState:
    """Return the elites as an ensemble, best first, leaves (K, ...)."""
    return state._replace(
        params=jax.tree.map(lambda p: p[state.elites], state.params),
        elites=jnp.arange(state.elites.size),
    )
