"""Compare IQM, bootstrap and t intervals with values computed in other ways."""

import numpy as np
import pytest
from scipy import stats

from dynajax.report import statistics


@pytest.mark.parametrize(
    ("values", "expected"),
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
def test_iqm_by_hand(values, expected):
    assert statistics.iqm(np.array(values, float)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.0, "3.00"),
        (-12345.6, "-12,346"),
        (123456.0, "1.23e5"),
        (1e5, "1e5"),
        (-0.00052, "-5.2e-4"),
    ],
)
def test_numbers_keep_three_digits(value, text):
    assert statistics.format_number(value) == text


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


def test_bootstrap_resamples_within_tasks_only():
    # Each task is constant, so only resampling across tasks could give a width.
    result = statistics.stratified_bootstrap([[1.0] * 4, [50.0] * 3], np.mean)
    assert result.low == result.point == result.high == pytest.approx((1 + 50) / 2)


def test_tasks_with_different_numbers_of_seeds_count_equally():
    levels = np.array([500, 1, 900, 800, 260, 100, 2])
    equal = statistics.stratified_bootstrap([[level] * 3 for level in levels])
    fewer = statistics.stratified_bootstrap(
        [[x] * n for x, n in zip(levels, (5, 5, 5, 5, 5, 3, 3), strict=True)]
    )
    # A quarter of 7 tasks is cut at each end: the second and the sixth count in part.
    assert fewer.point == pytest.approx(equal.point, rel=0.03)
    # A large common multiple would need much memory.
    many = [np.full(n, level) for n, level in zip((16, 15, 14, 13, 11, 9, 7), levels, strict=True)]
    assert statistics.stratified_bootstrap(many).point == pytest.approx(equal.point, rel=0.03)


def test_bootstrap_is_deterministic():
    scores = np.random.default_rng(0).normal(size=(2, 8))
    assert statistics.stratified_bootstrap(scores) == statistics.stratified_bootstrap(scores)
    again = statistics.stratified_bootstrap(scores, seed=1)
    assert again != statistics.stratified_bootstrap(scores)


def test_bootstrap_of_one_seed_has_no_interval():
    result = statistics.stratified_bootstrap([[3.0], [1.0, 2.0]])
    assert result.point == 2.5 and np.isnan(result.low) and np.isnan(result.high)
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
    expected = stats.t.interval(0.95, 4, data[:, 0].mean(), stats.sem(data[:, 0]))
    assert (low[0], high[0]) == pytest.approx(expected)
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


def test_probability_of_improvement_by_hand():
    # Four of six pairs are won and one is equal; on the second task the only pair is lost.
    result = statistics.probability_of_improvement([[3.0, 5.0], [0.0]], [[1.0, 3.0, 4.0], [2.0]])
    assert result.point == pytest.approx(((4 + 0.5) / 6 + 0) / 2)
    assert np.isnan(result.low) and np.isnan(result.high), "one seed has no interval"
    with pytest.raises(ValueError, match="same tasks"):
        statistics.probability_of_improvement([[1.0]], [[1.0], [2.0]])


def test_probability_of_improvement_against_loops():
    rng = np.random.default_rng(3)
    xs, ys = rng.normal(0.5, 1, (2, 6)), rng.normal(0, 1, (2, 5))
    result = statistics.probability_of_improvement(xs, ys, resamples=4000)
    draws = []
    for _ in range(1500):
        tasks = []
        for x, y in zip(xs, ys, strict=True):
            some, others = rng.choice(x, len(x)), rng.choice(y, len(y))
            wins = [float(a > b) + 0.5 * (a == b) for a in some for b in others]
            tasks.append(sum(wins) / len(wins))
        draws.append(sum(tasks) / len(tasks))
    assert result.low == pytest.approx(np.quantile(draws, 0.025), abs=0.03)
    assert result.high == pytest.approx(np.quantile(draws, 0.975), abs=0.03)
    # The probabilities of both directions add up to 1.
    back = statistics.probability_of_improvement(ys, xs)
    assert result.point + back.point == pytest.approx(1.0)
    even = statistics.probability_of_improvement([[1.0, 2.0]], [[1.0, 2.0]])
    assert even.point == 0.5


def test_frames_to_reach_by_hand():
    frames = np.array([10, 20, 40])
    means = np.array([[0.0, 5.0, 9.0], [6.0, 1.0, 9.0], [0.0, 1.0, 2.0], [0.0, 7.0, 1.0]])
    reached = statistics.frames_to_reach(frames, means, np.array([7.0, 5.0, 3.0, 7.0]))
    # Half way from 20 to 40; at the first evaluation; never; exactly at an evaluation.
    assert reached.tolist() == [30.0, 10.0, np.inf, 20.0]


def test_sample_efficiency_by_hand():
    base_frames = np.array([100, 200, 300])
    base = np.array([[0.0, 1.0, 3.0], [0.0, 3.0, 5.0]])  # mean 0, 2, 4: its 4 comes at 300
    frames = np.array([50, 100, 300])
    fast = np.array([[0.0, 8.0, 8.0], [0.0, 8.0, 8.0]])  # 4 half way from 50 to 100
    result = statistics.sample_efficiency(frames, fast, base_frames, base)
    assert result.point == pytest.approx(300 / 75)
    assert result.low <= result.point <= result.high
    assert statistics.sample_efficiency(frames, 0 * fast, base_frames, base) == (0.0, 0.0, 0.0)
    itself = statistics.sample_efficiency(base_frames, base[:1], base_frames, base[:1])
    assert itself.point == 1.0 and np.isnan(itself.low)
    # A baseline whose mean was higher before reaches its last value on the way up.
    early = np.array([[0.0, 8.0, 4.0]])
    assert statistics.sample_efficiency(base_frames, early, base_frames, early).point == 1.0
