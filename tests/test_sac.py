"""Test Soft Actor-Critic by hand, with SciPy, and against a second implementation in NumPy."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dynajax.agents import sac
from dynajax.agents.sac import SAC, SACFields
from dynajax.config import LearnConfig
from dynajax.networks.initializers import orthogonal
from dynajax.types import EnvSpec, Transition
from jaxprs import equations

D, A, B = 3, 2, 6
KEY = jax.random.PRNGKey(0)
SPEC = EnvSpec("walk", D, A, 50, ("x", "y", "z"), None)
AGENT = SAC(
    LearnConfig(batch=B, discount=0.9),
    SACFields(hidden=(8, 8), learning_rate=0.01, polyak=0.1, initial_temperature=0.3),
    SPEC,
)
# Jitted once for the module.
update = jax.jit(AGENT.update)
init = jax.jit(AGENT.init)


def random_batch(seed: int, size: int = B) -> Transition:
    rng = np.random.default_rng(seed)
    return Transition(
        obs=rng.normal(size=(size, D)).astype(np.float32),
        action=rng.uniform(-1, 1, (size, A)).astype(np.float32),
        reward=rng.normal(size=size).astype(np.float32),
        discount=(rng.random(size) > 0.3).astype(np.float32),
        next_obs=rng.normal(size=(size, D)).astype(np.float32),
    )


# --- Formulas by hand -----------------------------------------------------------------------------


def test_td_target_by_hand():
    zeros = np.zeros((3, 1))
    batch = Transition(zeros, zeros, np.array([1.0, 1.0, -2.0]), np.array([1.0, 0.0, 1.0]), zeros)
    next_q = np.array([[4.0, 4.0, -1.0], [6.0, 6.0, -3.0]])
    log_prob = np.array([2.0, 2.0, -4.0])
    # 1 + 0.5 (4 - 0.25 * 2); at a termination only the reward; -2 + 0.5 (-3 + 0.25 * 4)
    expected = [2.75, 1.0, -3.0]
    np.testing.assert_allclose(sac.td_target(0.5, batch, next_q.min(0), 0.25, log_prob), expected)


def test_critic_loss_is_the_sum_over_both_critics():
    q = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    # Critic 1: 1 and 0; critic 2: 1 and 9; the mean over both transitions of 2 and 9.
    mask = jnp.ones(2)
    assert sac.critic_loss(q, jnp.array([2.0, 2.0]), mask, mask) == 5.5


def test_actor_loss_by_hand():
    q = jnp.array([[1.0, 2.0], [3.0, -2.0]])
    # mean of 0.5 * 2 - 1 and 0.5 * (-4) - (-2)
    assert sac.actor_loss(0.5, jnp.array([2.0, -4.0]), q.min(0), jnp.ones(2)) == 0.0
    assert sac.actor_loss(0.5, jnp.array([4.0, -4.0]), q.min(0), jnp.ones(2)) == 0.5


def test_weighted_losses_by_hand():
    weight, mask = jnp.array([3.0, 1.0, 0.0]), jnp.array([1.0, 1.0, 0.0])
    values = jnp.array([1.0, 5.0, 99.0])  # the last one is invalid
    assert sac.masked_mean(values, mask) == 3.0
    assert sac.masked_mean(values, mask, weight) == (3 * 1 + 1 * 5) / 2
    q = jnp.array([[1.0, 2.0, 9.0], [3.0, 5.0, 9.0]])
    target = jnp.array([2.0, 2.0, 0.0])
    assert sac.critic_loss(q, target, weight, mask) == (3 * 2 + 1 * 9) / 2
    # A weight that all share counts, as in WIMLE.
    assert sac.critic_loss(q, target, weight / 2, mask) == (3 * 2 + 1 * 9) / 4
    log_prob = jnp.array([2.0, -4.0, 7.0])
    assert sac.actor_loss(0.5, log_prob, q.min(0), mask) == ((0.5 * 2 - 1) + (0.5 * -4 - 2)) / 2
    assert sac.masked_mean(jnp.ones(3), jnp.zeros(3)) == 0.0


def test_temperature_loss_and_gradient_by_hand():
    log_alpha = jnp.log(0.2)
    value, slope = jax.value_and_grad(sac.temperature_loss)(log_alpha, 1.5, -1.0)
    # alpha * 2.5, and its derivative by log alpha is the same number.
    assert value == pytest.approx(0.5, rel=1e-6)
    assert slope == pytest.approx(0.5, rel=1e-6)


# --- Policy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("u", [-3.0, -0.2, 0.0, 1.0, 4.0])
def test_log_density_by_change_of_variables(u):
    mean, std = np.array([0.3, -0.5]), np.array([0.5, 1.5])
    action, log_prob = sac.tanh_gaussian(mean, np.log(std), (u - mean) / std)
    squash = np.log(1 - np.tanh(u) ** 2)
    expected = (stats.norm.logpdf(u, mean, std) - squash).sum()
    np.testing.assert_allclose(action, np.tanh(u), rtol=1e-5)
    np.testing.assert_allclose(log_prob, expected, rtol=2e-5)


@pytest.mark.parametrize("u", [-60.0, 60.0])
def test_log_density_is_accurate_for_large_actions(u):
    def log_prob(mean):
        return sac.tanh_gaussian(mean, jnp.zeros(1), jnp.ones(1))[1]

    value, slope = jax.value_and_grad(log_prob)(jnp.array([u - 1.0]))
    # For large |u|, log(1 - tanh^2 u) = 2 (log 2 - |u|); the noise is 1.
    expected = stats.norm.logpdf(1.0) - 2 * (math.log(2) - abs(u))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, [2 * np.sign(u)], rtol=1e-6)


def test_density_of_actions_integrates_to_one():
    mean, std = 0.4, 0.7
    u = np.linspace(-9, 9, 4001)
    _, log_prob = sac.tanh_gaussian(
        np.full((u.size, 1), mean), np.full((u.size, 1), math.log(std)), (u[:, None] - mean) / std
    )
    total = np.trapezoid(np.exp(np.asarray(log_prob, np.float64)), np.tanh(u))
    assert total == pytest.approx(1, abs=1e-4)


def test_log_std_is_bounded_and_initially_minus_four():
    _, log_std = sac.policy_parameters(jnp.array([0.0, 0.0, 0.0, -99.0, 0.0, 99.0]))
    np.testing.assert_allclose(log_std, [-10, -4, 2])
    _, log_std = AGENT._policy(init(jax.random.PRNGKey(0)).actor, jnp.zeros(D))
    np.testing.assert_allclose(np.exp(log_std), math.exp(-4), rtol=1e-5)


def test_deterministic_action_is_tanh_of_the_mean():
    agent = agent_in_training(0)
    obs = random_batch(0).obs
    mean = mlp(as_numpy(agent.actor), obs)[:, :A]
    np.testing.assert_allclose(AGENT.deterministic_action(agent, obs), np.tanh(mean), rtol=1e-4)
    # An exported policy contains only the actor.
    exported = AGENT.policy(agent)
    np.testing.assert_array_equal(
        AGENT.deterministic_action(exported, obs), AGENT.deterministic_action(agent, obs)
    )
    assert len(jax.tree.leaves(exported)) == len(jax.tree.leaves(agent.actor))


def test_sampled_actions_and_log_densities_equal_numpy():
    agent, obs, key = agent_in_training(0), random_batch(0).obs, jax.random.PRNGKey(4)
    action, log_prob = AGENT.act(agent, obs, AGENT.action_noise(key, (B,)))
    expected = sample_policy(as_numpy(agent.actor), obs, np.asarray(jax.random.normal(key, (B, A))))
    np.testing.assert_allclose(action, expected[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(log_prob, expected[1], rtol=1e-4, atol=1e-5)


def test_values_of_each_critic_equal_numpy():
    agent, batch = agent_in_training(0), random_batch(0)
    q = AGENT.value(agent, batch.obs, batch.action)
    expected = critics_by_numpy(as_numpy(agent.critic), batch.obs, batch.action)
    np.testing.assert_allclose(q, expected, rtol=1e-4, atol=1e-6)


def test_initial_weights_are_orthogonal_with_gain_root_two():
    agent = init(jax.random.PRNGKey(0))
    twins = [jax.tree.map(lambda leaf, i=i: leaf[i], agent.critic) for i in range(2)]
    for network in [agent.actor, *twins]:
        for layer in network.values():
            kernel = np.asarray(layer["kernel"])
            small = kernel @ kernel.T if kernel.shape[0] <= kernel.shape[1] else kernel.T @ kernel
            np.testing.assert_allclose(small, 2 * np.eye(len(small)), atol=1e-5)
            assert not layer["bias"].any()
    assert not np.allclose(twins[0]["head"]["kernel"], twins[1]["head"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, agent.critic, agent.target_critic)
    assert agent.log_temperature == pytest.approx(math.log(0.3), rel=1e-6)


def test_only_critics_have_layer_norm():
    def layers(normalised):
        agent = SAC(LearnConfig(), SACFields(hidden=(8, 8), critic_layer_norm=normalised), SPEC)
        state = jax.eval_shape(agent.init, jax.random.PRNGKey(0))
        q = jax.eval_shape(agent.value, state, jnp.ones((4, D)), jnp.ones((4, A)))
        assert q.shape == (2, 4)
        return set(state.actor), set(state.critic)

    plain = {"hidden_0", "hidden_1", "head"}
    assert layers(False) == (plain, plain)
    assert layers(True) == (plain, plain | {"norm_0", "norm_1"})


# --- Whole updates against NumPy ------------------------------------------------------------------
# This section is NumPy in float64; gradients are central differences of the losses.


def as_numpy(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def agent_in_training(seed):
    """Return an agent whose weights are not zero, and whose target critics lag behind the critics."""
    agent = init(jax.random.PRNGKey(seed))
    rng = np.random.default_rng(seed)

    def moved(tree, by):
        return jax.tree.map(lambda x: x + by * rng.normal(size=x.shape).astype(np.float32), tree)

    actor = moved(agent.actor, 0.2)
    # Wider than a new policy, so that the noise affects the critics.
    actor["head"]["bias"] += np.array([0.0] * A + [0.5] * A, np.float32)
    return agent._replace(
        actor=actor, critic=moved(agent.critic, 0.2), target_critic=moved(agent.target_critic, 0.2)
    )


def mlp(params, x):
    for i in range(len(params) - 1):
        layer = params[f"hidden_{i}"]
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def critics_by_numpy(params, obs, action):
    x = np.concatenate([obs, action], -1)
    return np.stack(
        [mlp(jax.tree.map(lambda leaf, i=i: leaf[i], params), x)[:, 0] for i in range(2)]
    )


def sample_policy(params, obs, noise):
    mean, x = np.split(mlp(params, obs), 2, -1)
    log_std = -10 + 6 * (1 + np.tanh(x))
    u = mean + np.exp(log_std) * noise
    # 1 - tanh^2 u = 1 / cosh^2 u
    squash = -2 * (np.logaddexp(u, -u) - np.log(2))
    density = stats.norm.logpdf(u, mean, np.exp(log_std)) - squash
    return np.tanh(u), density.sum(-1)


def numeric_gradient(function, params):
    """Return central differences in every entry of a tree."""
    gradient = jax.tree.map(np.zeros_like, params)
    for leaf, out in zip(jax.tree.leaves(params), jax.tree.leaves(gradient), strict=True):
        for at in np.ndindex(leaf.shape):
            middle = leaf[at]
            leaf[at] = middle + 1e-6
            high = function(params)
            leaf[at] = middle - 1e-6
            out[at] = (high - function(params)) / 2e-6
            leaf[at] = middle
    return gradient


class Adam:
    """Kingma and Ba (2015), algorithm 1."""

    def __init__(self, params):
        self.mean = jax.tree.map(np.zeros_like, params)
        self.square = jax.tree.map(np.zeros_like, params)
        self.count = 0

    def step(self, params, gradient, rate):
        self.count += 1
        self.mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, self.mean, gradient)
        self.square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, self.square, gradient)
        first, second = 1 - 0.9**self.count, 1 - 0.999**self.count
        return jax.tree.map(
            lambda p, m, v: p - rate * (m / first) / (np.sqrt(v / second) + 1e-8),
            params,
            self.mean,
            self.square,
        )


class Reference:
    """Soft Actor-Critic in NumPy; `wrong` names one step that is taken out of order."""

    def __init__(self, agent, wrong=None):
        self.actor, self.critic = as_numpy(agent.actor), as_numpy(agent.critic)
        self.target, self.log_alpha = as_numpy(agent.target_critic), as_numpy(agent.log_temperature)
        self.adams = [Adam(self.actor), Adam(self.critic), Adam(self.log_alpha)]
        self.wrong = wrong

    def update(self, batch, both_noises):
        batch = Transition(*(np.asarray(x, np.float64) for x in batch))
        next_noise, noise = np.asarray(both_noises, np.float64)
        alpha, rate, old_critic = np.exp(self.log_alpha), 0.01, self.critic
        next_action, next_log_prob = sample_policy(self.actor, batch.next_obs, next_noise)
        next_q = critics_by_numpy(self.target, batch.next_obs, next_action).min(0)
        y = batch.reward + 0.9 * batch.discount * (next_q - alpha * next_log_prob)

        def critic_loss(params):
            q = critics_by_numpy(params, batch.obs, batch.action)
            return np.mean((q[0] - y) ** 2 + (q[1] - y) ** 2)

        self.critic = self.adams[1].step(
            self.critic, numeric_gradient(critic_loss, self.critic), rate
        )
        source = old_critic if self.wrong == "target before critic" else self.critic
        self.target = jax.tree.map(lambda t, c: 0.9 * t + 0.1 * c, self.target, source)
        critic = old_critic if self.wrong == "actor against the old critic" else self.critic

        def actor_loss(params):
            action, log_prob = sample_policy(params, batch.obs, noise)
            return np.mean(alpha * log_prob - critics_by_numpy(critic, batch.obs, action).min(0))

        loss_pi = actor_loss(self.actor)
        entropy = -sample_policy(self.actor, batch.obs, noise)[1].mean()
        if self.wrong == "entropy at the next states":
            entropy = -next_log_prob.mean()
        self.actor = self.adams[0].step(self.actor, numeric_gradient(actor_loss, self.actor), rate)
        if self.wrong == "entropy of the new actor":
            entropy = -sample_policy(self.actor, batch.obs, noise)[1].mean()
        # The derivative by log alpha of alpha (entropy - target entropy), with target -A/2.
        gradient = np.asarray(alpha * (entropy + 0.5 * A))
        self.log_alpha = self.adams[2].step(self.log_alpha, gradient, rate)
        return {
            "critic_loss": critic_loss(old_critic),
            "actor_loss": loss_pi,
            "q_mean": critics_by_numpy(old_critic, batch.obs, batch.action).mean(),
            "temperature": alpha,
            "temperature_loss": gradient,
            "entropy": entropy,
            "target_mean": y.mean(),
        }


def three_updates(wrong=None):
    agent = agent_in_training(1)
    reference = Reference(agent, wrong)
    for i in range(3):
        noise, batch = jax.random.normal(jax.random.PRNGKey(10 + i), (2, B, A)), random_batch(i)
        agent, metrics = update(agent, batch, jnp.ones(B), jnp.ones(B), noise)
        expected = reference.update(batch, noise)
    return agent, metrics, reference, expected


def distances(agent, reference):
    """Return the largest differences of the parameters, in units of one Adam step."""
    pairs = {
        "actor": (agent.actor, reference.actor),
        "critic": (agent.critic, reference.critic),
        "target": (agent.target_critic, reference.target),
        "temperature": (agent.log_temperature, reference.log_alpha),
    }
    return {
        name: max(
            np.abs(a - b).max() / 0.01
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
        )
        for name, (ours, theirs) in pairs.items()
    }


def test_updates_equal_numpy():
    agent, metrics, reference, expected = three_updates()
    assert max(distances(agent, reference).values()) < 1e-3
    for ours, theirs in zip(
        (agent.actor_opt_state, agent.critic_opt_state, agent.temperature_opt_state),
        reference.adams,
        strict=True,
    ):
        adam, _ = ours
        # The moments contain the size of the gradients, which Adam's steps do not depend on.
        for a, b in ((adam.mu, theirs.mean), (adam.nu, theirs.square)):
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), a, b)
        assert adam.count == 3
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("wrong", "shows_in"),
    [
        ("target before critic", "target"),
        ("actor against the old critic", "actor"),
        ("entropy at the next states", "temperature"),
        ("entropy of the new actor", "temperature"),
    ],
)
def test_updates_in_another_order_are_detected(wrong, shows_in):
    agent, _, reference, _ = three_updates(wrong)
    assert distances(agent, reference)[shows_in] > 5e-3


def test_transitions_of_weight_zero_have_no_effect():
    agent, batch, noise = agent_in_training(1), random_batch(0), jax.random.normal(KEY, (2, B, A))
    weight = jnp.asarray(np.arange(B) % 3 > 0, jnp.float32)
    spoiled = jax.tree.map(lambda x: np.where(np.arange(B) % 3 > 0, x.T, 9.0).T, batch)
    after, _ = update(agent, batch, weight, weight, noise)
    chex.assert_trees_all_equal(after, update(agent, spoiled, weight, weight, noise)[0])
    others, _ = update(agent, batch, 1 - weight, 1 - weight, noise)
    for one, other in ((after.critic, others.critic), (after.actor, others.actor)):
        assert np.abs(one["head"]["kernel"] - other["head"]["kernel"]).max() > 1e-3


def test_weights_act_on_critics_and_the_mask_on_all_losses():
    agent, batch, noise = agent_in_training(1), random_batch(0), jax.random.normal(KEY, (2, B, A))
    ones = jnp.ones(B)
    _, plain = update(agent, batch, ones, ones, noise)
    _, heavy = update(agent, batch, 3 * ones, ones, noise)
    assert heavy["critic_loss"] == pytest.approx(3 * float(plain["critic_loss"]), rel=1e-5)
    assert heavy["entropy"] == plain["entropy"]
    _, masked = update(agent, batch, ones.at[0].set(0), ones.at[0].set(0), noise)
    assert abs(masked["entropy"] - plain["entropy"]) > 1e-3


def test_wrong_batch_size_is_an_error():
    noise = jnp.zeros((2, B + 1, A))
    with pytest.raises(AssertionError, match=rf"shape \({B + 1},\)"):
        AGENT.update(
            agent_in_training(0), random_batch(0, B + 1), jnp.ones(B + 1), jnp.ones(B + 1), noise
        )


def test_reset_agent_equals_a_new_one():
    key = jax.random.PRNGKey(7)
    chex.assert_trees_all_equal(jax.jit(AGENT.reset)(agent_in_training(0), key), init(key))


# --- Initial weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(17, 256), (256, 256), (256, 1), (3, 3)])
def test_orthogonal_initializer_returns_orthogonal_kernels(shape):
    kernel = np.asarray(orthogonal(3.0)(jax.random.PRNGKey(3), shape)) / 3
    gram = kernel @ kernel.T if shape[0] <= shape[1] else kernel.T @ kernel
    np.testing.assert_allclose(gram, np.eye(min(shape)), atol=1e-5)


def test_orthogonal_initializer_is_uniformly_distributed():
    """An entry of an orthonormal column of 3 is uniform in [-1, 1] (Archimedes)."""
    keys = jax.random.split(jax.random.PRNGKey(0), 2000)
    kernels = jax.vmap(lambda key: orthogonal(1.0)(key, (3, 3)))(keys)
    for i, j in [(0, 0), (1, 2)]:
        assert stats.kstest(kernels[:, i, j], stats.uniform(-1, 2).cdf).pvalue > 0.01
    signs = np.sign(np.linalg.det(kernels))
    assert abs(signs.mean()) < 0.1  # as many reflections as rotations


# --- A decision process with known values ---------------------------------------------------------


@pytest.mark.parametrize(("discount", "values"), [(1.0, (8 / 3, 10 / 3)), (0.0, (2.0, 2.0))])
def test_critics_converge_to_the_values_of_two_states(discount, values):
    """State 0 pays 1 and leads to 1; state 1 pays 2 and leads to 0, or ends there.

    With gamma 1/2: Q0 = 1 + Q1 / 2, Q1 = 2 + Q0 / 2 at a time limit, Q1 = 2 at a termination.
    """
    agent = SAC(
        LearnConfig(batch=64, discount=0.5),
        SACFields(hidden=(16,), learning_rate=3e-3, polyak=0.05, initial_temperature=1e-8),
        EnvSpec("two", 2, 1, 50, ("0", "1"), None),
    )
    states = np.eye(2, dtype=np.float32)
    at = np.arange(64) % 2
    batch = Transition(
        obs=states[at],
        action=np.linspace(-1, 1, 64, dtype=np.float32)[:, None],
        reward=1.0 + at.astype(np.float32),
        discount=np.where(at == 1, np.float32(discount), np.float32(1)),
        next_obs=states[1 - at],
    )

    @jax.jit
    def learn(state):
        return jax.lax.scan(
            lambda state, noise: agent.update(state, batch, jnp.ones(64), jnp.ones(64), noise),
            state,
            agent.noise(jax.random.PRNGKey(1), 1500),
        )[0]

    state = learn(jax.jit(agent.init)(jax.random.PRNGKey(0)))
    q = agent.value(state, jnp.eye(2), jnp.zeros((2, 1)))
    np.testing.assert_allclose(q, np.broadcast_to(values, (2, 2)), atol=0.05)


def test_smallest_critic_gets_the_whole_gradient():
    """The gradient must not depend on equality, because XLA may compute the same q twice."""
    q = jnp.array([[1.0, 5.0, 2.0], [3.0, 4.0, 2.0], [2.0, 9.0, 7.0]])[..., None]
    np.testing.assert_array_equal(AGENT.aggregate_critics(q)[:, 0], [1, 4, 2])
    gradient = jax.grad(lambda q: AGENT.aggregate_critics(q).sum())
    np.testing.assert_array_equal(gradient(q)[..., 0], [[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    names = {equation.primitive.name for equation in equations(jax.make_jaxpr(gradient)(q).jaxpr)}
    assert not names & {"eq", "div", "reduce_min"}
