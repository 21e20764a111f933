"""SimBa and BRO: an update of each against numpy in float64, statistics, resets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import nets, settings
from dynajax.agents import AGENTS, make_agent
from dynajax.agents.bro import quantile_loss
from dynajax.types import EnvSpec, Transition

D, A, B = 3, 2, 5
SPEC = EnvSpec("walk", D, A, 50, ("x", "y", "z"), None)
SMALL_NETS = {
    "agent.actor_width": 4,
    "agent.critic_width": 6,
    "agent.critic_blocks": 1,
    "agent.learning_rate": 0.01,
    "agent.weight_decay": 0.1,
    "agent.polyak": 0.1,
    "agent.initial_temperature": 0.3,
    "learn.batch": B,
    "learn.discount": 0.9,
}


def make(name, **more):
    config = settings.make("walk", algo="model-free", agent=name, settings=SMALL_NETS | more)
    return make_agent(config, SPEC)


def batch_of(seed):
    rng = np.random.default_rng(seed)
    leaves = (
        rng.normal(2.0, 3.0, (B, D)),
        rng.uniform(-1, 1, (B, A)),
        rng.normal(size=B),
        (rng.random(B) > 0.3).astype(float),
        rng.normal(2.0, 3.0, (B, D)),
    )
    return Transition(*(jnp.asarray(x, jnp.float32) for x in leaves))


def seen(agent, state, count=40):
    """The state after some observations, far from zero, one of them not valid."""
    rng = np.random.default_rng(3)
    obs = rng.normal(2.0, 3.0, (count, D)).astype(np.float32)
    obs[7] = np.nan
    for o in obs:
        state = agent.update_obs_statistics(state, jnp.asarray(o), jnp.isfinite(o).all())
    return state, np.delete(obs, 7, 0)


# --- a second implementation, in numpy ----------------------------------------------------------


def norm(p, x):
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return z * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def simba(p, x):
    x = dense(p["embed"], x)
    for i in range(sum(name.startswith("wide") for name in p)):
        branch = np.maximum(dense(p[f"wide_{i}"], norm(p[f"norm_{i}"], x)), 0)
        x = x + dense(p[f"narrow_{i}"], branch)
    return dense(p["head"], norm(p["norm"], x))


def bronet(p, x):
    x = np.maximum(norm(p["norm"], dense(p["embed"], x)), 0)
    for i in range(sum(name.startswith("second_norm") for name in p)):
        branch = np.maximum(norm(p[f"first_norm_{i}"], dense(p[f"first_{i}"], x)), 0)
        x = x + norm(p[f"second_norm_{i}"], dense(p[f"second_{i}"], branch))
    return dense(p["head"], x)


def policy(net, p, obs, noise):
    mean, raw = np.split(net(p, obs), 2, -1)
    log_std = -10 + 6 * (1 + np.tanh(raw))
    u = mean + np.exp(log_std) * noise
    gaussian = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    squash = np.log(1 - np.tanh(u) ** 2)
    return np.tanh(u), (gaussian - squash).sum(-1)


def numpy_of(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def numeric(loss, params, path, step=1e-6):
    """Central differences of a loss with respect to one array of `params`."""
    array = params
    for name in path:
        array = array[name]
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        old = array[index]
        array[index] = old + step
        high = loss(params)
        array[index] = old - step
        gradient[index] = (high - loss(params)) / (2 * step)
        array[index] = old
    return gradient


def adamw(gradient, params, rate=0.01, decay=0.1):
    """The first step of AdamW."""
    return params - rate * (gradient / (np.abs(gradient) + 1e-8) + decay * params)


@pytest.mark.parametrize("critics", [1, 2])
def test_a_simba_update_by_numpy(critics):
    agent = make("simba", **{"agent.critics": critics})
    state, obs = seen(agent, agent.init(jax.random.PRNGKey(0)))
    batch, noise = batch_of(1), agent.noise(jax.random.PRNGKey(2), 1)[0]
    after, metrics = jax.jit(agent.update)(state, batch, None, None, noise)

    mean, std = obs.astype(float).mean(0), obs.astype(float).std(0)
    b, n = numpy_of(batch), np.asarray(noise, np.float64)
    now, then = (b.obs - mean) / std, (b.next_obs - mean) / std
    old, new = numpy_of(state), numpy_of(after)

    def q(params, o, a):
        each = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(critics)]
        return np.stack([simba(p, np.concatenate([o, a], -1))[:, 0] for p in each])

    next_action, next_log = policy(simba, old.actor, then, n[0])
    y = b.reward + 0.9 * b.discount * (
        q(old.target_critic, then, next_action).min(0) - 0.3 * next_log
    )

    def critic_loss(params):
        return ((q(params, now, b.action) - y) ** 2).sum(0).mean()

    def actor_loss(params):
        action, log_prob = policy(simba, params, now, n[1])
        return (0.3 * log_prob - q(new.critic, now, action).min(0)).mean()

    assert metrics["critic_loss"] == pytest.approx(critic_loss(old.critic), rel=1e-4)
    assert metrics["actor_loss"] == pytest.approx(actor_loss(old.actor), rel=1e-3)
    for path in (("embed", "kernel"), ("wide_0", "kernel"), ("norm", "scale"), ("head", "bias")):
        for part, loss in (("critic", critic_loss), ("actor", actor_loss)):
            before, reached = (getattr(s, part)[path[0]][path[1]] for s in (old, new))
            gradient = numeric(loss, getattr(old, part), path)
            clear = np.abs(gradient) > 1e-5  # of others Adam's first step has the sign of rounding
            assert clear.any()
            np.testing.assert_allclose(
                reached[clear], adamw(gradient, before)[clear], rtol=2e-3, atol=2e-5
            )
    slow = old.target_critic["head"]["kernel"]
    moved = slow + 0.1 * (new.critic["head"]["kernel"] - slow)
    np.testing.assert_allclose(new.target_critic["head"]["kernel"], moved, rtol=1e-4, atol=1e-6)
    # Updates never move the statistics.
    jax.tree.map(np.testing.assert_array_equal, state.observations, after.observations)


def test_a_bro_update_by_numpy():
    agent = make("bro", **{"agent.quantiles": 4, "agent.actor_width": 4})
    state = agent.init(jax.random.PRNGKey(0))
    batch, noise = batch_of(1), agent.noise(jax.random.PRNGKey(2), 1)[0]
    after, metrics = jax.jit(agent.update)(state, batch, None, None, noise)
    b, n, old, new = (
        numpy_of(batch),
        np.asarray(noise, np.float64),
        numpy_of(state),
        numpy_of(after),
    )

    def q(params, o, a):
        each = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(2)]
        return np.stack([bronet(p, np.concatenate([o, a], -1)) for p in each])

    next_action, next_log = policy(bronet, old.actor, b.next_obs, n[0])
    next_q = q(old.target_critic, b.next_obs, next_action).mean(0) - 0.3 * next_log[:, None]
    y = b.reward[:, None] + 0.9 * b.discount[:, None] * next_q
    levels = np.array([0.125, 0.375, 0.625, 0.875])

    def critic_loss(params):
        total = 0.0
        for outputs in q(params, b.obs, b.action):
            for i, level in enumerate(levels):
                error = y - outputs[:, i : i + 1]
                huber = np.where(abs(error) <= 1, error**2 / 2, abs(error) - 0.5)
                total += (abs(level - (error < 0)) * huber).mean()
        return total

    def actor_loss(params):
        action, log_prob = policy(bronet, params, b.obs, n[1])
        return (0.3 * log_prob - q(new.critic, b.obs, action).mean((0, 2))).mean()

    assert metrics["critic_loss"] == pytest.approx(critic_loss(old.critic), rel=1e-4)
    assert metrics["actor_loss"] == pytest.approx(actor_loss(old.actor), rel=1e-3)
    for part, loss in (("critic", critic_loss), ("actor", actor_loss)):
        path = ("second_0", "kernel")
        before, reached = (getattr(s, part)[path[0]][path[1]] for s in (old, new))
        gradient = numeric(loss, getattr(old, part), path)
        clear = np.abs(gradient) > 1e-4
        assert clear.any()
        np.testing.assert_allclose(
            reached[clear], adamw(gradient, before)[clear], rtol=2e-3, atol=2e-5
        )


def test_quantiles_of_a_known_distribution_have_no_gradient():
    """The loss is least where the quantiles are those of the targets."""
    targets = jnp.asarray(np.random.default_rng(0).permutation(np.arange(1000.0))[None])
    levels = (np.arange(4) + 0.5) / 4
    right = jnp.asarray(1000 * levels - 0.5, jnp.float32)[None, None]
    least = quantile_loss(right, targets)
    for shift in (-100.0, -30.0, 30.0, 100.0):
        assert quantile_loss(right + shift, targets) > least


# --- weights, statistics, resets ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["sac", "simba", "bro"])
def test_what_weighs_nothing_teaches_nothing(name):
    names = dataclasses.fields(AGENTS[name].Fields)
    small = {p: v for p, v in SMALL_NETS.items() if p.split(".")[1] in {f.name for f in names}}
    shared = {"learn.batch": B, "learn.discount": 0.9}
    if name == "sac":
        small["agent.hidden"] = (6, 6)
    agent = make_agent(
        settings.make("walk", algo="model-free", agent=name, settings=small | shared), SPEC
    )
    state, noise = agent.init(jax.random.PRNGKey(0)), agent.noise(jax.random.PRNGKey(2), 1)[0]
    batch, weight = batch_of(1), jnp.array([1.0, 1, 1, 0, 0])
    other = jax.tree.map(lambda x: x.at[3:].set(77.0), batch)
    update = jax.jit(agent.update)
    one, two = (update(state, b, weight, weight, noise)[0] for b in (batch, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    plain, ones = (update(state, batch, w, w, noise)[0] for w in (None, jnp.ones(B)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, ones)


def test_statistics_are_those_of_valid_observations():
    agent = make("simba")
    state, obs = seen(agent, agent.init(jax.random.PRNGKey(0)))
    normal = agent.normalize_obs(state, jnp.asarray(obs))
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(normal.std(0), 1, rtol=1e-4)
    fresh = agent.reset(state, jax.random.PRNGKey(9))
    jax.tree.map(np.testing.assert_array_equal, fresh.observations, state.observations)
    assert not np.allclose(fresh.actor["embed"]["kernel"], state.actor["embed"]["kernel"])


@pytest.mark.parametrize("far", [0.0, 100.0, 1e4])
def test_statistics_follow_a_late_change_far_from_zero(far):
    """Where one observation moves a mean by less than float32 can add to it."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=100_000) + np.repeat([far, far + 1], 50_000)
    obs = obs.astype(np.float32)[:, None]

    def one(statistics, obs):
        return nets.observed(statistics, obs, jnp.array(True)), None

    statistics, _ = jax.lax.scan(one, nets.init_statistics(1), obs)
    true = obs.astype(np.float64)
    deviation = true.std()
    np.testing.assert_allclose(nets.spread(statistics), [deviation], rtol=1e-3)
    middle = np.float32(true.mean())
    expected = (float(middle) - true.mean()) / deviation
    seen = nets.standardise(statistics, jnp.array([middle]), 10.0)
    np.testing.assert_allclose(seen, [expected], atol=1e-3)


def test_a_constant_channel_is_harmless():
    statistics = nets.init_statistics(2)
    for t in range(1000):
        obs = jnp.array([1234.567, float(t % 2)])
        statistics = nets.observed(statistics, obs, jnp.array(True))
    same = nets.standardise(statistics, jnp.array([1234.567, 1.0]), 10.0)
    np.testing.assert_allclose(same, [0, 1], atol=1e-2)
    moved = nets.standardise(statistics, jnp.array([1235.567, 1e9]), 10.0)
    np.testing.assert_allclose(moved, [1, 10], atol=1e-2)


def test_an_exported_policy_acts_alike():
    for name in ("simba", "bro"):
        agent = make(name)
        state, obs = seen(agent, agent.init(jax.random.PRNGKey(0)))
        alone = agent.policy(state)
        assert alone.critic is None and alone.target_critic is None
        np.testing.assert_array_equal(
            agent.deterministic_action(alone, obs), agent.deterministic_action(state, obs)
        )
