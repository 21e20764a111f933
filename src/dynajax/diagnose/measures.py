"""Numbers that say how good a model is: pure functions of what was predicted and what was true.

Everything is in the task's own units. `mean` and `variance` are of E members, (E, B, X); an
ensemble is the even mixture of its members' Gaussians, which is what rollouts sample from.
"""

import numpy as np
import scipy

from dynajax.models.targets import CONSTANT

Named = dict[str, np.ndarray]
#: Of the truths, this share should lie inside the predicted central interval of the same share.
COVERAGES = (0.5, 0.8, 0.95)
#: The few steps that are looked at for jumps.
_TOP = 0.01


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is a constant's."""
    whole = np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > CONSTANT**2)


def r2(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """1 - MSE / Var(true), over the first axis; NaN for a constant."""
    predicted, true = np.asarray(predicted, float), np.asarray(true, float)
    return 1 - _ratio(np.square(predicted - true).mean(0), true.var(0))


def skill(predicted: np.ndarray, obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
    """1 - MSE / Var(s' - s) by channel, (B, D) thrice -> (D,): 0 is no better than to say that
    every step changes the state by its mean change; NaN where nothing changes."""
    obs, next_obs = np.asarray(obs, float), np.asarray(next_obs, float)
    error = np.square(np.asarray(predicted, float) - next_obs).mean(0)
    return 1 - _ratio(error, (next_obs - obs).var(0))


def worst(values: np.ndarray, count: int = 5) -> np.ndarray:
    """Mean of the lowest `count` numbers of the last axis, NaNs aside."""
    ordered = np.sort(values, -1)[..., :count]  # NaN sorts last
    finite = np.isfinite(ordered)
    return np.where(finite, ordered, 0).sum(-1) / np.maximum(finite.sum(-1), 1)


def median(values: np.ndarray) -> np.ndarray:
    """Median over the last axis, NaNs aside; NaN if there is nothing else."""
    some = np.isfinite(values).any(-1)
    return np.where(some, np.nanmedian(np.where(some[..., None], values, 0.0), -1), np.nan)


def coverage(mean: np.ndarray, variance: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Share of the truths (B, X) inside the mixture's central intervals: (3, X), `COVERAGES`."""
    std = np.sqrt(np.maximum(np.asarray(variance, float), 1e-300))
    rank = scipy.special.ndtr((np.asarray(true, float) - mean) / std).mean(0)
    return np.array([(np.abs(rank - 0.5) <= c / 2).mean(0) for c in COVERAGES])


def scores(mean: np.ndarray, variance: np.ndarray, obs: np.ndarray, true: np.ndarray) -> Named:
    """How well the members predict transitions one step ahead.

    Args:
      mean, variance: (E, B, D+1), next state, then reward.
      obs: (B, D); true: (B, D+1), next state, then reward.

    Returns:
      "reward_r2"; "reward_bias" (mean predicted less mean true) and "reward_noise" (the predicted
      standard deviation), in standard deviations of the reward; by channel (D,) "skill", "rmse",
      "noise" and "spread" (within and between members, standard deviations, in the channel's
      units), all of the ensemble's mean; "inside" and "reward_inside" (3,), see `coverage`.
    """
    true = np.asarray(true, float)
    middle = np.asarray(mean, float).mean(0)
    noise = np.sqrt(np.asarray(variance, float).mean((0, 1)))
    spread = np.sqrt(np.asarray(mean, float).var(0).mean(0))
    reward_std = true[:, -1].std()
    moving = (true[:, :-1] - obs).std(0) > CONSTANT
    inside = coverage(mean, variance, true)
    return {
        "reward_r2": r2(middle[:, -1], true[:, -1]),
        "reward_bias": shift(middle[:, -1], true[:, -1], reward_std),
        "reward_noise": _ratio_of_std(noise[-1], reward_std),
        "skill": skill(middle[:, :-1], obs, true[:, :-1]),
        "rmse": np.sqrt(np.square(middle - true).mean(0))[:-1],
        "noise": noise[:-1],
        "spread": spread[:-1],
        "inside": inside[:, :-1][:, moving].mean(1) if moving.any() else np.full(3, np.nan),
        "reward_inside": inside[:, -1] if reward_std > CONSTANT else np.full(3, np.nan),
    }


def shift(predicted: np.ndarray, true: np.ndarray, std: float) -> np.ndarray:
    """Mean of the predicted less mean of the true (B,), in standard deviations; NaN for none."""
    return _ratio_of_std(predicted.mean() - true.mean(), std)


def _ratio_of_std(part: float, std: float) -> np.ndarray:
    return np.asarray(part / std if std > CONSTANT else np.nan)


def open_loop(
    predicted: np.ndarray, start: np.ndarray, true: np.ndarray, there: np.ndarray
) -> Named:
    """How well a chain of predictions holds over H steps.

    Args:
      predicted: (H, E, B, D+1), see `fits.open_loop`.
      start: (B, D); true: (H, B, D+1), next state, then reward.
      there: (H, B) bool: the episode has lasted so far.

    Returns:
      "open_skill" (H, D): 1 - MSE / Var(s_h - s_0); "open_reward_r2" (H,): of the sum of the
      rewards up to there; "open_spread" (H,): median over channels of the members' standard
      deviation over the standard deviation of s_h - s_0.
    """
    steps, _, _, outputs = predicted.shape
    holds = {
        "open_skill": np.full((steps, outputs - 1), np.nan),
        "open_reward_r2": np.full(steps, np.nan),
        "open_spread": np.full(steps, np.nan),
    }
    # A chain that leaves float32 has no skill, and should not spoil a mean with NaN.
    predicted = np.nan_to_num(predicted.astype(float), nan=1e30, posinf=1e30, neginf=-1e30)
    middle = predicted.mean(1)
    totals, true_totals = middle[..., -1].cumsum(0), true[..., -1].astype(float).cumsum(0)
    for h in range(steps):
        rows = there[h]
        if rows.sum() < 2:
            break
        begin, end = start[rows].astype(float), true[h, rows, :-1]
        holds["open_skill"][h] = skill(middle[h, rows, :-1], begin, end)
        holds["open_reward_r2"][h] = r2(totals[h, rows], true_totals[h, rows])
        between = predicted[h][:, rows, :-1].var(0).mean(0)
        holds["open_spread"][h] = median(np.sqrt(_ratio(between, (end - begin).var(0))))
    return holds


def windows(episode: np.ndarray, steps: int, most: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Starts of stretches of a recording, evenly spaced, and how long their episode lasts.

    Args:
      episode: (N,) rising.

    Returns:
      starts (B,), at most `most`; there (H, B) bool: start + h is of the same episode.
    """
    starts = np.unique(np.linspace(0, len(episode) - 1, most).astype(int))
    index = np.arange(steps)[:, None] + starts
    there = index < len(episode)
    there[there] = (episode[np.minimum(index, len(episode) - 1)] == episode[starts])[there]
    return starts, there


def scales(obs: np.ndarray, next_obs: np.ndarray, reward: np.ndarray) -> Named:
    """The sizes of what a model can be asked to predict.

    Returns:
      By channel (D,): "var_delta" Var(s' - s), "var_next" Var(s'), "top_share" (of the squared
      change, the share of the largest hundredth of the steps), "typical" (median over root mean
      square of the change). Scalars: "mean_reward", "var_reward", "reward_top_share",
      "ratio_delta" and "ratio_next" (the sum of the channels' variances over the reward's).
    """
    obs, next_obs, reward = (np.asarray(x, float) for x in (obs, next_obs, reward))
    delta = next_obs - obs
    var_delta, var_next, var_reward = delta.var(0), next_obs.var(0), reward.var(0)
    return {
        "var_delta": var_delta,
        "var_next": var_next,
        "top_share": top_share(delta - delta.mean(0)),
        "typical": _ratio(np.square(np.median(np.abs(delta), 0)), np.square(delta).mean(0)) ** 0.5,
        "mean_reward": reward.mean(),
        "var_reward": var_reward,
        "reward_top_share": top_share((reward - np.median(reward))[:, None])[0],
        "ratio_delta": _ratio(var_delta.sum(), var_reward),
        "ratio_next": _ratio(var_next.sum(), var_reward),
    }


def top_share(values: np.ndarray) -> np.ndarray:
    """What the largest hundredth contributes to the sum of squares: (N, X) -> (X,). A Gaussian
    has 0.08, a Laplacian 0.16, a rare spike nearly 1."""
    squares = np.sort(np.square(values), 0)
    count = max(1, round(_TOP * len(values)))
    return _ratio(squares[-count:].sum(0), squares.sum(0))
