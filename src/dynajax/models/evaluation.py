"""How good a fitted ensemble is on its holdout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynajax.models import targets
from dynajax.models.base import DynamicsModel, Gaussian
from dynajax.models.ensemble import predict_all
from dynajax.models.fit_data import DataSplit
from dynajax.trust import Predictions, to_standard_units
from dynajax.types import Metrics, ModelState, Transition

#: Holdout transitions that all members predict at once.
CHUNK = 500


def weighted_mean(values: Float[Array, "*X"], weights: Float[Array, " B"], axis: int = 0) -> Array:
    """Return the mean over an axis of length B, weighted."""
    shape = [1] * values.ndim
    shape[axis] = weights.shape[0]
    return (values * weights.reshape(shape)).sum(axis) / jnp.maximum(weights.sum(), 1.0)


def _targets(state: ModelState, data: Transition) -> Float[Array, "B Z"]:
    """Return the true z of transitions, leaves (B, ...)."""
    return targets.encode(state.stats.transform, data.obs, data.reward, data.next_obs)


def _predict(dynamics: DynamicsModel, state: ModelState, *inputs: Array) -> Gaussian:
    """Return the predictions of every member, leaves (E, B, Z); `inputs` as of `predict_all`."""
    # In chunks, because all members' hidden layers at once would be most of a fit's memory.
    predicted = jax.lax.map(
        lambda part: predict_all(dynamics, state, *part), inputs, batch_size=CHUNK
    )
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), predicted)


def _errors(state: ModelState, mean: Float[Array, "E B Z"], data: DataSplit) -> Float[Array, " E"]:
    """Return each member's mean squared error in z on the holdout."""
    squares = jnp.square(mean - _targets(state, data.holdout))
    return weighted_mean(squares.mean(-1), data.holdout_mask, 1)


def holdout_errors(
    dynamics: DynamicsModel, state: ModelState, data: DataSplit
) -> Float[Array, " E"]:
    """Return each member's mean squared error in z on the holdout."""
    mean, _ = _predict(dynamics, state, data.holdout.obs, data.holdout.action)
    return _errors(state, mean, data)


def choose_elites(
    dynamics: DynamicsModel, state: ModelState, data: DataSplit
) -> tuple[ModelState, Metrics]:
    """Return the model with the members of lowest holdout error as elites, and metrics."""
    prediction = _predict(dynamics, state, data.holdout.obs, data.holdout.action)
    errors = _errors(state, prediction.mean, data)
    elites = jnp.argsort(errors)[: dynamics.config.elites]
    state = state._replace(elites=elites)
    metrics = {"holdout_mse": errors[elites].mean()}
    of_elites = jax.tree.map(lambda x: x[elites], prediction)
    return state, metrics | _report(state, of_elites, data)


def holdout_predictions(
    dynamics: DynamicsModel, state: ModelState, data: DataSplit, *, given_next_obs: bool = True
) -> Predictions:
    """Return the members' predictions of the holdout in standard units, the truth as the sample.

    Args:
      given_next_obs: a reward that depends on the next state is predicted from the true one, instead
        of from the one that the member predicts.
    """
    holdout = data.holdout
    z = _targets(state, holdout)
    inputs = [holdout.obs, holdout.action]
    if given_next_obs:
        inputs.append(holdout.next_obs)
    mean, log_variance = _predict(dynamics, state, *inputs)
    member = jnp.zeros(z.shape[0], jnp.int32)
    return to_standard_units(state.stats, mean, log_variance, member, z)


def _report(state: ModelState, prediction: Gaussian, data: DataSplit) -> Metrics:
    """Return how good the elites' predictions, leaves (K, B, Z), are on the holdout.

    Metrics of predicted variances are missing if the model predicts none.
    """
    held, weights = data.holdout, data.holdout_mask
    mean, log_variance = prediction
    z = _targets(state, held)
    terms = None if log_variance is None else _likelihood_terms(mean, log_variance, z)
    next_obs, reward = targets.decode(state.stats.transform, held.obs, mean.mean(0))
    calibration = None if log_variance is None else _calibration(mean, log_variance, z)

    def r2(error: Array, values: Array, varies: Array) -> Array:
        variance = weighted_mean(jnp.square(values - weighted_mean(values, weights)), weights)
        mse = weighted_mean(jnp.square(error), weights)
        return jnp.where(varies, 1 - mse / variance, jnp.nan)

    change = held.next_obs - held.obs
    dims = r2(next_obs - held.next_obs, change, targets.varies(change, weights, held.next_obs))
    (reward_varies,) = targets.varies(held.reward[:, None], weights)
    z_variance = weighted_mean(jnp.square(z - weighted_mean(z, weights)), weights)
    metrics: Metrics = {}
    if terms is not None:
        metrics["nll"] = weighted_mean(terms.mean((0, 2)), weights)
    metrics |= {
        "r2_state": jnp.nanmedian(dims),
        "r2_state_dims": dims,
        "r2_reward": r2(reward - held.reward, held.reward, reward_varies),
        "target_variance_ratio": z_variance[:-1].sum() / z_variance[-1],
        "epistemic_std": jnp.sqrt(weighted_mean(mean.var(0).mean(-1), weights)),
    }
    if calibration is not None:
        inside, noise = calibration
        metrics["aleatoric_std"] = jnp.sqrt(weighted_mean(noise.mean(-1), weights))
        metrics["coverage_80"] = weighted_mean(inside.mean(-1), weights)
    return metrics | {
        "model_reward_mean": weighted_mean(reward, weights),
        "real_reward_mean": weighted_mean(held.reward, weights),
    }


def _likelihood_terms(
    mean: Float[Array, "K B Z"], log_variance: Float[Array, "K B Z"], z: Float[Array, "B Z"]
) -> Float[Array, "K B Z"]:
    """Return the terms of the Gaussian negative log-likelihood, up to constants."""
    return jnp.exp(-log_variance) * jnp.square(mean - z) + log_variance


def _calibration(
    mean: Float[Array, "K B Z"], log_variance: Float[Array, "K B Z"], z: Float[Array, "B Z"]
) -> tuple[Float[Array, "B Z"], Float[Array, "B Z"]]:
    """Return whether the truth is in the central 80 % of the prediction, and the mean variance.

    The prediction is the mixture of the elites, which rollouts sample from.
    """
    rank = jax.scipy.special.ndtr((z - mean) * jnp.exp(-0.5 * log_variance)).mean(0)
    inside = (jnp.abs(rank - 0.5) <= 0.4).astype(jnp.float32)
    return inside, jnp.exp(log_variance).mean(0)
