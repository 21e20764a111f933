"""IQM, bootstrap and t intervals against values worked out another way."""

import numpy as np
import pytest
from scipy import stats

from dynajax.report import statistics


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([5.0], 5.0),
        ([1, 2, 9], 4.0),  # floor(3 / 4) = 0 are cut
        ([1, 2, 3, 100], 2.5),  # one at each end
        ([100, 1, 3, 2, 6], 11 / 3),  # five: one at each end leaves 2, 3, 6
        ([0, 1, 2, 3, 4, 500], 2.5),  # six: one at each end
        ([9, 1, 2, 3, 4, 5, 6, 7], 4.5),  # eight: two leave 3, 4, 5, 6
        ([[1, 2, 3], [4, 5, 600]], 3.5),  # over tasks and seeds at once
    ],
)
def test_iqm_by_hand(values, wanted):
    assert statistics.iqm(np.array(values, float)) == pytest.approx(wanted)


def test_iqm_of_an_axis_and_of_nothing():
    assert statistics.iqm([[1, 2, 3, 100], [8, 4, 6, 0]], axis=1).tolist() == [2.5, 5.0]
    with pytest.raises(ValueError, match="no values"):
        statistics.iqm([])


def test_bootstrap_against_loops():
    scores = np.random.default_rng(1).normal([[0.0], [5.0], [9.0]], 1.0, (3, 6))
    result = statistics.stratified_bootstrap(scores, resamples=4000, seed=3)
    rng = np.random.default_rng(7)
    draws = []
    for _ in range(4000):
        drawn = np.sort(np.concatenate([[row[rng.integers(6)] for _ in row] for row in scores]))
        draws.append(drawn[4:-4].mean())  # floor(18 / 4) = 4
    low, high = np.quantile(draws, [0.025, 0.975])
    assert result.point == pytest.approx(np.sort(scores.ravel())[4:-4].mean())
    assert result.low == pytest.approx(low, abs=0.06)
    assert result.high == pytest.approx(high, abs=0.06)


def test_bootstrap_draws_within_tasks_only():
    # Each task is constant, so only a draw across tasks could give a width.
    result = statistics.stratified_bootstrap([[1.0] * 4, [50.0] * 3], np.mean)
    assert result.low == result.point == result.high == pytest.approx((4 * 1 + 3 * 50) / 7)


def test_bootstrap_repeats_with_its_seed():
    scores = np.random.default_rng(0).normal(size=(2, 8))
    assert statistics.stratified_bootstrap(scores) == statistics.stratified_bootstrap(scores)
    again = statistics.stratified_bootstrap(scores, seed=1)
    assert again != statistics.stratified_bootstrap(scores)


def test_bootstrap_of_one_seed_has_no_interval():
    result = statistics.stratified_bootstrap([[3.0], [1.0, 2.0]])
    assert result.point == 2.0 and np.isnan(result.low) and np.isnan(result.high)
    for bad in ([], [[1.0], []]):
        with pytest.raises(ValueError, match="at least one score"):
            statistics.stratified_bootstrap(bad)


def test_bootstrap_covers_the_truth():
    rng = np.random.default_rng(5)
    hits = 0
    for i in range(200):
        result = statistics.stratified_bootstrap(
            rng.normal(2.0, 1.0, (2, 25)), np.mean, resamples=400, seed=i
        )
        hits += result.low <= 2.0 <= result.high
    assert 0.88 <= hits / 200 <= 0.99


def test_t_interval_against_scipy_and_its_coverage():
    data = np.random.default_rng(2).normal(1.0, 3.0, (5, 1000))
    mean, low, high = statistics.interval(data)
    wanted = stats.t.interval(0.95, 4, data[:, 0].mean(), stats.sem(data[:, 0]))
    assert (low[0], high[0]) == pytest.approx(wanted)
    assert mean == pytest.approx(data.mean(0))
    assert np.mean((low <= 1.0) & (high >= 1.0)) == pytest.approx(0.95, abs=0.02)


def test_t_interval_with_few_or_missing_values():
    data = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    mean, low, high = statistics.interval(data)
    assert mean[:2].tolist() == [2.0, 5.0] and np.isnan(mean[2])
    assert np.isnan(low[1:]).all() and np.isnan(high[1:]).all()
    assert high[0] - 2 == pytest.approx(12.706, abs=1e-3)  # t of one degree of freedom, error 1


def test_difference_against_welch_by_hand():
    a, b = np.array([1.0, 2.0, 4.0]), np.array([5.0, 9.0, 10.0, 12.0])
    result = statistics.difference(a, b)
    parts = a.var(ddof=1) / 3, b.var(ddof=1) / 4
    degrees = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3)
    reach = stats.t.ppf(0.975, degrees) * np.sqrt(sum(parts))
    gap = b.mean() - a.mean()
    assert result == pytest.approx((gap, gap - reach, gap + reach))
    assert np.isnan(statistics.difference(a[:1], b).low)
    assert statistics.difference([1.0, 1.0], [2.0, 2.0]) == (1.0, 1.0, 1.0)
