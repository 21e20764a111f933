"""A fit of the ensemble: how long it is trained on what data, and how good it then is. For one row.

Chua et al. (2018) and Janner et al. (2019). A fit is begun, its members are trained, and it is
ended: three functions, so that members can be trained on other devices than the row's own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dynajax import nets, trust
from dynajax.config import ModelConfig
from dynajax.models import targets
from dynajax.models.ensemble import loss, optimiser, predict_all
from dynajax.models.fit_data import DataSplit, analyze_data
from dynajax.models.recoding import rescale_head
from dynajax.replay import take
from dynajax.types import Array, Metrics, ModelState, Params, Replay, Transition
from dynajax.xla import backend

#: Holdout transitions that all members predict together.
SCORED_AT_ONCE = 500


def _weighted_mean(values: Array, weights: Array, axis: int = 0) -> Array:
    shape = [1] * values.ndim
    shape[axis] = weights.shape[0]
    return (values * weights.reshape(shape)).sum(axis) / jnp.maximum(weights.sum(), 1.0)


def _truth(model: ModelState, data: Transition) -> Array:
    """z of transitions, leaves (B, ...) -> (B, D+1)."""
    return targets.encode(model.code, data.obs, data.reward, data.next_obs)


def _predictions(config: ModelConfig, model: ModelState, *inputs: Array) -> tuple[Array, Array]:
    """Every member's mean and log-variance of z, of `inputs` of `everyone`: (E, B, D+1) twice."""
    # In parts, for all members' hidden layers at once would be most of a fit's memory.
    predicted = jax.lax.map(
        lambda part: predict_all(config, model, *part), inputs, batch_size=SCORED_AT_ONCE
    )
    mean, log_variance = (jnp.swapaxes(x, 0, 1) for x in predicted)
    return mean, log_variance


def _errors(model: ModelState, mean: Array, data: DataSplit) -> Array:
    """The holdout's mean squared error in z by member, of their means (E, B, D+1): (E,)."""
    squares = jnp.square(mean - _truth(model, data.scored))
    return _weighted_mean(squares.mean(-1), data.scored_weights, 1)


def score(config: ModelConfig, model: ModelState, data: DataSplit) -> Array:
    """The holdout's mean squared error in z, by member: (E,)."""
    mean, _ = _predictions(config, model, data.scored.obs, data.scored.action)
    return _errors(model, mean, data)


def length(config: ModelConfig, transitions: Array | int) -> Array | int:
    """A fit's gradient steps when so many real transitions are stored; an early-stopped one's limit.

    All rows have the same, so a loop of so many needs no row's word on when it ends.
    """
    if not config.epochs:
        return config.fit_steps
    passes = jnp.ceil(config.epochs * transitions / config.batch).astype(jnp.int32)
    return jnp.clip(passes, 1, config.fit_steps)


def train_member(
    config: ModelConfig,
    model: ModelState,
    params: Params,
    adam: Any,
    key: Array,
    replay: Replay,
    data: DataSplit,
    steps: Array | int,
    precision: str = "float32",
) -> tuple[Params, Any]:
    """One member's parameters and Adam's state after `steps` gradient steps.

    With `weight_averaging_steps` n > 1 the parameters are their mean over these steps, which from the n-th
    on forgets as an exponential one does (Polyak and Juditsky, 1992): a larger learning rate goes
    farther in a step, and the mean takes its noise away.

    Args:
      model: for its code and the normalisation of inputs.
      key: of the member's own minibatches from the training split.
      precision: of its networks' products (see `nets.products`).
    """
    averaging = config.weight_averaging_steps > 1

    def step(count: Array, carry: tuple[Params, Any, Params | None]) -> Any:
        params, adam, mean = carry
        drawn = jax.random.randint(
            jax.random.fold_in(key, count),
            (config.batch,),
            0,
            jnp.maximum(data.training_size, 1),
        )
        batch = take(replay, data.training[drawn]).data
        with nets.matmul_precision(precision):
            gradient = jax.grad(loss, argnums=2)(config, model, params, batch)
        updates, adam = optimiser(config).update(gradient, adam, params)
        params = optax.apply_updates(params, updates)
        if averaging:
            share = 1 / jnp.minimum(count, config.weight_averaging_steps)
            mean = jax.tree.map(lambda m, p: m + share * (p - m), mean, params)
        return params, adam, mean

    carry = (params, adam, params if averaging else None)
    params, adam, mean = jax.lax.fori_loop(1, steps + 1, step, carry)
    return (mean if averaging else params), adam


def over_members(function: Callable[..., Any], *stacked: Any) -> Any:
    """Maps a function over the members of leaves (E, ...).

    On a CPU one member takes all of its steps before the next one begins, for then its weights and
    moments stay in a core's cache (BUILD_NOTES.md, "Speed"); elsewhere all take each step together.
    """
    if backend.target_is_cpu():
        return jax.lax.map(lambda one: function(*one), stacked)
    return jax.vmap(function)(*stacked)


def train(
    config: ModelConfig,
    model: ModelState,
    replay: Replay,
    data: DataSplit,
    key: Array,
    steps: Array | int,
    precision: str = "float32",
) -> ModelState:
    """`steps` gradient steps of every member, each with a key split from `key`."""

    def one(params: Params, adam: Any, key: Array) -> tuple[Params, Any]:
        return train_member(config, model, params, adam, key, replay, data, steps, precision)

    keys = jax.random.split(key, config.members)
    params, adam = over_members(one, model.params, model.optimiser, keys)
    return model._replace(params=params, optimiser=adam)


class _Search(NamedTuple):
    """What an early-stopped fit carries; never the replay, which a vmapped loop would copy."""

    params: Params
    optimiser: Any
    best: Params  # of each member
    best_score: Array  # (E,)
    stale: Array  # () rounds since any member gained
    steps: Array  # ()
    key: Array


def _train_until_stale(
    config: ModelConfig,
    model: ModelState,
    replay: Replay,
    data: DataSplit,
    key: Array,
    limit: Array | int,
    precision: str,
) -> tuple[ModelState, Array]:
    """Rounds of steps up to a limit, or until `patience` of them pass in which no member's holdout
    score gained `min_gain`; each member's best weights are restored (Janner et al., 2019, appendix).

    The weights that the fit began with are no candidates. If they were, a fit to data of a new
    kind, which first has to unlearn its certainty, could end where it began, and so could every
    later one: the model would never see the new data (BUILD_NOTES.md, "Early stopping").
    """

    def going_on(search: _Search) -> Array:
        return (search.stale < config.patience) & (search.steps < limit)

    def one_round(search: _Search) -> _Search:
        key, round_key = jax.random.split(search.key)
        begun = model._replace(params=search.params, optimiser=search.optimiser)
        trained = train(config, begun, replay, data, round_key, config.round_steps, precision)
        scores = score(config, trained, data)
        gained = scores < (1 - config.min_gain) * search.best_score

        def keep(old: Array, new: Array) -> Array:
            return jnp.where(gained.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return _Search(
            params=trained.params,
            optimiser=trained.optimiser,
            best=jax.tree.map(keep, search.best, trained.params),
            best_score=jnp.where(gained, scores, search.best_score),
            stale=jnp.where(gained.any(), 0, search.stale + 1),
            steps=search.steps + config.round_steps,
            key=key,
        )

    begin = _Search(
        params=model.params,
        optimiser=model.optimiser,
        best=model.params,
        best_score=jnp.full(config.members, jnp.inf),
        stale=jnp.zeros((), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
        key=key,
    )
    end = jax.lax.while_loop(going_on, one_round, begin)
    return model._replace(params=end.best, optimiser=end.optimiser), end.steps


def begin(
    config: ModelConfig,
    variants: Sequence[tuple[str, ...]],
    variant: Array,
    model: ModelState,
    replay: Replay,
    holdout_key: Array,
) -> tuple[ModelState, DataSplit]:
    """The model with the code and the input normalisation of the data, and the data's division.

    A channel that has been constant until now is fitted to for the first time: its k is chosen, and
    its weights are new.

    Args and errors as for `fit`.
    """
    never = model.fits == 0
    seen = analyze_data(config, variants, variant, model, replay, holdout_key)
    # New weights predict nothing that should stay as it is; they are meant for z as they are.
    written = jax.tree.map(lambda new, old: jnp.where(never, new, old), seen.code, model.code)
    key = jax.random.fold_in(holdout_key, model.fits)
    model = rescale_head(model._replace(code=written), seen.code, seen.begins & ~never, key)
    model = model._replace(
        input_mean=seen.input_mean,
        input_std=seen.input_std,
        unit=seen.unit,
        varied=seen.varied,
        fits=model.fits + 1,
    )
    return model, seen.data


class FitInputs(NamedTuple):
    """A fit that was begun: what its members are trained with."""

    model: ModelState
    data: DataSplit
    members: tuple[Params, Any, Array]  # parameters, Adam's state and key of each, leaves (E, ...)


def end(
    config: ModelConfig, model: ModelState, data: DataSplit, steps: Array | int
) -> tuple[ModelState, Metrics]:
    """The trained model with its elites chosen, and the fit's figures by name.

    Args:
      steps: gradient steps that it took.
    """
    mean, log_variance = _predictions(config, model, data.scored.obs, data.scored.action)
    scores = _errors(model, mean, data)
    elites = jnp.argsort(scores)[: config.elites]
    model = model._replace(elites=elites)
    return model, {
        "fit_steps": jnp.asarray(steps),
        "holdout_mse": scores[elites].mean(),
        **_report(model, mean[elites], log_variance[elites], data),
    }


def fit(
    config: ModelConfig,
    variants: Sequence[tuple[str, ...]],
    variant: Array,
    model: ModelState,
    replay: Replay,
    holdout_key: Array,
    key: Array,
    steps: Array | int,
    precision: str = "float32",
) -> tuple[ModelState, Metrics, DataSplit]:
    """Refits code, input normalisation and members, warm-started, and chooses the elites.

    Args:
      variants: the fixes of every variant of the run (static); `variant` () is this row's.
      replay: the real transitions.
      holdout_key: the same at every fit.
      steps: as `length` says.
      precision: of the products in gradient steps; never of scores and statistics.

    Returns:
      The model, figures by name (scalars, and `r2_state_dims` (D,)), and how the data were divided.
    """
    model, data = begin(config, variants, variant, model, replay, holdout_key)
    if config.schedule == "fixed":
        model = train(config, model, replay, data, key, steps, precision)
    else:
        model, steps = _train_until_stale(config, model, replay, data, key, steps, precision)
    return *end(config, model, data, steps), data


def on_holdout(config: ModelConfig, model: ModelState, data: DataSplit) -> trust.Predictions:
    """What the members say of the scored transitions, the truth as the sample."""
    scored = data.scored
    z = _truth(model, scored)
    inputs = scored.obs, scored.action, scored.next_obs
    mean, log_variance = _predictions(config, model, *inputs)
    member = jnp.zeros(z.shape[0], jnp.int32)
    return trust.to_standard_units(model, mean, log_variance, member, z)


def _report(model: ModelState, mean: Array, log_variance: Array, data: DataSplit) -> Metrics:
    """How good the elites' mean prediction is on the holdout, where they predict (K, B, D+1) twice."""
    held, weights = data.scored, data.scored_weights
    z = _truth(model, held)
    likelihood = jnp.exp(-log_variance) * jnp.square(mean - z) + log_variance
    next_obs, reward = targets.decode(model.code, held.obs, mean.mean(0))
    # Where a truth lies in the mixture of the elites, which is what rollouts draw from.
    rank = jax.scipy.special.ndtr((z - mean) * jnp.exp(-0.5 * log_variance)).mean(0)
    inside = (jnp.abs(rank - 0.5) <= 0.4).astype(jnp.float32)
    noise = jnp.exp(log_variance).mean(0)

    def share(error: Array, values: Array) -> Array:
        variance = _weighted_mean(jnp.square(values - _weighted_mean(values, weights)), weights)
        mse = _weighted_mean(jnp.square(error), weights)
        return jnp.where(variance > targets.CONSTANT**2, 1 - mse / variance, jnp.nan)

    channels = share(next_obs - held.next_obs, held.next_obs - held.obs)
    z_variance = _weighted_mean(jnp.square(z - _weighted_mean(z, weights)), weights)
    return {
        "nll": _weighted_mean(likelihood.mean((0, 2)), weights),
        "r2_state": jnp.nanmedian(channels),
        "r2_state_dims": channels,
        "r2_reward": share(reward - held.reward, held.reward),
        "target_variance_ratio": z_variance[:-1].sum() / z_variance[-1],
        "epistemic_std": jnp.sqrt(_weighted_mean(mean.var(0).mean(-1), weights)),
        "aleatoric_std": jnp.sqrt(_weighted_mean(noise.mean(-1), weights)),
        "coverage_80": _weighted_mean(inside.mean(-1), weights),
        "model_reward_mean": _weighted_mean(reward, weights),
        "real_reward_mean": _weighted_mean(held.reward, weights),
    }
