"""Test MACURA, M2AC, Infoprop and the uncertainty weight by hand, and what they keep."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dynajax import UsageError, make_config
from dynajax.trust import TRUST, Predictions, Values
from dynajax.trust.infoprop import InfopropState
from dynajax.trust.m2ac import M2AC
from dynajax.trust.macura import Macura
from dynajax.types import EnvSpec

KEY = jax.random.PRNGKey(0)


def make_rule(name, batch, dims=1, **fields):
    """Return a rule for so many targets."""
    cls = TRUST[name]
    spec = EnvSpec("line", dims - 1, 1, 50, tuple(map(str, range(dims - 1))), None)
    return cls(cls.Fields(**fields), spec, batch)


def predictions(mean, variance, member=None, sample=None, active=True):
    """Return predictions from numbers (E, B) of one target, or (E, B, X)."""
    mean, variance = (jnp.asarray(x, jnp.float32) for x in (mean, variance))
    mean, variance = (x if x.ndim == 3 else x[..., None] for x in (mean, variance))
    batch = mean.shape[1]
    member = jnp.zeros(batch, int) if member is None else jnp.asarray(member)
    sample = mean[member, jnp.arange(batch)] if sample is None else jnp.asarray(sample)[:, None]
    return Predictions(mean, variance, member, sample, jnp.asarray(active))


# --- MACURA ---------------------------------------------------------------------------------------


def test_macura_divergence_by_hand():
    # (0 - 2)^2 / (4 (1 + 3)) + 1/2 ln(4 / (2 sqrt 3)), and 0 if members are equal.
    p = predictions([[0, 5], [2, 5]], [[1, 2], [3, 2]])
    expected = [4 / 16 + 0.5 * math.log(4 / (2 * math.sqrt(3))), 0]
    np.testing.assert_allclose(Macura.divergence(p), expected, rtol=1e-5, atol=1e-7)


def test_macura_divergence_is_the_geometric_jensen_shannon_divergence():
    """It is half the sum of both KL divergences from the normalized geometric mean of two normals."""
    (m1, v1), (m2, v2) = (0.3, 0.5), (-1.0, 2.0)
    v = 2 / (1 / v1 + 1 / v2)
    m = v * (m1 / v1 + m2 / v2) / 2

    def kl(a, va, b, vb):
        return 0.5 * (math.log(vb / va) + (va + (a - b) ** 2) / vb - 1)

    # The dual form: the mean KL divergence of the geometric mean from each.
    expected = 0.5 * (kl(m, v, m1, v1) + kl(m, v, m2, v2))
    p = predictions([[m1], [m2]], [[v1], [v2]])
    np.testing.assert_allclose(Macura.divergence(p), [expected], rtol=1e-5)


def test_macura_divergence_is_accurate_in_float32():
    p = predictions([[0, 1e10, 1e-9], [0, -1e10, 0]], [[1e-12, 1, 1e-8], [1e12, 1, 1e-8]])
    u = np.asarray(Macura.divergence(p))
    assert np.isfinite(u).all()
    np.testing.assert_allclose(u[0], 0.5 * math.log(1e12 / 2), rtol=1e-4)
    np.testing.assert_allclose(u[1], 4e20 / 8, rtol=1e-4)


def test_macura_threshold_is_set_at_the_first_step_and_averaged_over_calls():
    r = make_rule("macura", 2, xi=0.5, zeta=100)
    state = r.init()
    far = predictions([[0, 0], [0, 4]], np.ones((2, 2)))  # u = 0 and 2
    state, output = r.apply(state, far, jnp.array(0), 3, KEY)
    np.testing.assert_array_equal(output.continue_mask, [True, False])  # threshold 0.5 x 2
    nearer = predictions([[0, 0], [0, 2.5]], np.ones((2, 2)))  # u = 0 and 0.78, still under 1
    state, output = r.apply(state, nearer, jnp.array(1), 3, KEY)
    np.testing.assert_array_equal(output.continue_mask, [True, True])
    assert state.calls == 1
    state, output = r.apply(state, nearer, jnp.array(0), 3, KEY)
    assert state.calls == 2  # thresholds 1 and 0.39, on average 0.695
    np.testing.assert_array_equal(output.continue_mask, [True, False])


@pytest.mark.parametrize("u", [math.nan, math.inf])
def test_macura_threshold_ignores_divergences_that_are_not_finite(u):
    """One prediction must not affect the threshold for as many calls as are averaged."""
    r = make_rule("macura", 3, xi=2.0, zeta=50)
    p = predictions([[0, 0, 0], [4, 6, u]], np.ones((2, 3)))  # u = 2 and 4.5; twice their median
    state, output = r.apply(r.init(), p, jnp.array(0), 3, KEY)
    np.testing.assert_allclose(state.thresholds[0], 2.0 * 3.25)
    np.testing.assert_array_equal(output.continue_mask, [True, True, False])
    # If none is finite the threshold stays.
    none = predictions(np.full((2, 3), u), np.ones((2, 3)))
    after, output = r.apply(state, none, jnp.array(0), 3, KEY)
    assert after.calls == state.calls == 1 and not output.continue_mask.any()
    np.testing.assert_array_equal(after.thresholds, state.thresholds)
    # Rollouts that have ended do not count.
    some = predictions([[0, 0, 0], [4, 6, 99]], np.ones((2, 3)), active=[True, True, False])
    state, _ = r.apply(r.init(), some, jnp.array(0), 3, KEY)
    np.testing.assert_allclose(state.thresholds[0], 2.0 * 3.25)


# --- M2AC -----------------------------------------------------------------------------------------


def test_m2ac_divergence_by_hand():
    # Member 0 against members 1 and 2: mean 2, variance (1 + 3)/2 + ((1 - 2)^2 + (3 - 2)^2)/2 = 3.
    p = predictions([[0.5], [1], [3]], [[2], [1], [3]])
    expected = 0.5 * (math.log(3 / 2) + (2 + 1.5**2) / 3 - 1)
    np.testing.assert_allclose(M2AC.divergence(p), [expected], rtol=1e-5)


@pytest.mark.parametrize(("h", "horizon", "kept"), [(0, 1, 4), (0, 3, 3), (1, 3, 2), (2, 3, 1)])
def test_m2ac_keeps_the_lowest_divergences(h, horizon, kept):
    """(H - h) / (2 (H + 1)) of eight rollouts, and half of them if H is 1."""
    r = make_rule("m2ac", 8, scale=0.25)
    p = predictions([np.zeros(8), [7, 3, 1, 0, 6, 2, 5, 4]], np.ones((2, 8)))
    _, output = r.apply(None, p, jnp.array(h), horizon, KEY)
    u = np.asarray(M2AC.divergence(p))
    assert set(np.flatnonzero(output.keep_mask)) == set(np.argsort(u)[:kept])
    assert output.continue_mask is None
    np.testing.assert_allclose(output.reward_penalty, 0.25 * u, rtol=1e-5)


def test_m2ac_keeps_the_lowest_of_the_running_rollouts():
    """At the second of three steps it is a quarter of the four running rollouts with a finite u."""
    r = make_rule("m2ac", 8)
    numbers = [0, 1, 2, 3, 7, 6, 5, math.nan]
    p = predictions([np.zeros(8), numbers], np.ones((2, 8)), active=np.arange(8) >= 3)
    _, output = r.apply(None, p, jnp.array(1), 3, KEY)
    np.testing.assert_array_equal(np.flatnonzero(output.keep_mask), [3])


# --- Infoprop -------------------------------------------------------------------------------------


def test_infoprop_sample_and_loss_by_hand():
    # v = 1 / mean(1, 1/3) = 1.5; m = 1.5 mean(0, 2/3) = 0.5; eps = mean(0.25, 2.25) = 1.25
    r = make_rule("infoprop", 1)
    p = predictions([[0], [2]], [[1], [3]], sample=[1.3])
    m, gain, left, loss = (float(x[0, 0]) for x in r._common(p))
    assert (m, gain, left) == pytest.approx((0.5, 1.5 / 2.75, 1.5 * 1.25 / 2.75), rel=1e-5)
    bits = 0.5 * math.log2(2 * math.pi * math.e * left) - math.log2(1e-6)
    assert loss == pytest.approx(bits, rel=1e-5)
    samples = [float(r.sample(p, jnp.array(0), key)[0, 0]) for key in jax.random.split(KEY, 300)]
    expected = stats.norm(m + gain * (1.3 - m), math.sqrt(left))
    assert stats.kstest(samples, expected.cdf).pvalue > 1e-3


def test_infoprop_loses_no_information_if_members_agree():
    r = make_rule("infoprop", 2)
    p = predictions([[1, 1], [1, 1]], [[1e-8, 1e8], [1e-8, 1e8]], sample=[0.5, 3])
    np.testing.assert_array_equal(r._common(p)[-1], 0)
    sample = r.sample(p, jnp.array(0), KEY)
    np.testing.assert_allclose(sample[:, 0], [0.5, 3], rtol=1e-5)


def test_infoprop_ends_rollouts_by_one_loss_or_by_the_sum():
    r = make_rule("infoprop", 3, longest=2.0)
    p = predictions([[0, 0, 0], [0, 1e-3, 10]], np.ones((2, 3)))
    loss = np.asarray(r._common(p)[-1])[:, 0]
    assert 0 == loss[0] < loss[1] < loss[2]
    limit = InfopropState(
        jnp.array([(loss[1] + loss[2]) / 2]), jnp.array([0.75 * loss[1]]), r.init().spent
    )
    state, output = r.apply(limit, p, jnp.array(0), 5, KEY)
    np.testing.assert_array_equal(output.continue_mask, [True, True, False])
    state, output = r.apply(state, p, jnp.array(1), 5, KEY)  # 2 x loss > 2 x 0.75 x loss
    np.testing.assert_array_equal(output.continue_mask, [True, False, False])
    _, output = r.apply(state, p, jnp.array(0), 5, KEY)  # the sums of a new call start at 0
    np.testing.assert_array_equal(output.continue_mask, [True, True, False])


def test_infoprop_is_calibrated_without_padding():
    r = make_rule("infoprop", 4, high=1.0, low=0.0)
    p = predictions([np.zeros(4), [1, 2, 3, 1000]], np.ones((2, 4)))
    state = r.calibrate(r.init(), p, jnp.array([1.0, 1, 1, 0]))
    loss = np.asarray(r._common(p)[-1])[:, 0]
    np.testing.assert_allclose(state.high, [loss[2]])
    np.testing.assert_allclose(state.low, [loss[0]])


# --- Uncertainty weight ---------------------------------------------------------------------------


def test_uncertainty_weight_by_hand():
    mean = np.array([[[1.0, 0.0, 2.0]], [[3.0, 4.0, 8.0]]])  # two dimensions, then the reward
    r, p = make_rule("uncertainty_weight", 1, dims=3), predictions(mean, np.ones_like(mean))
    _, output = r.apply(None, p, jnp.array(0), 1, KEY)
    # std 1, 2 and 3: sigma = 3 + (1 + 2) / 2
    np.testing.assert_allclose(output.weight, [1 / 5.5], rtol=1e-6)
    np.testing.assert_allclose(r.sample(p, jnp.array(0), KEY), [[2, 2, 5]])


def test_uncertainty_weight_refuses_variants_that_differ_in_the_noise_only():
    vary = {"rollout.state_noise": [0, 1]}
    make_config("cheetah-run", vary=vary)
    with pytest.raises(UsageError, match=r"^--vary rollout\.state_noise: .* without noise"):
        make_config("cheetah-run", trust="uncertainty_weight", vary=vary)


# --- Value weight ---------------------------------------------------------------------------------


def with_values(p, current):
    """Return predictions whose TD target is the first target plus ten times the last."""
    return p._replace(
        values=Values(lambda z: z[:, 0] + 10 * z[:, -1], jnp.asarray(current, jnp.float32))
    )


def test_value_weight_by_hand():
    r = make_rule("value_weight", 4)
    truth = np.array([0.0, 1.0, 2.0, 50.0])
    off = np.array([[0.1, -0.1, 0.1, 7.0], [0.3, 0.0, -0.3, 7.0]])
    p = predictions(truth + off, np.ones((2, 4)), sample=truth)
    p = p._replace(sample=jnp.asarray(truth, jnp.float32)[:, None])
    mask = jnp.array([1.0, 1, 1, 0])
    state = r.calibrate(r.init(), with_values(p, [0, 0, 0, 0]), mask)
    y = 11 * truth[:3]
    expected = np.mean([np.var(11 * row[:3]) for row in off]) / np.var(y)
    np.testing.assert_allclose(state.error, expected, rtol=1e-5)
    np.testing.assert_allclose(state.td_variance, np.var(y), rtol=1e-6)
    _, output = r.apply(state, p, jnp.array(0), 1, KEY)
    np.testing.assert_allclose(output.weight, np.full(4, 1 / (1 + expected)), rtol=1e-6)
    linear = make_rule("value_weight", 4, form="linear")
    far = state._replace(error=jnp.array(1.5))
    np.testing.assert_array_equal(linear.apply(far, p, jnp.array(0), 1, KEY)[1].weight, 0)
    np.testing.assert_allclose(
        linear.apply(state, p, jnp.array(0), 1, KEY)[1].weight, 1 - expected, rtol=1e-6
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout.real_fraction": 0.001},
        {"rollout.source": "none"},
        {
            "rollout.source": "buffered",
            "rollout.real_fraction": 0.0,
            "source.regenerate_every": 1000,
        },
    ],
)
def test_value_weight_refuses_one_weight_for_all_transitions(settings):
    arguments = {"algo": "dynajax", "trust": "value_weight"}
    with pytest.raises(
        UsageError, match=r"^--trust=value_weight: with --set rollout\..*same weight"
    ):
        make_config("cheetah-run", **arguments, settings=settings)
    make_config("cheetah-run", **arguments, settings=settings | {"trust.per_transition": True})
    make_config("cheetah-run", **arguments)
    # A buffer keeps the weights of several fits; real transitions of their own updates have weight 1.
    buffered = {"rollout.source": "buffered", "rollout.real_fraction": 0.0}
    for other in (buffered, {"rollout.mixing": "separate"}):
        make_config("cheetah-run", **arguments, settings=other)


def test_value_weight_of_each_transition_is_by_the_members_disagreement():
    r = make_rule("value_weight", 3, per_transition=True)
    p = with_values(predictions([[1, 0, np.inf], [1, 2, 0]], np.ones((2, 3))), [0, 0, 0])
    state = r.init()._replace(td_variance=jnp.array(11.0**2))
    _, output = r.apply(state, p, jnp.array(0), 1, KEY)
    # The second one's TD targets are 0 and 22: variance 11^2, as that of the TD errors.
    np.testing.assert_allclose(output.weight, [1, 0.5, 0], rtol=1e-6)


def test_value_weight_of_a_model_without_error_is_one():
    r = make_rule("value_weight", 2)
    p = with_values(predictions([[3, 3], [3, 3]], np.ones((2, 2))), [0, 0])
    state = r.calibrate(r.init(), p, jnp.ones(2))  # the targets have no variance either
    np.testing.assert_array_equal(r.apply(state, p, jnp.array(0), 1, KEY)[1].weight, 1)


# --- All rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [100.3, 1e8])
def test_equal_predictions_far_from_zero_are_no_disagreement(far):
    """The float32 mean of seven equal numbers may differ from them."""
    rng = np.random.default_rng(0)
    variance = np.broadcast_to(np.exp(rng.uniform(-20, 0, (1, 4, 2))), (7, 4, 2))
    p = predictions(np.full((7, 4, 2), far), variance)
    m, gain, _, loss = make_rule("infoprop", 4, 2)._common(p)
    np.testing.assert_array_equal(loss, 0)
    np.testing.assert_array_equal(gain, 1)
    np.testing.assert_array_equal(m, np.float32(far))
    np.testing.assert_allclose(M2AC.divergence(p), 0, atol=1e-5)
    weight = make_rule("uncertainty_weight", 4, 2)
    np.testing.assert_array_equal(weight.apply(None, p, jnp.array(0), 1, KEY)[1].weight, 1)
    np.testing.assert_array_equal(weight.sample(p, jnp.array(0), KEY), np.float32(far))
    penalty = make_rule("penalty", 4, 2, kind="epistemic")
    _, output = penalty.apply(None, p, jnp.array(0), 1, KEY)
    np.testing.assert_array_equal(output.reward_penalty, 0)


@pytest.mark.parametrize("name", ["macura", "m2ac", "infoprop", "uncertainty_weight", "penalty"])
def test_rules_detect_where_one_member_is_wrong(name):
    """Three members predict a linear system; one of them is wrong if the state is large."""
    rng = np.random.default_rng(0)
    state = rng.uniform(-1, 1, 64)
    wrong = np.abs(state) > 0.7
    right = np.stack([0.9 * state, 0.5 * state], -1)
    mean = np.stack([right + rng.normal(0, 0.01, right.shape) for _ in range(3)])
    mean[2, wrong] += 2.0
    fields = {"kind": "epistemic"} if name == "penalty" else {}
    r = make_rule(name, 64, dims=2, **fields)
    p = predictions(mean, np.full(mean.shape, 0.01), member=rng.integers(0, 3, 64), sample=None)
    held = predictions(mean[:, ~wrong], np.full(mean[:, ~wrong].shape, 0.01))
    state_of_rule = r.calibrate(r.init(), held, jnp.ones((~wrong).sum()))
    if name == "macura":  # the percentile of the correct predictions
        r = make_rule(name, 64, dims=2, xi=2.0, zeta=100 * (~wrong).mean() - 1)
    _, output = r.apply(state_of_rule, p, jnp.array(0), 1, KEY)
    if name == "macura":
        np.testing.assert_array_equal(output.continue_mask, ~wrong)
    elif name == "infoprop":  # its low quantile ends a few of the others too
        assert not np.asarray(output.continue_mask)[wrong].any()
        assert np.asarray(output.continue_mask)[~wrong].mean() > 0.9
    elif name == "m2ac":
        assert not np.asarray(output.keep_mask)[wrong].any()
    else:
        values = np.asarray(
            output.weight if name == "uncertainty_weight" else -output.reward_penalty
        )
        assert values[wrong].max() < values[~wrong].min()


def test_macura_averages_the_last_thresholds_only(monkeypatch):
    monkeypatch.setattr(Macura, "CALLS", 3)
    rule = make_rule("macura", 2, xi=1.0, zeta=100)
    state = rule.init()
    for gap in (2, 4, 6, 8, 10):  # u = gap^2 / 8
        p = predictions([[0, 0], [0, gap]], np.ones((2, 2)))
        state, _ = rule.apply(state, p, jnp.array(0), 3, KEY)
    assert state.calls == 5
    threshold = np.mean([36, 64, 100]) / 8
    for u, continues in ((0.99 * threshold, True), (1.01 * threshold, False)):
        p = predictions([[0, 0], [0, np.sqrt(8 * u)]], np.ones((2, 2)))
        _, output = rule.apply(state, p, jnp.array(1), 3, KEY)
        assert output.continue_mask[1] == continues


def test_value_weight_compares_with_the_variance_of_td_errors():
    rule, truth = make_rule("value_weight", 3), np.array([0.0, 1.0, 2.0])
    p = predictions(np.stack([truth, truth]), np.ones((2, 3)))
    current = [1.0, -2.0, 5.0]
    state = rule.calibrate(rule.init(), with_values(p, current), jnp.ones(3))
    np.testing.assert_allclose(state.td_variance, np.var(11 * truth - current), rtol=1e-6)
