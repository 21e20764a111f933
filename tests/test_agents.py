"""Test SimBa and BRO: one update of each against NumPy in float64, statistics, resets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import settings
from dynajax.agents import AGENTS, make_agent
from dynajax.agents.bro import quantile_loss
from dynajax.networks import normalization
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


def random_batch(seed):
    rng = np.random.default_rng(seed)
    leaves = (
        rng.normal(2.0, 3.0, (B, D)),
        rng.uniform(-1, 1, (B, A)),
        rng.normal(size=B),
        (rng.random(B) > 0.3).astype(float),
        rng.normal(2.0, 3.0, (B, D)),
    )
    return Transition(*(jnp.asarray(x, jnp.float32) for x in leaves))


def with_statistics(agent, state, count=40):
    """Return the state after observations far from zero, one of them invalid, and the valid ones."""
    rng = np.random.default_rng(3)
    obs = rng.normal(2.0, 3.0, (count, D)).astype(np.float32)
    obs[7] = np.nan
    for o in obs:
        state = agent.update_obs_statistics(state, jnp.asarray(o), jnp.isfinite(o).all())
    return state, np.delete(obs, 7, 0)


# --- A second implementation in NumPy -------------------------------------------------------------


def layer_norm(p, x):
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return z * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def simba(p, x):
    x = dense(p["embed"], x)
    for i in range(sum(name.startswith("wide") for name in p)):
        branch = np.maximum(dense(p[f"wide_{i}"], layer_norm(p[f"norm_{i}"], x)), 0)
        x = x + dense(p[f"narrow_{i}"], branch)
    return dense(p["head"], layer_norm(p["norm"], x))


def bronet(p, x):
    x = np.maximum(layer_norm(p["norm"], dense(p["embed"], x)), 0)
    for i in range(sum(name.startswith("second_norm") for name in p)):
        branch = np.maximum(layer_norm(p[f"first_norm_{i}"], dense(p[f"first_{i}"], x)), 0)
        x = x + layer_norm(p[f"second_norm_{i}"], dense(p[f"second_{i}"], branch))
    return dense(p["head"], x)


def sample_policy(net, p, obs, noise):
    mean, raw = np.split(net(p, obs), 2, -1)
    log_std = -10 + 6 * (1 + np.tanh(raw))
    u = mean + np.exp(log_std) * noise
    gaussian = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    squash = np.log(1 - np.tanh(u) ** 2)
    return np.tanh(u), (gaussian - squash).sum(-1)


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def numeric_gradient(loss, params, path, step=1e-6):
    """Return the central differences of a loss with respect to one array of `params`."""
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
    """Return parameters after the first step of AdamW."""
    return params - rate * (gradient / (np.abs(gradient) + 1e-8) + decay * params)


@pytest.mark.parametrize("critics", [1, 2])
def test_simba_update_equals_numpy(critics):
    agent = make("simba", **{"agent.critics": critics})
    state, obs = with_statistics(agent, agent.init(jax.random.PRNGKey(0)))
    batch, noise = random_batch(1), agent.noise(jax.random.PRNGKey(2), 1)[0]
    after, metrics = jax.jit(agent.update)(state, batch, jnp.ones(B), jnp.ones(B), noise)

    mean, std = obs.astype(float).mean(0), obs.astype(float).std(0)
    b, n = as_float64(batch), np.asarray(noise, np.float64)
    now, then = (b.obs - mean) / std, (b.next_obs - mean) / std
    old, new = as_float64(state), as_float64(after)

    def q(params, o, a):
        each = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(critics)]
        return np.stack([simba(p, np.concatenate([o, a], -1))[:, 0] for p in each])

    next_action, next_log = sample_policy(simba, old.actor, then, n[0])
    y = b.reward + 0.9 * b.discount * (
        q(old.target_critic, then, next_action).min(0) - 0.3 * next_log
    )

    def critic_loss(params):
        return ((q(params, now, b.action) - y) ** 2).sum(0).mean()

    def actor_loss(params):
        action, log_prob = sample_policy(simba, params, now, n[1])
        return (0.3 * log_prob - q(new.critic, now, action).min(0)).mean()

    assert metrics["critic_loss"] == pytest.approx(critic_loss(old.critic), rel=1e-4)
    assert metrics["actor_loss"] == pytest.approx(actor_loss(old.actor), rel=1e-3)
    for path in (("embed", "kernel"), ("wide_0", "kernel"), ("norm", "scale"), ("head", "bias")):
        for part, loss in (("critic", critic_loss), ("actor", actor_loss)):
            before, reached = (getattr(s, part)[path[0]][path[1]] for s in (old, new))
            gradient = numeric_gradient(loss, getattr(old, part), path)
            # Adam's first step has the sign of the gradient, which for others is that of rounding.
            clear = np.abs(gradient) > 1e-5
            assert clear.any()
            np.testing.assert_allclose(
                reached[clear], adamw(gradient, before)[clear], rtol=2e-3, atol=2e-5
            )
    slow = old.target_critic["head"]["kernel"]
    moved = slow + 0.1 * (new.critic["head"]["kernel"] - slow)
    np.testing.assert_allclose(new.target_critic["head"]["kernel"], moved, rtol=1e-4, atol=1e-6)
    # Updates do not change the statistics.
    jax.tree.map(np.testing.assert_array_equal, state.observations, after.observations)


def test_bro_update_equals_numpy():
    agent = make("bro", **{"agent.quantiles": 4, "agent.actor_width": 4})
    state = agent.init(jax.random.PRNGKey(0))
    batch, noise = random_batch(1), agent.noise(jax.random.PRNGKey(2), 1)[0]
    after, metrics = jax.jit(agent.update)(state, batch, jnp.ones(B), jnp.ones(B), noise)
    b, n, old, new = (
        as_float64(batch),
        np.asarray(noise, np.float64),
        as_float64(state),
        as_float64(after),
    )

    def q(params, o, a):
        each = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(2)]
        return np.stack([bronet(p, np.concatenate([o, a], -1)) for p in each])

    next_action, next_log = sample_policy(bronet, old.actor, b.next_obs, n[0])
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
        action, log_prob = sample_policy(bronet, params, b.obs, n[1])
        return (0.3 * log_prob - q(new.critic, b.obs, action).mean((0, 2))).mean()

    assert metrics["critic_loss"] == pytest.approx(critic_loss(old.critic), rel=1e-4)
    assert metrics["actor_loss"] == pytest.approx(actor_loss(old.actor), rel=1e-3)
    for part, loss in (("critic", critic_loss), ("actor", actor_loss)):
        path = ("second_0", "kernel")
        before, reached = (getattr(s, part)[path[0]][path[1]] for s in (old, new))
        gradient = numeric_gradient(loss, getattr(old, part), path)
        clear = np.abs(gradient) > 1e-4
        assert clear.any()
        np.testing.assert_allclose(
            reached[clear], adamw(gradient, before)[clear], rtol=2e-3, atol=2e-5
        )


def test_quantile_loss_is_minimal_at_the_quantiles_of_the_targets():
    targets = jnp.asarray(np.random.default_rng(0).permutation(np.arange(1000.0))[None])
    levels = (np.arange(4) + 0.5) / 4
    quantiles = jnp.asarray(1000 * levels - 0.5, jnp.float32)[None, None]
    ones = jnp.ones(len(targets))
    minimum = quantile_loss(quantiles, targets, ones, ones)
    for shift in (-100.0, -30.0, 30.0, 100.0):
        assert quantile_loss(quantiles + shift, targets, ones, ones) > minimum


# --- Weights, statistics, resets ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sac", "simba", "bro"])
def test_transitions_of_weight_zero_have_no_effect(name):
    names = {field.name for field in dataclasses.fields(AGENTS[name].Fields)}
    small = {p: v for p, v in SMALL_NETS.items() if p.split(".")[1] in names}
    shared = {"learn.batch": B, "learn.discount": 0.9}
    if name == "sac":
        small["agent.hidden"] = (6, 6)
    agent = make_agent(
        settings.make("walk", algo="model-free", agent=name, settings=small | shared), SPEC
    )
    state, noise = agent.init(jax.random.PRNGKey(0)), agent.noise(jax.random.PRNGKey(2), 1)[0]
    batch, weight = random_batch(1), jnp.array([1.0, 1, 1, 0, 0])
    other = jax.tree.map(lambda x: x.at[3:].set(77.0), batch)
    update = jax.jit(agent.update)
    one, two = (update(state, b, weight, weight, noise)[0] for b in (batch, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_statistics_of_valid_observations_survive_a_reset():
    agent = make("simba")
    state, obs = with_statistics(agent, agent.init(jax.random.PRNGKey(0)))
    normal = agent.normalize_obs(state, jnp.asarray(obs))
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(normal.std(0), 1, rtol=1e-4)
    after_reset = agent.reset(state, jax.random.PRNGKey(9))
    jax.tree.map(np.testing.assert_array_equal, after_reset.observations, state.observations)
    assert not np.allclose(after_reset.actor["embed"]["kernel"], state.actor["embed"]["kernel"])


@pytest.mark.parametrize("far", [0.0, 100.0, 1e4])
def test_statistics_are_accurate_after_a_late_change_far_from_zero(far):
    """One late observation moves the mean by less than float32 can add to it."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=100_000) + np.repeat([far, far + 1], 50_000)
    obs = obs.astype(np.float32)[:, None]

    def add(statistics, obs):
        return normalization.update(statistics, obs, jnp.array(True)), None

    statistics, _ = jax.lax.scan(add, normalization.init(1), obs)
    true = obs.astype(np.float64)
    deviation = true.std()
    np.testing.assert_allclose(normalization.std(statistics), [deviation], rtol=1e-3)
    mean = np.float32(true.mean())
    expected = (float(mean) - true.mean()) / deviation
    normalized = normalization.normalize(statistics, jnp.array([mean]), 10.0)
    np.testing.assert_allclose(normalized, [expected], atol=1e-3)


@pytest.mark.parametrize("unit", [1e-7, 1e-12, 1e6])
def test_normalized_observations_do_not_depend_on_units(unit):
    obs = np.float32(np.random.default_rng(0).normal(3, 1, (50, 2)))

    def normalized(obs):
        def add(statistics, obs):
            return normalization.update(statistics, obs, jnp.array(True)), None

        statistics, _ = jax.lax.scan(add, normalization.init(2), obs)
        return normalization.normalize(statistics, obs, 10.0)

    np.testing.assert_allclose(
        normalized(jnp.float32(unit * obs)), normalized(jnp.asarray(obs)), rtol=1e-3, atol=1e-4
    )


def test_constant_dimension_keeps_its_unit():
    statistics = normalization.init(2)
    for t in range(1000):
        obs = jnp.array([1234.567, float(t % 2)])
        statistics = normalization.update(statistics, obs, jnp.array(True))
    same = normalization.normalize(statistics, jnp.array([1234.567, 1.0]), 10.0)
    np.testing.assert_allclose(same, [0, 1], atol=1e-2)
    moved = normalization.normalize(statistics, jnp.array([1235.567, 1e9]), 10.0)
    np.testing.assert_allclose(moved, [1, 10], atol=1e-2)


@pytest.mark.parametrize("name", ["simba", "bro"])
def test_exported_policy_has_the_same_actions(name):
    agent = make(name)
    state, obs = with_statistics(agent, agent.init(jax.random.PRNGKey(0)))
    exported = agent.policy(state)
    assert exported.critic is None and exported.target_critic is None
    np.testing.assert_array_equal(
        agent.deterministic_action(exported, obs), agent.deterministic_action(state, obs)
    )


def test_subclass_whose_act_reads_critics_gets_the_whole_state():
    class Greedy(AGENTS["simba"]):
        def act(self, state, obs, noise):
            action, log_prob = super().act(state, obs, noise)
            return action * jnp.isfinite(self.value(state, obs, action)).all(0)[..., None], log_prob

    sac = make("simba")
    for agent, is_whole in ((sac, False), (Greedy(sac.learn, sac.config, SPEC), True)):
        state = agent.init(jax.random.PRNGKey(0))
        part = agent.acting_part(state)
        assert (part.critic is not None) == is_whole
        action, _ = agent.act(part, jnp.ones(D), jnp.zeros(A))
        assert action.shape == (A,)


def test_temperature_of_bro_has_its_own_momentum():
    optimizer = make("bro").temperature_optimizer
    state = optimizer.init(jnp.zeros(()))
    for gradient in (1.0, 0.0):
        _, state = optimizer.update(jnp.array(gradient), state)
    np.testing.assert_allclose(state[0].mu, 0.5 * 0.5)
