"""The diagnosis before training: measures with known values, and planted faults."""

import csv
import re

import numpy as np
import pytest
from scipy import stats

from dynajax import envs
from dynajax.config import ModelConfig
from dynajax.diagnose import data, fits, measures, offline, offline_report, statements
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
    score_size=1,
)
F = np.array([[0.9, 0.1, 0.0], [0.0, 0.8, 0.2], [0.1, 0.0, 0.7]])
G = np.array([[0.3, 0.0], [0.0, 0.3], [0.2, -0.2]])
W = np.array([1.0, -0.5, 0.5])
NOISE, REWARD_NOISE = 0.05, 0.3


def linear(seed=0, size=1200, episode_length=50, unit=1.0, reward_unit=1.0):
    """A linear system with Gaussian noise: s' = F s + G a + e, r = w s' + e'."""
    rng = np.random.default_rng(seed)
    rows = []
    for t in range(size):
        if t % episode_length == 0:
            s = rng.normal(size=D)
        a = rng.uniform(-1, 1, A)
        new = F @ s + G @ a + NOISE * rng.normal(size=D)
        rows.append((s, a, W @ new + REWARD_NOISE * rng.normal(), 1.0, new))
        s = new
    obs, action, reward, discount, new = (np.array(x) for x in zip(*rows, strict=True))
    leaves = (unit * obs, action, reward_unit * reward, discount, unit * new)
    transitions = Transition(*(x.astype(np.float32) for x in leaves))
    return data.Recording(transitions, np.arange(size) // episode_length)


# --- measures, with the true model in place of a fitted one -----------------------------------


def test_known_r2_bias_and_skill_of_a_linear_gaussian_system():
    t = linear(size=40_000).transitions
    mean = t.obs @ F.T + t.action @ G.T
    shift = 0.2
    reward = mean @ W + shift
    noise = np.sqrt((W**2).sum() * NOISE**2 + REWARD_NOISE**2)
    predicted = np.concatenate([mean, reward[:, None]], 1)[None]
    variance = np.append(np.full(D, NOISE**2), noise**2) + np.zeros_like(predicted)
    true = np.concatenate([t.next_obs, t.reward[:, None]], 1)
    measured = measures.scores(predicted, variance, t.obs, true)
    std = t.reward.std()
    assert measured["reward_r2"] == pytest.approx(1 - (noise**2 + shift**2) / std**2, abs=0.01)
    assert measured["reward_bias"] == pytest.approx(shift / std, abs=0.01)
    assert measured["reward_noise"] == pytest.approx(noise / std, rel=1e-3)
    expected = 1 - NOISE**2 / (t.next_obs - t.obs).var(0)
    np.testing.assert_allclose(measured["skill"], expected, atol=0.002)
    np.testing.assert_allclose(measured["rmse"], NOISE, rtol=0.02)
    np.testing.assert_allclose(measured["noise"], NOISE, rtol=1e-6)
    np.testing.assert_array_equal(measured["spread"], 0)
    # The state's intervals are right, the reward's are shifted.
    np.testing.assert_allclose(measured["inside"], measures.COVERAGES, atol=0.01)
    assert measured["reward_inside"][0] < 0.48


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_known_calibration(factor):
    """Predicted standard deviations that are wrong by a factor hold a known share."""
    true = np.random.default_rng(0).normal(size=(40_000, 2))
    inside = measures.coverage(
        np.zeros((3, *true.shape)), np.full((3, *true.shape), factor**2), true
    )
    z = stats.norm.ppf(0.5 + np.array(measures.COVERAGES) / 2)
    expected = 2 * stats.norm.cdf(factor * z) - 1
    np.testing.assert_allclose(inside, expected[:, None] + np.zeros((3, 2)), atol=0.01)


def test_members_that_disagree_make_a_mixture():
    rng = np.random.default_rng(0)
    means = np.array([-2.0, 2.0])
    true = (rng.choice(means, 20_000) + rng.normal(size=20_000))[:, None]
    mean = np.broadcast_to(means[:, None, None], (2, 20_000, 1))
    inside = measures.coverage(mean, np.ones_like(mean), true)
    np.testing.assert_allclose(inside[:, 0], measures.COVERAGES, atol=0.012)
    measured = measures.scores(
        np.concatenate([mean, mean], 2),
        np.ones((2, 20_000, 2)),
        0 * true,
        np.concatenate([true, true], 1),
    )
    assert measured["spread"][0] == pytest.approx(2.0) and measured["noise"][0] == pytest.approx(
        1.0
    )


def test_known_open_loop_error():
    """The error of the true model after h steps is sum_i F^i Q F^i', whatever the actions."""
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
    there = np.ones((steps, count), bool)
    measured = measures.open_loop(np.array(predicted), start, np.array(true), there)
    covariance, power = np.zeros((D, D)), np.eye(D)
    for h in range(steps):
        covariance += NOISE**2 * power @ power.T
        power = F @ power
        change = (true[h][:, :D] - start).var(0)
        np.testing.assert_allclose(
            measured["open_skill"][h], 1 - np.diag(covariance) / change, atol=0.003
        )
    np.testing.assert_array_equal(measured["open_spread"], 0)


def test_a_chain_follows_its_own_predictions():
    recording = linear()
    config = SMALL
    fitted = fits.fit(SPEC, ["none"], [recording.transitions], 0, config, 1)
    model, t = fits.row(fitted.models, 0, 0), recording.transitions
    actions = t.action[:30].reshape(10, 3, A)
    chain = fits.open_loop(config, model, t.obs[:10], actions)
    assert chain.shape == (3, 3, 10, D + 1)
    for member in range(3):
        obs = t.obs[:10]
        for h in range(3):
            expected = fits.predict(config, model, obs, actions[:, h]).mean[member]
            np.testing.assert_allclose(chain[h, member], expected, atol=1e-5)
            obs = expected[:, :D]


def test_windows_stay_in_their_episode():
    starts, there = measures.windows(np.array([0, 0, 0, 1, 1, 2]), 3, most=10)
    np.testing.assert_array_equal(starts, range(6))
    np.testing.assert_array_equal(there.sum(0), [3, 2, 1, 2, 1, 1])


def test_shares_of_the_largest_steps():
    rng = np.random.default_rng(0)
    spike = np.zeros(10_000)
    spike[:50] = 3
    values = np.stack([rng.normal(size=10_000), rng.laplace(size=10_000), spike], 1)
    np.testing.assert_allclose(measures.top_share(values), [0.085, 0.162, 1.0], atol=0.02)


# --- what fits see -----------------------------------------------------------------------------


def test_nothing_held_out_reaches_a_fit_and_codes_share_their_start():
    recording = linear(size=400)
    codes = ["none", "scale"]
    fitted = fits.fit(SPEC, codes, [recording.transitions] * 2, 3, SMALL, 1)
    assert fitted.held_out.shape == (2, 400) and 40 < fitted.held_out[0].sum() < 130
    assert (fitted.held_out[0] != fitted.held_out[1]).any()
    held = fitted.held_out[0]
    spoiled = recording.transitions._replace(
        reward=np.where(held, 1e6, recording.transitions.reward).astype(np.float32)
    )
    again = fits.fit(SPEC, codes, [spoiled, recording.transitions], 3, SMALL, 1)
    for c in range(2):
        ours, theirs = (fits.row(f.models, 0, c).params["layers"] for f in (fitted, again))
        np.testing.assert_array_equal(ours["head"]["kernel"], theirs["head"]["kernel"])


def test_parts_are_whole_episodes_where_they_can_be():
    known, new = data.parts(linear(size=1200, episode_length=100))
    assert set(known.episode).isdisjoint(new.episode) and len(new.episode) == 200
    known, new = data.parts(linear(size=1200, episode_length=1200))
    assert len(new.episode) == 200


def test_collected_transitions_are_those_of_the_task():
    spec = envs.spec("Pendulum-v1")
    measured = data.collect(spec, 450, 3)
    assert len(measured.episode) == 450 and measured.episode.max() == 2
    t = measured.transitions
    same = np.diff(measured.episode) == 0
    np.testing.assert_array_equal(t.obs[1:][same], t.next_obs[:-1][same])
    again = data.collect(spec, 450, 3).transitions
    np.testing.assert_array_equal(again.reward, t.reward)
    # White noise in even episodes, correlated in odd ones.
    change = np.abs(np.diff(t.action[:, 0]))
    assert change[:199].mean() > 2 * change[200:399].mean()
    order = data.shuffled(measured, 0)
    np.testing.assert_array_equal(np.sort(order.reward), np.sort(t.reward))


# --- what is said of planted faults -------------------------------------------------------------

CODES = ["none", "scale", "target", "scale,target", "scale,auto", "scale,auto,beta"]


def diagnose(*recordings, rounds=3, spec=SPEC):
    return offline.measure(
        spec, recordings, CODES, source="planted", config=SMALL, rounds=rounds, steps=6
    )


@pytest.fixture(scope="module")
def clean():
    return diagnose(linear(0), linear(1))


#: Words of a verdict: figures stand for themselves.
_CAUSES = re.compile(
    r"explains?\b|because|failure|is not learned|only partly|overconfident:|try ", re.I
)


def text(measured):
    """All sentences, of which none says a cause."""
    lines = " ".join(statements.sentences(measured))
    assert not _CAUSES.search(lines), lines
    return lines


def test_a_clean_task_has_its_figures_on_the_page(clean, tmp_path):
    lines = text(clean)
    for c in (clean.codes.index(code) for code in ("none", "scale", "scale,target")):
        assert statistics.over_seeds(clean.scores["reward_r2"][:, c]) in lines
        assert statistics.over_seeds(measures.median(clean.scores["skill"][:, c])) in lines
        assert statistics.over_seeds(clean.new["inside"][:, c, 1]) in lines
    # What cannot be known is not predicted: the R² is that of the true model.
    t = linear(0).transitions
    limit = 1 - ((W**2).sum() * NOISE**2 + REWARD_NOISE**2) / t.reward.var()
    c = clean.codes.index("scale")
    assert clean.scores["reward_r2"][:, c].mean() == pytest.approx(limit, abs=0.06)
    assert abs(clean.scores["reward_bias"][:, c].mean()) < 0.1
    np.testing.assert_allclose(clean.scores["inside"][:, c].mean(0), measures.COVERAGES, atol=0.12)
    noise = clean.scores["noise"][:, c].mean(0)
    np.testing.assert_allclose(noise, NOISE, rtol=0.5)

    offline_report.write(clean, tmp_path, "python experiments/diagnose.py --env=planted")
    html = (tmp_path / "diagnosis.html").read_text()
    assert all(line in html for line in statements.sentences(clean)) and "--env=planted" in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    lines = list(csv.DictReader((tmp_path / "codes.csv").open()))
    assert len(lines) == 2 * len(CODES)
    value = next(x for x in lines if x["code"] == "scale" and x["seed"] == "1")["reward_r2"]
    assert float(value) == pytest.approx(clean.scores["reward_r2"][1, c], rel=1e-4)
    channels = list(csv.DictReader((tmp_path / "channels.csv").open()))
    assert [x["channel"] for x in channels] == list(SPEC.obs_names)


def test_a_planted_scale_mismatch_is_measured_and_compared():
    measured = diagnose(*(linear(s, unit=100.0, reward_unit=0.01) for s in (0, 1)))
    best = statements.best(measured)
    assert "scale" in best.split(",")
    raw, scaled = (measured.scores["reward_r2"][:, measured.codes.index(c)] for c in ("none", best))
    assert scaled.mean() > raw.mean() + 0.1
    lines = text(measured)
    assert f"none gives {statistics.over_seeds(raw)}, " in lines
    assert f"{best} {statistics.over_seeds(scaled)}" in lines
    assert f"(--fix={best})" in lines and "flattered by chance" in lines
    ratio = measured.scales["ratio_delta"]
    assert f"sum to {statistics.number(float(np.median(ratio)))} times the reward's" in lines
    reference = [linear(s).transitions for s in (0, 1)]
    expected = [1e8 * (t.next_obs - t.obs).var(0).sum() / t.reward.var() for t in reference]
    np.testing.assert_allclose(ratio, expected, rtol=1e-3)


def test_a_planted_direct_channel_is_found():
    def planted(seed):
        recording = linear(seed)
        t, rng = recording.transitions, np.random.default_rng(seed)
        # Large, and drawn anew at every step from the action alone.
        fresh = (200 * t.action[:, 0] + rng.normal(size=len(t.reward))).astype(np.float32)
        before = np.roll(fresh, 1)
        obs, new = t.obs.copy(), t.next_obs.copy()
        obs[:, 1], new[:, 1] = before, fresh
        return recording._replace(transitions=t._replace(obs=obs, next_obs=new))

    measured = diagnose(planted(0), planted(1))
    kind = statements.kinds(measured)
    np.testing.assert_array_equal(kind.direct, [False, True, False])
    assert [line["kind"] for line in offline_report.channel_table(measured)] == [
        "residual",
        "direct",
        "residual",
    ]
    [line] = [x for x in statements.sentences(measured) if "the smaller target there" in x]
    assert line.startswith("1 of 3 channels vary less than they change") and "pos[1]" in line
    c = measured.codes.index("scale,auto")
    skill = statistics.over_seeds(measured.scores["skill"][:, c, 1])
    assert line.endswith(f"{skill} with scale,auto.")


def test_a_reward_that_never_changes_has_no_figure_and_a_rare_one_its_share():
    silent = [linear(s, reward_unit=0.0) for s in (0, 1)]
    lines = text(diagnose(*silent, rounds=1))
    assert "it never changes in 2 of 2 sets of data (mean 0.00)" in lines and "--data=" in lines
    assert "nan" not in lines and "of the reward's. Gaussian" not in lines

    def spiky(seed):
        recording = linear(seed)
        rare = np.random.default_rng(seed).random(len(recording.episode)) < 0.005
        t = recording.transitions._replace(reward=rare.astype(np.float32))
        return recording._replace(transitions=t)

    assert "100 % of the reward's" in text(diagnose(spiky(0), spiky(1), rounds=1))


def test_jumps_and_constants_are_told_apart(clean):
    scales = {k: v.copy() for k, v in clean.scales.items()}
    scales["top_share"][:] = 0.1
    scales["top_share"][:, 0] = 0.9
    scales["var_next"][:, 2] = scales["var_delta"][:, 2] = 0.0
    measured = clean._replace(scales=scales)
    np.testing.assert_array_equal(statements.kinds(measured).constant, [False, False, True])
    assert "makes 50 % of a channel's squared change (median), 90 % in pos[0]" in text(measured)
    assert "1 of 3 channels never change in these data: speed." in text(measured)


def test_names_and_figures_are_short():
    channels = [f"v[{i}]" for i in range(6)] + ["height"]
    chosen = np.array([True, True, True, False, False, True, True])
    assert statements.names(channels, chosen) == "v[0-2,5], height"
    assert statistics.over_seeds(np.array([0.5])) == "0.50"
    assert statistics.over_seeds(np.array([0.4, 0.6])) == "0.50 (-0.77 to 1.77)"
    assert statistics.over_seeds(np.array([np.nan])) == "not defined"
    assert statistics.number(4.2e6) == "4e6" and statistics.number(2e-4) == "2e-4"
