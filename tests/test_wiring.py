"""What the learner passes to its parts: settings, noise, counters, and the current policy.

The formulas of the parts are tested by hand elsewhere. A mistake in what they are given would be
deterministic, so runs would still repeat and resume to the bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import test_train
from dynajax import make_config, mbpo, replay
from dynajax.agents.sac import SAC
from dynajax.mbpo import MBPO
from dynajax.models import ensemble, evaluation
from dynajax.models.base import Gaussian
from dynajax.models.fit_data import DataSplit
from dynajax.runtime.program import build
from dynajax.types import ModelState, Transition
from sizes import NETWORKS, SMALL_OF_ANY, without_model
from test_synthetic import KEY, learn_once, new_learner, shared, with_real_data


@pytest.fixture
def prepared(make, spec):
    """Return a function from settings to what an agent step with a full buffer begins with."""

    def prepare(settings, **columns):
        algorithm = MBPO(make(settings), spec)
        learner = with_real_data(new_learner(algorithm.config, spec), **columns)
        source = algorithm.source(learner)
        keys = algorithm._split_keys(learner, source)
        real, starts = algorithm._sample_real(learner, shared(step=119), source, keys)
        return algorithm, learner, source, keys, real, starts

    return prepare


# --- The agent ------------------------------------------------------------------------------------


def test_observation_statistics_are_of_all_valid_real_observations(spec):
    config = make_config(
        "walk",
        algo="model-free",
        agent="simba",
        preset="paper",
        steps=100,
        settings=without_model(SMALL_OF_ANY) | NETWORKS["simba"],
    )
    program = build(config, spec)
    state, _ = test_train.run(config, program, program.init())
    found = test_train.learner_of(state.learners.agent.observations, 0)
    count = test_train.INSERTS + test_train.LEARNS
    steps = [test_train.data_at(config, t) for t in range(count)]
    obs = np.array([data.obs[0] for data, valid in steps if valid[0]], np.float64)
    assert found.num_obs == len(obs) > count / 2
    np.testing.assert_allclose(found.mean, obs.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.squares, len(obs) * obs.var(0), rtol=1e-4)


def test_start_value_is_the_mean_over_critics(make, spec):
    algorithm = MBPO(make(), spec)
    learner = new_learner(algorithm.config, spec)
    critic = learner.agent.critic
    kernel = jnp.zeros_like(critic["head"]["kernel"])
    head = {"kernel": kernel, "bias": jnp.array([[1.0], [3.0]])}
    agent = learner.agent._replace(critic={**critic, "head": head})
    values = algorithm.value(learner._replace(agent=agent), jnp.zeros((4, 3)))
    np.testing.assert_allclose(values, 2.0)


def test_real_and_synthetic_updates_have_noise_of_their_own(prepared):
    algorithm, learner, _, keys, *_ = prepared({"rollout.mixing": "separate"})
    noise = np.stack(algorithm._noise(learner, keys))
    assert len(np.unique(noise)) == noise.size


# --- Real data ------------------------------------------------------------------------------------


def test_real_transitions_are_sampled_by_age(prepared):
    settings = {
        "replay.age_decay": 0.5,
        "rollout.source": "none",
        "rollout.value_expansion_steps": 1,
        "learn.utd": 50,
    }
    *_, real, _ = prepared(settings, reward=jnp.arange(120.0))
    # Of 120 transitions the newest four would be 3 % of uniform samples.
    assert (np.asarray(real.unpack().reward) >= 116).mean() > 0.1


def test_length_of_a_fit_follows_the_transitions_in_the_buffer(make, spec):
    settings = {"model.epochs": 2.0, "model.batch": 16, "model.fit_steps": 1000}
    algorithm = MBPO(make(settings), spec)
    # 80, 120, and no more than the buffer has.
    assert [int(algorithm._fit_steps(shared(step=n))) for n in (80, 120, 9000)] == [10, 15, 15]


# --- Rollouts -------------------------------------------------------------------------------------


def test_each_update_rolls_out_its_own_policy(make, spec, monkeypatch):
    def act(self, state, obs, noise):
        shape = (*obs.shape[:-1], 2)
        return jnp.broadcast_to(state.log_temperature, shape), jnp.zeros(obs.shape[:-1])

    def update(self, state, data, weight, mask, noise):
        state = state._replace(log_temperature=state.log_temperature + 1)
        return state, {"action": data.action.mean()}

    monkeypatch.setattr(SAC, "act", act)
    monkeypatch.setattr(SAC, "update", update)
    config = make({"rollout.source": "on_the_fly", "rollout.real_fraction": 0.0, "learn.utd": 3})
    _, metrics = learn_once(config, spec)
    np.testing.assert_allclose(metrics["action"], 1.0)  # the mean of 0, 1 and 2


def test_each_update_has_noise_of_its_own(prepared):
    algorithm, learner, source, keys, real, starts = prepared(
        {"rollout.source": "on_the_fly", "learn.utd": 3}
    )
    env = algorithm.model_env(learner)
    _, inputs, _ = source.prepare(learner, shared(step=119), env, real, starts, keys.source)
    for noise in (inputs.starts.noise.prediction, inputs.starts.noise.action):
        assert len(np.unique(noise)) == noise.size


def test_rollouts_of_an_agent_step_are_sampled_in_it(prepared):
    algorithm, learner, source, _, real, _ = prepared({})
    numbered = learner.synthetic.unpack()._replace(reward=jnp.arange(64.0))
    learner = learner._replace(synthetic=replay.of_transitions(numbered, jnp.ones(64, bool)))
    # Before the step there are 0 or 2 blocks of 8 transitions, or the buffer of 8 blocks is full.
    for blocks, end in ((0, 8), (2, 24), (30, 64)):
        inputs = source.sample(learner, shared(119, blocks), real, KEY)
        rewards = np.asarray(inputs.real.unpack().reward)[:, algorithm.config.real_batch :]
        assert rewards.max() < end
        assert end == 64 or (rewards >= end - 8).any()


def test_share_of_actions_is_uniform(make, spec):
    def policy(obs, noise):
        return jnp.full((len(obs), 2), 0.25), jnp.zeros(len(obs))

    for share in (0.0, 0.5, 1.0):
        config = make({"rollout.random_action_fraction": share})
        env = MBPO(config, spec).model_env(new_learner(config, spec))
        env = dataclasses.replace(env, policy=policy)
        action, _ = env._act(jnp.zeros((2000, 3)), env.draw(KEY, 2000))
        random = np.asarray((action != 0.25).all(-1))
        assert abs(random.mean() - share) < 0.05
        if share:
            drawn = np.asarray(action)[random].ravel()
            assert stats.kstest(drawn, stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_noise_of_state_and_reward_is_scaled_by_the_settings(make, spec):
    def step(state_noise, reward_noise):
        settings = {"rollout.state_noise": state_noise, "rollout.reward_noise": reward_noise}
        config = make(settings)
        env = MBPO(config, spec).model_env(new_learner(config, spec)).select_members()
        still = dataclasses.replace(
            env, policy=lambda obs, noise: (jnp.zeros((len(obs), 2)), jnp.zeros(len(obs)))
        )
        made = still.step(None, jnp.zeros((4, 3)), jnp.ones(4, bool), 0, 1, KEY)[1].transition
        return np.append(made.next_obs, made.reward[:, None], 1)

    full, mean_state, half = step(1.0, 1.0), step(0.0, 1.0), step(0.5, 0.0)
    mean = np.append(mean_state[:, :3], half[:, 3:], 1)
    np.testing.assert_allclose(mean_state[:, 3], full[:, 3], rtol=1e-5)
    halved = (half - mean)[:, :3]
    np.testing.assert_allclose(halved, 0.5 * (full - mean)[:, :3], rtol=1e-3, atol=1e-5)
    assert np.abs(full - mean).min() > 1e-4


def test_value_expansion_has_the_discount_and_temperature_of_each_learner(
    make, spec, monkeypatch, new_programs
):
    def expand(env, trust, batch, length, *, key, discount, temperature):
        return trust, batch, {"discount": jnp.asarray(discount), "alpha": temperature}

    monkeypatch.setattr(mbpo, "expand_targets", expand)
    settings = {
        "rollout.source": "none",
        "rollout.value_expansion_steps": 1,
        "agent.initial_temperature": 0.3,
    }
    program = build(make(settings, vary={"learn.discount": [0.9, 0.7]}), spec)
    state = program.init()
    for t in range(60):
        state = program.insert(state, *test_train.data_at(program.config, t))
    _, metrics = program.learn(state, *test_train.data_at(program.config, 60))
    np.testing.assert_allclose(metrics["discount"], [0.9, 0.7], rtol=1e-6)
    np.testing.assert_allclose(metrics["alpha"], metrics["temperature"], rtol=1e-6)
    np.testing.assert_allclose(metrics["alpha"], 0.3, rtol=1e-2)


# --- The report of a fit --------------------------------------------------------------------------


def test_likelihood_spread_and_coverage_of_a_fit(spec):
    """Two members with means at -0.5 and 0.5 and variances 0.5 and 2, and standard normal truths."""
    count, dims = 4000, 4
    z = np.random.default_rng(0).normal(size=(count, dims))
    counted = np.arange(count) % 4 > 0
    z[~counted] = 1e3
    means = np.stack([np.full((count, dims), m) for m in (-0.5, 0.5)])
    variances = np.stack([np.full((count, dims), v) for v in (0.5, 2.0)])
    obs, action = np.zeros((count, 3)), np.zeros((count, 2))
    data = Transition(obs, action, z[:, 3], np.ones(count), z[:, :3])
    data, prediction = jax.tree.map(jnp.float32, (data, Gaussian(means, np.log(variances))))
    split = DataSplit(None, None, None, data, jnp.asarray(counted, jnp.float32))
    state = ModelState({}, None, ensemble.init_stats(spec), None, None)
    found = evaluation._report(state, prediction, split)
    terms = (means - z) ** 2 / variances + np.log(variances)
    np.testing.assert_allclose(found["nll"], terms[:, counted].mean(), rtol=1e-4)
    np.testing.assert_allclose(found["epistemic_std"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(found["aleatoric_std"], np.sqrt(1.25), rtol=1e-5)
    below = stats.norm.cdf(z, means, np.sqrt(variances)).mean(0)[counted]
    inside = (below > 0.1) & (below < 0.9)
    np.testing.assert_allclose(found["coverage_80"], inside.mean(), atol=1e-3)
