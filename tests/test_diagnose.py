"""Diagnosis before training: measures with known values, and data sets with planted faults."""

import csv
import re
from html import unescape

import numpy as np
import pytest
from scipy import stats

from dynajax import envs
from dynajax.config import ModelConfig
from dynajax.diagnose import (
    data,
    fits,
    measures,
    offline,
    offline_plots,
    offline_report,
    statements,
)
from dynajax.report import statistics
from dynajax.types import EnvSpec, Transition

D, A = 3, 2
SPEC = EnvSpec("planted", D, A, 50, ("pos[0]", "pos[1]", "speed"), None)
SMALL = ModelConfig(
    members=3,
    elites=3,
    width=32,
    depth=2,
    batch=64,
    learning_rate=3e-3,
    fit_steps=150,
    max_holdout=1,
)
F = np.array([[0.9, 0.1, 0.0], [0.0, 0.8, 0.2], [0.1, 0.0, 0.7]])
G = np.array([[0.3, 0.0], [0.0, 0.3], [0.2, -0.2]])
W = np.array([1.0, -0.5, 0.5])
NOISE, REWARD_NOISE = 0.05, 0.3


def linear(seed=0, size=1200, episode_length=50, unit=1.0, reward_unit=1.0):
    """Simulate a linear system with Gaussian noise: s' = F s + G a + e, r = w s' + e'."""
    rng = np.random.default_rng(seed)
    steps = []
    for t in range(size):
        if t % episode_length == 0:
            s = rng.normal(size=D)
        a = rng.uniform(-1, 1, A)
        next_s = F @ s + G @ a + NOISE * rng.normal(size=D)
        steps.append((s, a, W @ next_s + REWARD_NOISE * rng.normal(), 1.0, next_s))
        s = next_s
    obs, action, reward, discount, next_obs = map(np.array, zip(*steps, strict=True))
    leaves = (unit * obs, action, reward_unit * reward, discount, unit * next_obs)
    transitions = Transition(*(x.astype(np.float32) for x in leaves))
    return data.Recording(transitions, np.arange(size) // episode_length)


# --- measures of the true model ----------------------------------------------------------------


def test_known_r2_and_bias_of_a_linear_gaussian_system():
    t = linear(size=40_000).transitions
    mean = t.obs @ F.T + t.action @ G.T
    shift = 0.2
    reward = mean @ W + shift
    noise = np.sqrt((W**2).sum() * NOISE**2 + REWARD_NOISE**2)
    predicted = np.concatenate([mean, reward[:, None]], 1)[None]
    variance = np.append(np.full(D, NOISE**2), noise**2) + np.zeros_like(predicted)
    true = np.concatenate([t.next_obs, t.reward[:, None]], 1)
    measured = measures.one_step(predicted, variance, t.obs, true)
    std = t.reward.std()
    assert measured["reward_r2"] == pytest.approx(1 - (noise**2 + shift**2) / std**2, abs=0.01)
    assert measured["reward_bias"] == pytest.approx(shift / std, abs=0.01)
    assert measured["reward_aleatoric_std"] == pytest.approx(noise / std, rel=1e-3)
    expected = 1 - NOISE**2 / (t.next_obs - t.obs).var(0)
    np.testing.assert_allclose(measured["state_r2"], expected, atol=0.002)
    np.testing.assert_allclose(measured["rmse"], NOISE, rtol=0.02)
    np.testing.assert_allclose(measured["aleatoric_std"], NOISE, rtol=1e-6)
    np.testing.assert_array_equal(measured["epistemic_std"], 0)
    # The intervals of the state are right, those of the reward are shifted.
    np.testing.assert_allclose(measured["coverage"], measures.COVERAGES, atol=0.01)
    assert measured["reward_coverage"][0] < 0.48


@pytest.mark.parametrize("unit", [1e-7, 1e-12])
def test_measures_do_not_depend_on_units(unit):
    t = linear(size=2000).transitions
    true = np.concatenate([t.next_obs, t.reward[:, None]], 1)
    mean = np.stack([true + 0.1, true - 0.2])
    variance = np.full_like(mean, 0.04)

    def measured(unit):
        obs, scaled = unit * t.obs, unit * true
        parts = [
            measures.one_step(unit * mean, unit**2 * variance, obs, scaled),
            measures.target_statistics(obs, scaled[:, :-1], scaled[:, -1]),
            measures.open_loop(unit * mean[None], obs, scaled[None], np.ones((1, len(true)), bool)),
        ]
        parts[0] |= {n: parts[0][n] / unit for n in ("rmse", "aleatoric_std", "epistemic_std")}
        parts[1] |= {n: parts[1][n] / unit**2 for n in ("var_delta", "var_next", "var_reward")}
        parts[1]["mean_reward"] = parts[1]["mean_reward"] / unit
        return parts

    for one, other in zip(measured(unit), measured(1.0), strict=True):
        for name, value in other.items():
            assert np.isfinite(value).all(), name
            np.testing.assert_allclose(one[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("unit", [1e-7, 1.0, 1234.5])
def test_measures_of_rounding_are_those_of_a_constant(unit):
    clock = np.float32(unit * (0.5 + 0.01 * np.arange(101)))[:, None]
    obs, next_obs = clock[:-1], clock[1:]
    assert (next_obs - obs).std() > 0
    assert np.isnan(measures.state_r2(next_obs, obs, next_obs)).all()
    assert np.isfinite(measures.r2(next_obs, next_obs)).all()
    measured = measures.target_statistics(obs, next_obs, np.full(100, np.float32(unit)))
    assert measured["var_delta"] == 0 and measured["var_next"] > 0 and measured["var_reward"] == 0
    assert measured["typical"] == pytest.approx(1, abs=1e-3)
    assert np.isnan(measured["top_share"]).all() and np.isnan(measured["reward_top_share"])


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_known_calibration(factor):
    """Intervals of standard deviations that are wrong by a factor have a known coverage."""
    true = np.random.default_rng(0).normal(size=(40_000, 2))
    inside = measures.coverage(
        np.zeros((3, *true.shape)), np.full((3, *true.shape), factor**2), true
    )
    z = stats.norm.ppf(0.5 + np.array(measures.COVERAGES) / 2)
    expected = 2 * stats.norm.cdf(factor * z) - 1
    np.testing.assert_allclose(inside, expected[:, None] + np.zeros((3, 2)), atol=0.01)


def test_coverage_of_members_that_disagree_is_that_of_the_mixture():
    rng = np.random.default_rng(0)
    means = np.array([-2.0, 2.0])
    true = (rng.choice(means, 20_000) + rng.normal(size=20_000))[:, None]
    mean = np.broadcast_to(means[:, None, None], (2, 20_000, 1))
    inside = measures.coverage(mean, np.ones_like(mean), true)
    np.testing.assert_allclose(inside[:, 0], measures.COVERAGES, atol=0.012)
    measured = measures.one_step(
        np.concatenate([mean, mean], 2),
        np.ones((2, 20_000, 2)),
        0 * true,
        np.concatenate([true, true], 1),
    )
    assert measured["epistemic_std"][0] == pytest.approx(2.0)
    assert measured["aleatoric_std"][0] == pytest.approx(1.0)


def test_known_open_loop_error():
    """The error of the true model after h steps is sum_i F^i Q F^i' for any actions."""
    steps, count = 8, 20_000
    rng = np.random.default_rng(1)
    start = rng.normal(size=(count, D))
    real, model, true, predicted = start, start, [], []
    for _ in range(steps):
        push = rng.uniform(-1, 1, (count, A)) @ G.T
        real = real @ F.T + push + NOISE * rng.normal(size=(count, D))
        model = model @ F.T + push
        true.append(np.concatenate([real, real[:, :1]], 1))
        predicted.append(np.concatenate([model, model[:, :1]], 1)[None])
    valid = np.ones((steps, count), bool)
    measured = measures.open_loop(np.array(predicted), start, np.array(true), valid)
    covariance, power = np.zeros((D, D)), np.eye(D)
    for h in range(steps):
        covariance += NOISE**2 * power @ power.T
        power = F @ power
        change = (true[h][:, :D] - start).var(0)
        np.testing.assert_allclose(
            measured["state_r2"][h], 1 - np.diag(covariance) / change, atol=0.003
        )
    np.testing.assert_array_equal(measured["epistemic_std"], 0)


def test_open_loop_continues_from_its_own_predictions():
    recording = linear()
    config = SMALL
    fitted = fits.fit(SPEC, ["none"], [recording.transitions], 0, config, 1)
    model, t = fits.select_model(fitted.models, 0, 0), recording.transitions
    actions = t.action[:30].reshape(10, 3, A)
    predicted = fits.open_loop(fitted.dynamics, model, t.obs[:10], actions)
    assert predicted.shape == (3, 3, 10, D + 1)
    for member in range(3):
        obs = t.obs[:10]
        for h in range(3):
            expected = fits.predict(fitted.dynamics, model, obs, actions[:, h]).mean[member]
            np.testing.assert_allclose(predicted[h, member], expected, atol=1e-5)
            obs = expected[:, :D]


def test_windows_end_with_their_episode():
    starts, valid = measures.windows(np.array([0, 0, 0, 1, 1, 2]), 3, most=10)
    np.testing.assert_array_equal(starts, range(6))
    np.testing.assert_array_equal(valid.sum(0), [3, 2, 1, 2, 1, 1])


def test_top_share_of_known_distributions():
    rng = np.random.default_rng(0)
    spike = np.zeros(10_000)
    spike[:50] = 3
    values = np.stack([rng.normal(size=10_000), rng.laplace(size=10_000), spike], 1)
    np.testing.assert_allclose(measures.top_share(values), [0.085, 0.162, 1.0], atol=0.02)


# --- data of the fits --------------------------------------------------------------------------


def test_held_out_transitions_do_not_change_a_fit():
    recording = linear(size=400)
    fixes = ["none", "scale"]
    fitted = fits.fit(SPEC, fixes, [recording.transitions] * 2, 3, SMALL, 1)
    assert fitted.held_out.shape == (2, 400) and 40 < fitted.held_out[0].sum() < 130
    assert (fitted.held_out[0] != fitted.held_out[1]).any()
    held_out = fitted.held_out[0]
    spoiled = recording.transitions._replace(
        reward=np.where(held_out, 1e6, recording.transitions.reward).astype(np.float32)
    )
    again = fits.fit(SPEC, fixes, [spoiled, recording.transitions], 3, SMALL, 1)
    for i in range(2):
        ours, theirs = (
            fits.select_model(f.models, 0, i).params["network"] for f in (fitted, again)
        )
        np.testing.assert_array_equal(ours["head"]["kernel"], theirs["head"]["kernel"])


def test_split_is_between_episodes_if_possible():
    known, new = data.split(linear(size=1200, episode_length=100))
    assert set(known.episode).isdisjoint(new.episode) and len(new.episode) == 200
    known, new = data.split(linear(size=1200, episode_length=1200))
    assert len(new.episode) == 200


def test_mean_of_the_lowest_leaves_out_what_is_missing():
    values = np.array([[3.0, np.nan, 1.0, 2.0], [np.nan] * 4])
    np.testing.assert_array_equal(measures.mean_of_lowest(values, 2), [1.5, np.nan])


def test_collect_records_the_task_and_is_deterministic():
    spec = envs.spec("Pendulum-v1")
    measured = data.collect(spec, 450, 3)
    assert len(measured.episode) == 450 and measured.episode.max() == 2
    t = measured.transitions
    same = np.diff(measured.episode) == 0
    np.testing.assert_array_equal(t.obs[1:][same], t.next_obs[:-1][same])
    again = data.collect(spec, 450, 3).transitions
    np.testing.assert_array_equal(again.reward, t.reward)
    # The noise is white in even episodes and correlated in odd ones.
    change = np.abs(np.diff(t.action[:, 0]))
    assert change[:199].mean() > 2 * change[200:399].mean()
    # Rewards of repeated actions are summed.
    held = data.collect(envs.spec("Pendulum-v1", repeat=2), 150, 3, repeat=2)
    assert held.episode.max() == 1 and held.transitions.reward.mean() < 1.5 * t.reward.mean()
    order = data.shuffled(measured, 0)
    np.testing.assert_array_equal(np.sort(order.reward), np.sort(t.reward))


# --- sentences and reports of planted faults -----------------------------------------------------

FIXES = ["none", "scale", "target", "scale,target", "scale,auto", "scale,auto,beta"]


def diagnose(*recordings, rounds=3, spec=SPEC):
    return offline.measure(
        spec, recordings, FIXES, source="planted", config=SMALL, rounds=rounds, steps=6
    )


@pytest.fixture(scope="module")
def clean():
    return diagnose(linear(0), linear(1))


#: Words that name a cause, which no sentence may have.
_CAUSES = re.compile(
    r"explains?\b|because|failure|is not learned|only partly|overconfident:|try ", re.I
)


def text(measured):
    """Return all sentences, after a check that none names a cause."""
    lines = " ".join(statements.sentences(measured))
    assert not _CAUSES.search(lines), lines
    return lines


def test_report_of_a_task_without_faults(clean, tmp_path):
    lines = text(clean)
    for f in (clean.fixes.index(fix) for fix in ("none", "scale", "scale,target")):
        assert statistics.format_mean(clean.held_out["reward_r2"][:, f], statistics.R2) in lines
        state_r2 = measures.median(clean.held_out["state_r2"][:, f])
        assert statistics.format_mean(state_r2, statistics.R2) in lines
        coverage = clean.new_episodes["coverage"][:, f, 1]
        assert statistics.format_mean(coverage, statistics.SHARE) in lines
    # The noise cannot be predicted: R² is that of the true model.
    t = linear(0).transitions
    limit = 1 - ((W**2).sum() * NOISE**2 + REWARD_NOISE**2) / t.reward.var()
    f, held_out = clean.fixes.index("scale"), clean.held_out
    assert held_out["reward_r2"][:, f].mean() == pytest.approx(limit, abs=0.06)
    assert abs(held_out["reward_bias"][:, f].mean()) < 0.1
    np.testing.assert_allclose(held_out["coverage"][:, f].mean(0), measures.COVERAGES, atol=0.12)
    np.testing.assert_allclose(held_out["aleatoric_std"][:, f].mean(0), NOISE, rtol=0.5)

    offline_report.write(
        clean._replace(first_seed=5), tmp_path, "python experiments/diagnose.py --env=planted"
    )
    html = (tmp_path / "diagnosis.html").read_text()
    shown = unescape(re.sub("</?b>", "**", html))
    assert all(line in shown for line in statements.sentences(clean)) and "--env=planted" in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    lines = list(csv.DictReader((tmp_path / "fixes.csv").open()))
    assert len(lines) == 2 * len(FIXES)
    value = next(x for x in lines if x["fix"] == "scale" and x["seed"] == "6")["reward_r2"]
    assert float(value) == pytest.approx(clean.held_out["reward_r2"][1, f], rel=1e-4)
    dims = list(csv.DictReader((tmp_path / "dims.csv").open()))
    assert [x["dim"] for x in dims] == list(SPEC.obs_names)


def test_errors_are_drawn_without_the_published_targets(clean):
    chosen = [clean.fixes.index("scale")]
    result = clean._replace(
        fixes=("scale",), held_out={n: x[:, chosen] for n, x in clean.held_out.items()}
    )
    assert len(offline_plots.errors(result, "scale").axes) == 3


def test_planted_scale_mismatch_is_found():
    measured = diagnose(*(linear(s, unit=100.0, reward_unit=0.01) for s in (0, 1)))
    best = statements.best(measured)
    assert "scale" in best.split(",")
    raw, scaled = (
        measured.held_out["reward_r2"][:, measured.fixes.index(fix)] for fix in ("none", best)
    )
    assert scaled.mean() > raw.mean() + 0.1
    lines = text(measured)
    assert f"{statistics.format_mean(raw, statistics.R2)} with none, " in lines
    assert f"{statistics.format_mean(scaled, statistics.R2)} with {best}" in lines
    assert f"(--fix={best})" in lines and "overestimated by selection" in lines
    ratio = measured.targets["ratio_delta"]
    expected = statistics.format_number(float(np.median(ratio)))
    assert f"sum to {expected} times that of the reward" in lines
    reference = [linear(s).transitions for s in (0, 1)]
    expected = [1e8 * (t.next_obs - t.obs).var(0).sum() / t.reward.var() for t in reference]
    np.testing.assert_allclose(ratio, expected, rtol=1e-3)


def test_planted_direct_dimension_is_found():
    def planted(seed):
        recording = linear(seed)
        t, rng = recording.transitions, np.random.default_rng(seed)
        # Dimension 1 is large and depends on the last action alone.
        drawn = (200 * t.action[:, 0] + rng.normal(size=len(t.reward))).astype(np.float32)
        before = np.roll(drawn, 1)
        obs, next_obs = t.obs.copy(), t.next_obs.copy()
        obs[:, 1], next_obs[:, 1] = before, drawn
        return recording._replace(transitions=t._replace(obs=obs, next_obs=next_obs))

    measured = diagnose(planted(0), planted(1))
    kind = statements.dim_kinds(measured)
    np.testing.assert_array_equal(kind.direct, [False, True, False])
    assert [line["kind"] for line in offline_report.by_dim(measured)] == [
        "residual",
        "direct",
        "residual",
    ]
    [line] = [x for x in statements.sentences(measured) if "the smaller target there" in x]
    assert line.startswith("1 of 3 dimensions change more in a step than") and "pos[1]" in line
    f = measured.fixes.index("scale,auto")
    r2 = statistics.format_mean(measured.held_out["state_r2"][:, f, 1], statistics.R2)
    assert line.endswith(f"{r2} with scale,auto.")


def test_sentences_about_a_constant_reward_and_a_rare_one():
    constant = [linear(s, reward_unit=0.0) for s in (0, 1)]
    lines = text(diagnose(*constant, rounds=1))
    assert "it is constant in 2 of 2 data sets (mean 0.00)" in lines and "--data=" in lines
    assert "nan" not in lines and "of that of the reward" not in lines.split("largest changes")[1]

    def spiky(seed):
        recording = linear(seed)
        rare = np.random.default_rng(seed).random(len(recording.episode)) < 0.005
        t = recording.transitions._replace(reward=rare.astype(np.float32))
        return recording._replace(transitions=t)

    assert "100 % of that of the reward" in text(diagnose(spiky(0), spiky(1), rounds=1))


def test_sentences_about_jumps_and_constant_dimensions(clean):
    targets = {k: v.copy() for k, v in clean.targets.items()}
    targets["top_share"][:] = 0.1
    targets["top_share"][:, 0] = 0.9
    targets["var_next"][:, 2] = targets["var_delta"][:, 2] = 0.0
    measured = clean._replace(targets=targets)
    np.testing.assert_array_equal(statements.dim_kinds(measured).constant, [False, False, True])
    lines = text(measured)
    assert "contribute 50 % of the squared change of a dimension (median), 90 % in pos[0]" in lines
    assert "1 of 3 dimensions are constant in these data: speed." in lines


def test_list_dims_and_number_formats():
    dims = [f"v[{i}]" for i in range(6)] + ["height"]
    chosen = np.array([True, True, True, False, False, True, True])
    assert statements.list_dims(dims, chosen) == "v[0-2,5], height"
    assert statistics.format_mean(np.array([0.5])) == "0.50"
    assert statistics.format_mean(np.array([0.4, 0.6])) == "0.50 (-0.77 to 1.77)"
    assert statistics.format_mean(np.array([np.nan])) == "not defined"
    assert statistics.format_number(4.2e6) == "4.2e6" and statistics.format_number(2e-4) == "2e-4"
