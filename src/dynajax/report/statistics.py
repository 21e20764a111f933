"""Aggregates over seeds and tasks, with intervals that say how far to trust them.

Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

Values = np.ndarray | Sequence[float]
#: (..., X), axis -> (...): a statistic such as `iqm`, `numpy.mean` or `numpy.median`.
Statistic = Callable[..., Any]


class ConfidenceInterval(NamedTuple):
    """An estimate and its 95 % interval, in the units of the values; NaN where there is none."""

    point: Any
    low: Any
    high: Any


def iqm(values: Values, axis: int | None = None) -> Any:
    """Interquartile mean: the mean of what is left when a quarter is cut off at either end.

    Of n values, floor(n / 4) are cut at each end (Agarwal et al., 2021, section 4.2), so three or
    fewer are averaged as they are.

    Args:
      values: any shape; with `axis` None all of them count, as the paper does for (tasks, seeds).
      axis: the axis to reduce.

    Returns:
      A scalar, or `values` less the axis.

    Raises:
      ValueError: there are no values.
    """
    if np.size(values) == 0:
        raise ValueError("the IQM of no values is not defined")
    return scipy.stats.trim_mean(np.asarray(values, float), 0.25, axis=axis)


def stratified_bootstrap(
    scores: np.ndarray | Sequence[Values],
    statistic: Statistic = iqm,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ConfidenceInterval:
    """A statistic over tasks and seeds with its percentile bootstrap interval.

    Seeds are drawn with replacement within each task, never across tasks, and the statistic is
    taken over all that was drawn (Agarwal et al., 2021, section 4.1).

    Args:
      scores: (tasks, seeds), or one array (seeds,) for each task; scores of different tasks must
        be in the same unit, for example normalised.
      statistic: reduces the axis that it is given.
      resamples: how many bootstrap draws; confidence: the interval's share of them.
      seed: of the draws, so that the same scores always give the same interval.

    Returns:
      Scalars. No interval (NaN) if a task has one seed only: it would look more certain than it is.

    Raises:
      ValueError: no task, or a task without a score.
    """
    tasks = [np.asarray(task, float).ravel() for task in scores]
    if not tasks or not all(task.size for task in tasks):
        raise ValueError("every task needs at least one score")
    point = float(statistic(np.concatenate(tasks), axis=-1))
    if min(task.size for task in tasks) == 1:
        return ConfidenceInterval(point, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    draws = [task[rng.integers(task.size, size=(resamples, task.size))] for task in tasks]
    estimates = statistic(np.concatenate(draws, axis=-1), axis=-1)
    return _percentiles(point, estimates, confidence)


def _percentiles(point: float, draws: np.ndarray, confidence: float) -> ConfidenceInterval:
    """A point with the percentile bootstrap's interval from draws (R,)."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return ConfidenceInterval(point, float(low), float(high))


def interval(values: Values, axis: int = 0, confidence: float = 0.95) -> ConfidenceInterval:
    """Mean over seeds with Student's t interval, for learning curves and tables.

    The t interval is used and not the bootstrap, which is far too narrow for a handful of seeds.
    Values that are not finite are left out. One value has a mean but no interval (NaN); none has
    neither.

    Args:
      values: any shape, with the seeds on `axis`.

    Returns:
      Arrays of the shape of `values` less the axis.
    """
    data = np.asarray(values, float)
    finite = np.isfinite(data)
    count = finite.sum(axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(finite, data, 0.0).sum(axis) / count
        deviation = np.where(finite, data - np.expand_dims(mean, axis), 0.0)
        error = np.sqrt(np.square(deviation).sum(axis) / (count - 1) / count)
        reach = scipy.stats.t.ppf(0.5 + confidence / 2, np.maximum(count - 1, 1)) * error
    reach = np.where(count > 1, reach, np.nan)
    return ConfidenceInterval(mean, mean - reach, mean + reach)


def probability_of_improvement(
    better: Sequence[Values],
    than: Sequence[Values],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ConfidenceInterval:
    """How probable it is that a seed of one method beats a seed of another, on a task at random.

    On task m, with N scores x and K scores y, P = sum_ij S(x_i, y_j) / (N K), S being 1 where
    x > y, 1/2 where they are equal, else 0; the estimate is the mean of P over the tasks (Agarwal
    et al., 2021, section 4.3). The percentile bootstrap draws seeds of both within each task.

    Args:
      better, than: one array (seeds,) for each task, tasks in the same order; any numbers of seeds.
      resamples, confidence, seed: see `stratified_bootstrap`.

    Returns:
      Scalars. No interval (NaN) if either has one seed only on a task.

    Raises:
      ValueError: no task, different tasks, or a task without a score.
    """
    xs, ys = ([np.asarray(v, float).ravel() for v in scores] for scores in (better, than))
    if not xs or len(xs) != len(ys) or not all(v.size for v in (*xs, *ys)):
        raise ValueError("both need at least one score on each of the same tasks")
    rng = np.random.default_rng(seed)
    points, draws = [], []
    for x, y in zip(xs, ys, strict=True):
        beats = np.heaviside(x[:, None] - y, 0.5)  # (N, K)
        points.append(beats.mean())
        i, j = (rng.integers(v.size, size=(resamples, v.size)) for v in (x, y))
        draws.append(beats[i[:, :, None], j[:, None, :]].mean((1, 2)))
    point = float(np.mean(points))
    if min(v.size for v in (*xs, *ys)) == 1:
        return ConfidenceInterval(point, np.nan, np.nan)
    return _percentiles(point, np.mean(draws, 0), confidence)


def frames_to_reach(frames: np.ndarray, means: np.ndarray, level: Values) -> np.ndarray:
    """When learning curves first come to a level, by straight lines between their evaluations.

    Args:
      frames: (T,) of the evaluations, rising.
      means: (..., T) returns.
      level: (...) of each curve.

    Returns:
      (...) frames; the first evaluation's where that is as high already, infinite where none is.
    """
    level = np.asarray(level, float)[..., None]
    reached = means >= level
    at = reached.argmax(-1)[..., None]
    before = np.maximum(at - 1, 0)
    low, high = (np.take_along_axis(means, i, -1) for i in (before, at))
    share = np.where(high > low, (level - low) / np.where(high > low, high - low, 1.0), 1.0)
    share = np.where(at == 0, 1.0, share)
    there = frames[before] + share * (frames[at] - frames[before])
    return np.where(reached.any(-1), there[..., 0], np.inf)


def sample_efficiency(
    frames: np.ndarray,
    returns: np.ndarray,
    base_frames: np.ndarray,
    base_returns: np.ndarray,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ConfidenceInterval:
    """How many times fewer frames a method needs for what its base has learned in the end.

    The frames in which the base's mean over seeds first comes to its last value, over those in
    which the method's mean comes to the same: 2 is half the frames, 0 that it never does. Both
    curves should end at the same number of frames. The percentile bootstrap draws seeds of both.

    Args:
      frames, base_frames: (T,), (P,) of the evaluations.
      returns, base_returns: (seeds, T), (seeds, P), all finite.
      resamples, confidence, seed: see `stratified_bootstrap`.

    Returns:
      Scalars. No interval (NaN) if either has one seed only.
    """

    def ratio(means: np.ndarray, base_means: np.ndarray) -> np.ndarray:
        level = base_means[..., -1]
        base = frames_to_reach(base_frames, base_means, level)
        return base / frames_to_reach(frames, means, level)

    point = float(ratio(returns.mean(0), base_returns.mean(0)))
    if min(len(returns), len(base_returns)) == 1:
        return ConfidenceInterval(point, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    draws = [
        x[rng.integers(len(x), size=(resamples, len(x)))].mean(1) for x in (returns, base_returns)
    ]
    return _percentiles(point, ratio(*draws), confidence)


def difference(a: Values, b: Values, confidence: float = 0.95) -> ConfidenceInterval:
    """Mean of `b` less mean of `a`, with Welch's interval for unequal variances.

    Args:
      a, b: (seeds,) each; values that are not finite are left out.

    Returns:
      Scalars. No interval (NaN) if either has fewer than two values.
    """
    a, b = (np.asarray(v, float)[np.isfinite(v)] for v in (a, b))
    if not a.size or not b.size:
        return ConfidenceInterval(np.nan, np.nan, np.nan)
    point = float(b.mean() - a.mean())
    if min(a.size, b.size) < 2:
        return ConfidenceInterval(point, np.nan, np.nan)
    if np.ptp(a) == np.ptp(b) == 0:
        return ConfidenceInterval(point, point, point)
    bounds = scipy.stats.ttest_ind(b, a, equal_var=False).confidence_interval(confidence)
    return ConfidenceInterval(point, float(bounds.low), float(bounds.high))


def number(value: float) -> str:
    """Two digits after the point, or three in all, or a power of ten."""
    if not np.isfinite(value):
        return "not defined"
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    text = f"{value:.2f}" if size < 10 else f"{value:,.0f}"
    return text.replace("-0.00", "0.00")


def text(estimate: ConfidenceInterval) -> str:
    """A scalar with its interval, as pages have it: "0.24 (0.10 to 0.38)"."""
    point, low, high = map(float, estimate)
    return number(point) + (f" ({number(low)} to {number(high)})" if np.isfinite(low) else "")


def over_seeds(values: Values) -> str:
    """The mean of (seeds,) values with its t interval, as `text`."""
    return text(interval(values))
