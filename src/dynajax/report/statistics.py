"""Aggregate over seeds and tasks, with confidence intervals.

Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

Values = np.ndarray | Sequence[float]
#: (..., X), axis -> (...): a statistic such as `iqm`, `numpy.mean` or `numpy.median`.
Statistic = Callable[..., Any]
#: Of all intervals.
_LEVEL = 0.95

#: The lowest and the highest value that a quantity can have.
Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-np.inf, np.inf)
#: Of R², a share of the variance.
R2: Bounds = (-np.inf, 1.0)
#: Of a standard deviation.
POSITIVE: Bounds = (0.0, np.inf)
#: Of a share or a probability.
SHARE: Bounds = (0.0, 1.0)


class ConfidenceInterval(NamedTuple):
    """An estimate and its 95 % interval, in the units of the values; NaN where there is none."""

    point: Any  # a scalar or an array, and so are the bounds
    low: Any
    high: Any


def iqm(values: Values, axis: int | None = None) -> Any:
    """Return the interquartile mean: the mean without the lowest and the highest quarter.

    Of n values, floor(n / 4) are cut at each end (Agarwal et al., 2021, section 4.3), so three or
    fewer are all averaged.

    Args:
      values: any shape; with `axis` None all of them count, as the paper does for (tasks, seeds).
      axis: the axis to reduce.

    Returns:
      A scalar, or the shape of `values` without the axis.

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
    seed: int = 0,
) -> ConfidenceInterval:
    """Return a statistic over tasks and seeds with its percentile bootstrap interval.

    Seeds are resampled within each task, never across tasks, and the statistic is taken over the
    resampled scores of all tasks (Agarwal et al., 2021, section 4.1). All tasks count equally: scores of
    tasks with fewer seeds are repeated, approximately so if their numbers have a large common multiple.

    Args:
      scores: (tasks, seeds), or one array (seeds,) for each task; scores of different tasks must
        have the same unit, for example be normalised.
      statistic: takes values and an axis to reduce.
      resamples: number of bootstrap resamples.
      seed: of the resamples, so that the same scores always give the same interval.

    Returns:
      Scalars. The bounds are NaN if a task has only one seed, whose spread is unknown.

    Raises:
      ValueError: there is no task, or a task has no score.
    """
    tasks = [np.asarray(task, float).ravel() for task in scores]
    if not tasks or not all(task.size for task in tasks):
        raise ValueError("every task needs at least one score")
    sizes = [task.size for task in tasks]
    common = min(math.lcm(*sizes), 20 * max(sizes))
    # Evenly spaced quantiles of each task: each score equally often if `common` is a multiple.
    places = (2 * np.arange(common) + 1) / (2 * common)

    def over_tasks(*samples: np.ndarray, axis: int = -1) -> Any:
        equal = [
            np.take(np.sort(x, axis), (places * x.shape[axis]).astype(int), axis) for x in samples
        ]
        return statistic(np.concatenate(equal, axis), axis=axis)

    return _bootstrap(tasks, over_tasks, resamples, seed)


def _bootstrap(
    samples: Sequence[np.ndarray],
    statistic: Statistic,
    resamples: int,
    seed: int,
) -> ConfidenceInterval:
    """Return a statistic of independent samples (n_i,) with its percentile bootstrap interval.

    Each sample is resampled separately, which makes the bootstrap a stratified one if the samples
    are tasks. The bounds are NaN if a sample has only one value.
    """
    point = float(statistic(*samples))
    if min(len(sample) for sample in samples) == 1:
        return ConfidenceInterval(point, np.nan, np.nan)
    # Not BCa, scipy's default: Agarwal et al. use percentiles, which also exist if all resamples
    # give the same value.
    bounds = scipy.stats.bootstrap(
        samples,
        statistic,
        n_resamples=resamples,
        vectorized=True,
        confidence_level=_LEVEL,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return ConfidenceInterval(point, float(bounds.low), float(bounds.high))


def interval(values: Values, axis: int = 0, bounds: Bounds = UNBOUNDED) -> ConfidenceInterval:
    """Return the mean over seeds with Student's t interval, for learning curves and tables.

    The bootstrap would give far too narrow an interval for a handful of seeds. Values that are not
    finite are left out. A single value has a mean but no interval (NaN).

    Args:
      values: any shape, with the seeds on `axis`.
      bounds: the interval is cut at values that are impossible.

    Returns:
      Arrays of the shape of `values` without the axis; NaN where no value is finite.
    """
    data = np.asarray(values, float)
    finite = np.isfinite(data)
    count = finite.sum(axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(finite, data, 0.0).sum(axis) / count
        deviation = np.where(finite, data - np.expand_dims(mean, axis), 0.0)
        error = np.sqrt(np.square(deviation).sum(axis) / (count - 1) / count)
        # Not `scipy.stats.t.ppf`, the same function in a module that takes half a second to import.
        quantile = scipy.special.stdtrit(np.maximum(count - 1, 1), 0.5 + _LEVEL / 2)
        reach = quantile * error
    reach = np.where(count > 1, reach, np.nan)
    return ConfidenceInterval(
        mean, np.maximum(mean - reach, bounds[0]), np.minimum(mean + reach, bounds[1])
    )


def probability_of_improvement(
    better: Sequence[Values],
    than: Sequence[Values],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> ConfidenceInterval:
    """Return the probability that a seed of one method beats a seed of another on a random task.

    On task m, with N scores x and K scores y, P = sum_ij S(x_i, y_j) / (N K), where S is 1 if
    x > y, 1/2 if they are equal, else 0; the estimate is the mean of P over the tasks (Agarwal
    et al., 2021, section 4.3). The bootstrap resamples seeds of both methods within each task.

    Args:
      better, than: one array (seeds,) for each task, tasks in the same order; the numbers of seeds
        may differ.
      resamples, seed: see `stratified_bootstrap`.

    Returns:
      Scalars. The bounds are NaN if a method has only one seed on a task.

    Raises:
      ValueError: there is no task, the tasks differ, or a task has no score.
    """
    xs, ys = ([np.asarray(v, float).ravel() for v in scores] for scores in (better, than))
    if not xs or len(xs) != len(ys) or not all(v.size for v in (*xs, *ys)):
        raise ValueError("both need at least one score on each of the same tasks")

    def probability(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        pairs = zip(samples[: len(xs)], samples[len(xs) :], strict=True)
        wins = [np.heaviside(x[..., :, None] - y[..., None, :], 0.5) for x, y in pairs]
        return np.mean([w.mean((-2, -1)) for w in wins], axis=0)

    return _bootstrap([*xs, *ys], probability, resamples, seed)


def frames_to_reach(frames: np.ndarray, means: np.ndarray, level: Values) -> np.ndarray:
    """Return when learning curves first reach a level, interpolated between evaluations.

    Args:
      frames: (T,) of the evaluations, rising.
      means: (..., T) returns.
      level: (...) of each curve.

    Returns:
      The frames (...) of each curve, those of the first evaluation if it reaches the level already,
      infinite if no evaluation does.
    """
    level = np.asarray(level, float)[..., None]
    reached = means >= level
    at = reached.argmax(-1)[..., None]
    before = np.maximum(at - 1, 0)
    low, high = (np.take_along_axis(means, i, -1) for i in (before, at))
    share = np.where(high > low, (level - low) / np.where(high > low, high - low, 1.0), 1.0)
    share = np.where(at == 0, 1.0, share)
    crossing = frames[before] + share * (frames[at] - frames[before])
    return np.where(reached.any(-1), crossing[..., 0], np.inf)


def sample_efficiency(
    frames: np.ndarray,
    returns: np.ndarray,
    base_frames: np.ndarray,
    base_returns: np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> ConfidenceInterval:
    """Return how many times fewer frames a method needs to reach the final return of its baseline.

    The ratio of the frames in which the baseline's mean over seeds first reaches its last value to
    those in which the method's mean reaches the same value: 2 is half the frames, 0 is never. Both
    curves should end at the same number of frames. The bootstrap resamples seeds of both.

    Args:
      frames, base_frames: (T,), (P,) of the evaluations.
      returns, base_returns: (seeds, T), (seeds, P), all finite.
      resamples, seed: see `stratified_bootstrap`.

    Returns:
      Scalars. The bounds are NaN if either has only one seed.
    """

    # Seeds are resampled by index, because scipy wants samples whose other axes agree.
    def ratio(seeds: np.ndarray, base_seeds: np.ndarray, axis: int = -1) -> np.ndarray:
        means, base_means = (
            curves[index.astype(int)].mean(-2)
            for curves, index in ((returns, seeds), (base_returns, base_seeds))
        )
        level = base_means[..., -1]
        base = frames_to_reach(base_frames, base_means, level)
        return base / frames_to_reach(frames, means, level)

    samples = [np.arange(len(curves)) for curves in (returns, base_returns)]
    return _bootstrap(samples, ratio, resamples, seed)


def difference(a: Values, b: Values) -> ConfidenceInterval:
    """Return the mean of `b` minus the mean of `a`, with Welch's interval for unequal variances.

    Args:
      a, b: (seeds,) each; values that are not finite are left out.

    Returns:
      Scalars. The bounds are NaN if either has fewer than two values.
    """
    a, b = (np.asarray(v, float)[np.isfinite(v)] for v in (a, b))
    if not a.size or not b.size:
        return ConfidenceInterval(np.nan, np.nan, np.nan)
    point = float(b.mean() - a.mean())
    if min(a.size, b.size) < 2:
        return ConfidenceInterval(point, np.nan, np.nan)
    if np.ptp(a) == np.ptp(b) == 0:
        return ConfidenceInterval(point, point, point)
    bounds = scipy.stats.ttest_ind(b, a, equal_var=False).confidence_interval(_LEVEL)
    return ConfidenceInterval(point, float(bounds.low), float(bounds.high))


def format_count(final: np.ndarray) -> str:
    """Return the number of seeds, and how many of them have a finite return if not all have one."""
    finite = int(np.isfinite(final).sum())
    return str(finite) if finite == len(final) else f"{finite} of {len(final)}"


def format_number(value: float) -> str:
    """Return a number with two decimals, as an integer from 10 on, or as "1.23e5"."""
    if not np.isfinite(value):
        return "not defined"
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    text = f"{value:.2f}" if size < 10 else f"{value:,.0f}"
    return text.replace("-0.00", "0.00")


def format_interval(estimate: ConfidenceInterval) -> str:
    """Return a scalar with its interval, as "0.24 (0.10 to 0.38)"."""
    point, low, high = map(float, estimate)
    bounds = f" ({format_number(low)} to {format_number(high)})" if np.isfinite(low) else ""
    return format_number(point) + bounds


def format_mean(values: Values, bounds: Bounds = UNBOUNDED) -> str:
    """Return the mean of (seeds,) values with its t interval, see `interval`."""
    return format_interval(interval(values, bounds=bounds))
