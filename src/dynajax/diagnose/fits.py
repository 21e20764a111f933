"""Fit small ensembles under every combination of fixes to the same data, in one program."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import plugin_checks
from dynajax.config import ModelConfig
from dynajax.models import ensemble, fit_data, make_model, targets, training
from dynajax.models.base import DynamicsModel
from dynajax.replay import of_transitions
from dynajax.types import Array, EnvSpec, ModelState, ReplayBuffer, Transition
from dynajax.xla import backend

#: Chosen by measurement (docs/dev/performance.md): the cheapest ensemble that ranks the fixes
#: as larger ensembles do.
MODEL = ModelConfig(
    members=3,
    elites=3,
    width=128,
    depth=4,
    batch=64,
    learning_rate=1e-3,
    fit_steps=150,
    max_holdout=1,
)
#: Number of warm-started fits of `fit_steps` each: 1,500 gradient steps in total.
ROUNDS = 10
#: Every single fix, and the combinations of `scale` with others.
FIX_SETS = (
    "none",
    "scale",
    "target",
    "auto",
    "beta",
    "scale,target",
    "scale,auto",
    "scale,beta",
    "scale,target,beta",
    "scale,auto,beta",
)


class Fitted(NamedTuple):
    """Ensembles of F combinations of fixes and R seeds."""

    dynamics: DynamicsModel
    fixes: tuple[str, ...]
    models: ModelState  # leaves (R, F, ...)
    held_out: np.ndarray  # (R, N) bool: the transitions that no fit used


class Prediction(NamedTuple):
    """Predictions of E members in the units of the task: next state, then reward."""

    mean: np.ndarray  # (E, B, D+1)
    variance: np.ndarray  # (E, B, D+1), aleatoric


def fit(
    spec: EnvSpec,
    fixes: Sequence[str],
    data: Sequence[Transition],
    seed: int,
    config: ModelConfig = MODEL,
    rounds: int = ROUNDS,
    progress: Callable[[int], None] = lambda rounds: None,
) -> Fitted:
    """Fit an ensemble for every combination of fixes and every seed, in one jitted program.

    The ensembles of one seed have the same data, minibatches and initial weights. No elites are
    selected and no fit is stopped early, so the held-out transitions influence nothing.

    Args:
      fixes: comma lists of `FIXES`.
      data: leaves (N, ...) for each of the R seeds.
      seed: of the first seed's split, weights and minibatches.
      progress: is called with the number of rounds done so far.
    """
    variants = [targets.parse_fixes(names) for names in fixes]
    plugin_checks.check_fixes(spec, variants)
    dynamics = make_model(config, spec)
    buffers = of_transitions(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *data),
        jnp.ones((len(data), len(data[0].reward)), bool),
    )
    keys = jax.vmap(lambda s: jax.random.split(jax.random.PRNGKey(s), 3))(
        jnp.arange(seed, seed + len(data))
    )

    def one(
        model: ModelState, variant: Array, real: ReplayBuffer, keys: Array, key: Array
    ) -> ModelState:
        steps = config.fit_steps
        return training.fit(dynamics, variants, variant, model, real, keys[1], key, steps)[0]

    over_fixes = jax.vmap(one, in_axes=(0, 0, None, None, None))
    over_seeds = jax.vmap(over_fixes, in_axes=(0, None, 0, 0, 0))

    @functools.partial(backend.jit, donate_argnums=0)
    def one_round(models: ModelState, real: ReplayBuffer, keys: Array, index: Array) -> ModelState:
        round_keys = jax.vmap(lambda k: jax.random.fold_in(k[2], index))(keys)
        return over_seeds(models, jnp.arange(len(fixes)), real, keys, round_keys)

    @jax.jit
    def init(keys: Array) -> ModelState:
        models = jax.lax.map(lambda k: ensemble.init(dynamics, k[0]), keys)
        return jax.tree.map(lambda x: jnp.repeat(x[:, None], len(fixes), 1), models)

    @jax.jit
    def held_out(real: ReplayBuffer, keys: Array) -> Array:
        return jax.vmap(lambda r, k: fit_data.split(config, r, k[1]).weights == 0)(real, keys)

    models = init(keys)
    for index in range(rounds):
        models = jax.block_until_ready(one_round(models, buffers, keys, jnp.asarray(index)))
        progress(index + 1)
    return Fitted(dynamics, tuple(fixes), models, np.asarray(held_out(buffers, keys)))


@functools.partial(jax.jit, static_argnums=0)
def _predict_raw(
    dynamics: DynamicsModel, model: ModelState, obs: Array, action: Array
) -> tuple[Array, Array]:
    mean, log_variance = ensemble.predict_all(dynamics, model, obs, action)
    transform = model.stats.transform
    next_obs, reward = targets.decode(transform, obs, mean)
    means = jnp.concatenate([next_obs, reward[..., None]], -1)
    if log_variance is None:
        return means, jnp.zeros_like(means)
    return means, jnp.exp(log_variance) * jnp.square(transform.scale)


def predict(
    dynamics: DynamicsModel, model: ModelState, obs: np.ndarray, action: np.ndarray
) -> Prediction:
    """Predict one step with every member: obs (B, D), action (B, A)."""
    return Prediction(*map(np.asarray, _predict_raw(dynamics, model, obs, action)))


@functools.partial(jax.jit, static_argnums=0)
def _open_loop(dynamics: DynamicsModel, model: ModelState, obs: Array, actions: Array) -> Array:
    start = ensemble.broadcast_to_members(model, obs)

    def step(obs: Array, action: Array) -> tuple[Array, Array]:
        action = ensemble.broadcast_to_members(model, action)
        mean, _ = ensemble.vmap_members(dynamics.predict, model, obs, action)
        next_obs, reward = targets.decode(model.stats.transform, obs, mean)
        return next_obs, jnp.concatenate([next_obs, reward[..., None]], -1)

    return jax.lax.scan(step, start, jnp.swapaxes(actions, 0, 1))[1]


def open_loop(
    dynamics: DynamicsModel, model: ModelState, obs: np.ndarray, actions: np.ndarray
) -> np.ndarray:
    """Predict H steps, where each member continues from its own mean prediction.

    Args:
      obs: (B, D).
      actions: (B, H, A).

    Returns:
      Means (H, E, B, D+1): next state, then reward.
    """
    return np.asarray(_open_loop(dynamics, model, obs, actions))


def select_model(models: ModelState, *index: int) -> ModelState:
    """Return one of several models by its index along the leading axes."""
    return jax.tree.map(lambda x: x[index], models)
