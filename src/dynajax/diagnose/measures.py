"""Measure how good a model is: pure functions of predictions and true values.

Everything is in the units of the task. `mean` and `variance` are those of E members, (E, B, X); the
ensemble is the uniform mixture of its members' Gaussians, from which rollouts sample.
"""

import numpy as np
import scipy

from dynajax.networks.normalization import RESOLUTION, SMALLEST_STD

#: Measures by name.
Measures = dict[str, np.ndarray]
#: Probabilities of the central predictive intervals whose coverage is measured.
COVERAGES = (0.5, 0.8, 0.95)
#: The share of the steps with the largest changes, see `top_share`.
_TOP = 0.01


def _rounding(values: np.ndarray) -> np.ndarray:
    """Return the standard deviations (X) that float32 rounding can give to values (N, X)."""
    rms = np.sqrt(np.square(np.asarray(values, float)).mean(0))
    return np.maximum(RESOLUTION * rms, SMALLEST_STD)


def varies(values: np.ndarray, parts: np.ndarray | None = None) -> np.ndarray:
    """Return which dimensions (X) of values (N, X) vary by more than float32 rounding.

    Args:
      parts: (N, X), the values that `values` are differences of; by default `values` themselves.
    """
    return np.asarray(values, float).std(0) > _rounding(values if parts is None else parts)


def _ratio(part: np.ndarray, whole: np.ndarray, defined: np.ndarray | bool = True) -> np.ndarray:
    """Return part / whole, NaN where it is not defined or `whole` is 0."""
    whole = np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=defined & (whole > 0))


def r2(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return R² = 1 - MSE / Var(true) over the first axis; NaN for a constant."""
    predicted, true = np.asarray(predicted, float), np.asarray(true, float)
    return 1 - _ratio(np.square(predicted - true).mean(0), true.var(0), varies(true))


def state_r2(predicted: np.ndarray, obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
    """Return R² of the state's change, 1 - MSE / Var(s' - s), by dimension: (B, D) thrice -> (D,).

    0 is no better than predicting the mean change; NaN where nothing changes.
    """
    obs, next_obs = np.asarray(obs, float), np.asarray(next_obs, float)
    error = np.square(np.asarray(predicted, float) - next_obs).mean(0)
    change = next_obs - obs
    return 1 - _ratio(error, change.var(0), varies(change, next_obs))


def mean_of_lowest(values: np.ndarray, count: int = 5) -> np.ndarray:
    """Return the mean of the lowest `count` values of the last axis without NaN, see `median`."""
    ordered = np.sort(values, -1)[..., :count]  # NaN sorts last
    finite = np.isfinite(ordered)
    mean = np.where(finite, ordered, 0).sum(-1) / np.maximum(finite.sum(-1), 1)
    return np.where(finite.any(-1), mean, np.nan)


def median(values: np.ndarray) -> np.ndarray:
    """Return the median over the last axis without NaN; NaN if there is nothing else."""
    some = np.isfinite(values).any(-1)
    return np.where(some, np.nanmedian(np.where(some[..., None], values, 0.0), -1), np.nan)


def coverage(mean: np.ndarray, variance: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return the share of true values (B, X) inside the central intervals `COVERAGES`: (3, X)."""
    std = np.sqrt(np.maximum(np.asarray(variance, float), 1e-300))
    rank = scipy.special.ndtr((np.asarray(true, float) - mean) / std).mean(0)
    return np.array([(np.abs(rank - 0.5) <= c / 2).mean(0) for c in COVERAGES])


def one_step(mean: np.ndarray, variance: np.ndarray, obs: np.ndarray, true: np.ndarray) -> Measures:
    """Measure one-step predictions.

    Args:
      mean, variance: (E, B, D+1), next state, then reward.
      obs: (B, D).
      true: (B, D+1), next state, then reward.

    Returns:
      In standard deviations of the reward: "reward_bias" (mean predicted minus mean true) and
      "reward_aleatoric_std"; "reward_r2". By dimension (D,): "state_r2", "rmse", "aleatoric_std"
      and "epistemic_std" (within and between members, in the units of the dimension). All are
      measures of the ensemble's mean. "coverage" and "reward_coverage" (3,), see `coverage`.
    """
    true = np.asarray(true, float)
    middle = np.asarray(mean, float).mean(0)
    aleatoric_std = np.sqrt(np.asarray(variance, float).mean((0, 1)))
    epistemic_std = np.sqrt(np.asarray(mean, float).var(0).mean(0))
    reward_std, reward_varies = true[:, -1].std(), varies(true[:, -1])
    moving = varies(true[:, :-1] - obs, true[:, :-1])
    inside = coverage(mean, variance, true)
    return {
        "reward_r2": r2(middle[:, -1], true[:, -1]),
        "reward_bias": bias(middle[:, -1], true[:, -1], reward_std),
        "reward_aleatoric_std": _ratio(aleatoric_std[-1], reward_std, reward_varies),
        "state_r2": state_r2(middle[:, :-1], obs, true[:, :-1]),
        "rmse": np.sqrt(np.square(middle - true).mean(0))[:-1],
        "aleatoric_std": aleatoric_std[:-1],
        "epistemic_std": epistemic_std[:-1],
        "coverage": inside[:, :-1][:, moving].mean(1) if moving.any() else np.full(3, np.nan),
        "reward_coverage": inside[:, -1] if reward_varies else np.full(3, np.nan),
    }


def bias(predicted: np.ndarray, true: np.ndarray, std: float) -> np.ndarray:
    """Return the mean of `predicted` minus that of `true` (B,), in standard deviations.

    It is NaN if `true` is constant.
    """
    return _ratio(predicted.mean() - true.mean(), np.asarray(std), varies(true))


def open_loop(
    predicted: np.ndarray, start: np.ndarray, true: np.ndarray, valid: np.ndarray
) -> Measures:
    """Measure predictions over H steps that continue from themselves.

    Args:
      predicted: (H, E, B, D+1), see `fits.open_loop`.
      start: (B, D).
      true: (H, B, D+1), next state, then reward.
      valid: (H, B) bool: the episode has not ended before.

    Returns:
      "state_r2" (H, D): 1 - MSE / Var(s_h - s_0); "reward_r2" (H,): of the sum of the rewards up
      to step h; "epistemic_std" (H,): median over dimensions of the members' standard deviation
      over the standard deviation of s_h - s_0.
    """
    steps, _, _, outputs = predicted.shape
    measured = {
        "state_r2": np.full((steps, outputs - 1), np.nan),
        "reward_r2": np.full(steps, np.nan),
        "epistemic_std": np.full(steps, np.nan),
    }
    # Predictions may overflow float32: they count as very wrong, and not as NaN.
    predicted = np.nan_to_num(predicted.astype(float), nan=1e30, posinf=1e30, neginf=-1e30)
    middle = predicted.mean(1)
    totals, true_totals = middle[..., -1].cumsum(0), true[..., -1].astype(float).cumsum(0)
    for h in range(steps):
        at = valid[h]
        if at.sum() < 2:
            break
        begin, end = start[at].astype(float), true[h, at, :-1]
        measured["state_r2"][h] = state_r2(middle[h, at, :-1], begin, end)
        measured["reward_r2"][h] = r2(totals[h, at], true_totals[h, at])
        between = predicted[h][:, at, :-1].var(0).mean(0)
        ratio = _ratio(between, (end - begin).var(0), varies(end - begin, end))
        measured["epistemic_std"][h] = median(np.sqrt(ratio))
    return measured


def windows(episode: np.ndarray, steps: int, most: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Return evenly spaced starts of sequences in a recording, and which steps stay in the episode.

    Args:
      episode: (N,) rising.

    Returns:
      starts (B,), at most `most`; valid (H, B) bool: start + h is in the same episode.
    """
    starts = np.unique(np.linspace(0, len(episode) - 1, most).astype(int))
    index = np.arange(steps)[:, None] + starts
    valid = index < len(episode)
    valid[valid] = (episode[np.minimum(index, len(episode) - 1)] == episode[starts])[valid]
    return starts, valid


def target_statistics(obs: np.ndarray, next_obs: np.ndarray, reward: np.ndarray) -> Measures:
    """Return statistics of the targets that a model can have.

    Returns:
      By dimension (D,): "var_delta" Var(s' - s), "var_next" Var(s'), 0 if they are no more than
      rounding, as is "var_reward"; "top_share" (see `top_share`,
      of the change), "typical" (median over root mean square of the change). Scalars:
      "mean_reward", "var_reward", "reward_top_share", "ratio_delta" and "ratio_next" (the sum of
      the variances of all dimensions over the variance of the reward).
    """
    obs, next_obs, reward = (np.asarray(x, float) for x in (obs, next_obs, reward))
    delta = next_obs - obs
    moving, reward_varies = varies(delta, next_obs), varies(reward)
    var_delta = np.where(moving, delta.var(0), 0.0)
    var_next = np.where(varies(next_obs), next_obs.var(0), 0.0)
    var_reward = np.where(reward_varies, reward.var(0), 0.0)
    size = np.square(delta).mean(0)
    typical = _ratio(np.square(np.median(np.abs(delta), 0)), size, size > _rounding(next_obs) ** 2)
    return {
        "var_delta": var_delta,
        "var_next": var_next,
        "top_share": top_share(np.where(moving, delta - delta.mean(0), 0.0)),
        "typical": typical**0.5,
        "mean_reward": reward.mean(),
        "var_reward": var_reward,
        "reward_top_share": top_share((reward_varies * (reward - np.median(reward)))[:, None])[0],
        "ratio_delta": _ratio(var_delta.sum(), var_reward),
        "ratio_next": _ratio(var_next.sum(), var_reward),
    }


def top_share(values: np.ndarray) -> np.ndarray:
    """Return the share of the largest hundredth in the sum of squares: (N, X) -> (X,).

    It is 0.08 for a Gaussian, 0.16 for a Laplacian, and nearly 1 for rare spikes.
    """
    squares = np.sort(np.square(values), 0)
    count = max(1, round(_TOP * len(values)))
    return _ratio(squares[-count:].sum(0), squares.sum(0))
