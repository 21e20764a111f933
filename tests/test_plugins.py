"""Plug-ins of every kind, defined in a file outside the package: they train, resume and load."""

import json
from typing import NamedTuple

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces

import dynajax
from conftest import SMALL_OF_ANY
from dynajax import UsageError, replay
from dynajax.envs.mjx import EnvState, Task
from dynajax.models import Gaussian
from dynajax.models.likelihoods import soft_clamp
from dynajax.networks.initializers import fan_in
from dynajax.networks.mlp import MLP
from dynajax.synthetic import UpdateInputs
from dynajax.types import Array, EnvSpec

# --- Code that a user writes ----------------------------------------------------------------------


class Weights(NamedTuple):
    actor: Array  # (D, A)
    critic: Array  # (D+A,)


@dynajax.fields
class LinearFields:
    noise: float = dynajax.traced(0.3, low=0)
    step: float = dynajax.traced(1e-3, low=0)


class Linear(dynajax.Agent):
    """Linear actor and critic, trained with temporal differences."""

    Fields = LinearFields

    def init(self, key):
        d, a = self.spec.obs_dim, self.spec.action_dim
        return Weights(jnp.zeros((d, a)), 0.01 * jax.random.normal(key, (d + a,)))

    def deterministic_action(self, state, obs):
        return jnp.tanh(obs @ state.actor)

    def act(self, state, obs, key):
        mean = self.deterministic_action(state, obs)
        noise = jax.random.normal(key, mean.shape)
        return jnp.clip(mean + self.config.noise * noise, -1, 1), -0.5 * jnp.square(noise).sum(-1)

    def value(self, state, obs, action):
        return (jnp.concatenate([obs, action], -1) @ state.critic)[None]

    def update(self, state, batch, weight, mask, noise):
        def loss(critic, actor):
            now, after = state._replace(critic=critic), state._replace(actor=actor)
            next_q = self.value(
                state, batch.next_obs, self.deterministic_action(state, batch.next_obs)
            )[0]
            target = batch.reward + self.learn.discount * batch.discount * next_q
            error = jnp.square(self.value(now, batch.obs, batch.action)[0] - target).mean()
            return (
                error
                - self.value(state, batch.obs, self.deterministic_action(after, batch.obs)).mean()
            )

        value, gradient = jax.value_and_grad(loss, (0, 1))(state.critic, state.actor)
        after = Weights(
            state.actor - self.config.step * jnp.clip(gradient[1], -1, 1),
            state.critic - self.config.step * jnp.clip(gradient[0], -1, 1),
        )
        return after, {"critic_loss": value}


class HalfAndHalf(dynajax.TrustRule):
    """Keep the half of the transitions on which the members agree most, and count the calls."""

    needs_all_members = True

    def init(self):
        return jnp.zeros((), jnp.int32)

    def apply(self, state, predictions, h, horizon, key):
        u = predictions.mean.var(0).sum(-1)
        return state + 1, dynajax.TrustOutput(keep_mask=u <= jnp.median(u))


class TanhModel(dynajax.NeuralModel):
    """An MLP with tanh, and a weight decay of the head alone."""

    def make_network(self, depth, outputs):
        return MLP((self.config.width,) * depth, outputs, nn.tanh, fan_in)

    def decay(self, layers):
        return jnp.square(layers["head"]["kernel"]).sum()


class Laplace(dynajax.Likelihood):
    """Independent Laplace distributions of the same variances."""

    has_variance = True
    outputs_per_target = 2

    def read(self, output, bounds):
        mean, raw = jnp.split(output, 2, -1)
        low, high = self.config.log_variance_min, self.config.log_variance_max
        return Gaussian(mean, soft_clamp(raw, low, high))

    def loss(self, prediction, z, exponent):
        mean, log_variance = prediction
        scale = jnp.exp(0.5 * log_variance) / jnp.sqrt(2.0)
        return (jnp.abs(mean - z) / scale + jnp.log(scale)).mean()


class Median(dynajax.Likelihood):
    """Point predictions, fitted by the mean absolute error."""

    has_variance = False
    outputs_per_target = 1

    def read(self, output, bounds):
        return Gaussian(output, None)

    def loss(self, prediction, z, exponent):
        return jnp.abs(prediction.mean - z).mean()


class WithoutVariance(TanhModel):
    """A model that predicts no variance, whatever the likelihood."""

    has_variance = False


@dynajax.fields
class LongFields:
    restart: float = dynajax.traced(0.2, 0, 1)


class Long(dynajax.Source):
    """One long rollout per place of the minibatch, one step longer at each agent step."""

    Fields = LongFields

    def init(self):
        size = self.config.num_parallel_rollouts
        return {
            "obs": jnp.zeros((size, self.spec.obs_dim)),
            "running": jnp.zeros(size, bool),
            "calls": jnp.zeros((), jnp.int32),
        }

    def start_shape(self):
        return (self.config.num_parallel_rollouts,)

    def prepare(self, learner, shared, model_env, real, starts, keys):
        state = learner.synthetic
        restarts = replay.gather(learner.real_buffer, starts[0]).unpack().obs
        obs = jnp.where(state["running"][:, None], state["obs"], restarts)
        active = jnp.ones(len(obs), bool)
        env = model_env.select_members()
        trust, step = env.step(learner.trust, obs, active, 0, 1, keys.rollout)
        block = replay.pack(step.transition, step.keep_mask, step.weight)
        batches = jax.vmap(replay.concatenate, (0, None))(real, block)
        restarted = jax.random.bernoulli(keys.sample, self.config.source.restart, active.shape)
        state = {
            "obs": step.transition.next_obs,
            "running": step.continue_mask & (step.transition.discount > 0) & ~restarted,
            "calls": state["calls"] + 1,
        }
        return learner._replace(synthetic=state, trust=trust), UpdateInputs(batches), {}


def damped(obs, next_obs, weights):
    return jnp.full(obs.shape[-1], 0.9)


shrunk = dynajax.Fix("predict s' - 0.9 s", skip=damped)


class Spring(gymnasium.Env):
    """Hold a mass on a spring still; the episode terminates 2 away from rest."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.state, {}

    def step(self, action):
        x, v = self.state
        v = v + 0.1 * (float(action[0]) - x)
        self.state = np.array([x + 0.1 * v, v], np.float32)
        return self.state, -abs(float(x)), bool(abs(x) > 2), False, {}

    # So that a run can be resumed within an episode.
    def snapshot(self):
        return self.state.astype(np.float64)

    def restore(self, values):
        self.state = values.astype(np.float32)


def left(obs, action, next_obs):
    return jnp.abs(next_obs[0]) > 2


def spring_on_device():
    def reset(key):
        return EnvState(jax.random.uniform(key, (2,), minval=-1, maxval=1), ())

    def step(state, action):
        x, v = state.obs
        v = v + 0.1 * (action[0] - x)
        obs = jnp.stack([x + 0.1 * v, v])
        return EnvState(obs, ()), -jnp.abs(x), left(state.obs, action, obs)

    return Task(EnvSpec("spring", 2, 1, 40, ("x", "v"), left), reset, step)


gymnasium.register("Spring-v0", Spring, max_episode_steps=40)
dynajax.register_termination("Spring-v0", left)
dynajax.register_mjx_task("Spring", spring_on_device)
dynajax.AGENTS["linear"] = Linear
dynajax.TRUST["half"] = HalfAndHalf


# --- Tests ----------------------------------------------------------------------------------------

TASKS = {"host": "test_plugins:Spring-v0", "mjx": "test_plugins:Spring"}
LEARNING_STEPS = 70


def config(engine, steps):
    return dynajax.make_config(
        TASKS[engine],
        agent="test_plugins:linear",
        trust="test_plugins:HalfAndHalf",
        preset="paper",
        fixes=["none", "scale,test_plugins:shrunk"],
        steps=steps,
        engine=engine,
        settings=SMALL_OF_ANY
        | {
            "model.network": "test_plugins:TanhModel",
            "model.likelihood": "test_plugins:Laplace",
            "rollout.source": "test_plugins:Long",
            "source.restart": 0.1,
            "eval.every": 60,
            "eval.episodes": 1,
            "model.fit_every": 20,
            "agent.step": 1e-2,
        },
    )


@pytest.mark.parametrize("engine", ["host", "mjx"])
def test_plug_ins_of_every_kind_train_resume_and_load(tmp_path, engine):
    whole = dynajax.train(config(engine, 120), tmp_path / "whole", quiet=True)
    dynajax.train(config(engine, 60), tmp_path / "parts", quiet=True)
    parts = dynajax.train(config(engine, 120), tmp_path / "parts", quiet=True)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(parts.state), strict=True):
        np.testing.assert_array_equal(a, b)
    learners = whole.state.learners
    assert isinstance(learners.agent, Weights) and np.abs(learners.agent.actor).max() > 0
    # Rule and source ran once per agent step that learned.
    np.testing.assert_array_equal(learners.trust, [LEARNING_STEPS] * 2)
    np.testing.assert_array_equal(learners.synthetic["calls"], [LEARNING_STEPS] * 2)
    assert np.asarray(learners.synthetic["obs"]).any()
    np.testing.assert_allclose(learners.config.agent.step, 1e-2)
    np.testing.assert_allclose(learners.config.source.restart, 0.1)
    np.testing.assert_allclose(learners.model.stats.transform.skip, [[1, 1], [0.9, 0.9]], atol=1e-6)

    info = json.loads((tmp_path / "whole" / "config.json").read_text())["config"]
    assert info["agent_name"] == "test_plugins:linear" and info["agent"]["step"] == 1e-2
    assert info["trust_name"] == "test_plugins:HalfAndHalf"
    assert info["model"]["network"] == "test_plugins:TanhModel"
    assert info["model"]["likelihood"] == "test_plugins:Laplace"
    assert info["rollout"]["source"] == "test_plugins:Long" and info["source"]["restart"] == 0.1
    assert info["variants"] == ["none", "scale,test_plugins:shrunk"]
    assert list(dynajax.read_run(tmp_path / "whole").evals) == info["variants"]
    report = dynajax.write_report(tmp_path / "whole").read_text()
    assert "linear" in report and "HalfAndHalf" in report and "test_plugins:shrunk" in report

    obs = np.array([[0.5, 0.0], [-1.0, 0.3]], np.float32)
    for row in range(2):
        policy = dynajax.load_policy(tmp_path / "whole", row, "last")
        agent = jax.tree.map(lambda x, row=row: x[row], learners.agent)
        expected = policy.agent.deterministic_action(agent, obs)
        np.testing.assert_allclose(policy.normalized_action(obs), expected, atol=1e-6)
        prediction = dynajax.load_model(tmp_path / "whole", row)(obs, policy(obs))
        assert prediction.next_obs.mean.shape == (2, 2)
        assert np.isfinite(prediction.reward.mean).all()
        assert (prediction.reward.aleatoric > 0).all()


def test_class_that_is_defined_again_replaces_the_old_one(tmp_path, monkeypatch):
    """Compile anew if the class behind a name changes within a process, as in a notebook."""
    calls = []

    def define(sign):
        class Again(Linear):
            def deterministic_action(self, state, obs):
                calls.append(sign)
                return super().deterministic_action(state, obs) + sign

        monkeypatch.setitem(dynajax.AGENTS, "again", Again)

    for sign in (-1.0, 1.0):
        define(sign)
        small = SMALL_OF_ANY | {"eval.every": 60, "eval.episodes": 1}
        algorithm = {"agent": "again", "algo": "model-free", "preset": "paper", "steps": 60}
        made = dynajax.make_config("test_plugins:Spring-v0", settings=small, **algorithm)
        dynajax.train(made, tmp_path / str(sign), quiet=True)
        assert calls and set(calls) == {sign}
        calls.clear()


def test_fields_of_a_custom_agent_are_settings():
    with pytest.raises(UsageError, match=r"nearest is agent.noise"):
        dynajax.make_config("pendulum-swingup", agent="linear", settings={"agent.noize": 1})
    with pytest.raises(UsageError, match=r"no such field with --agent=linear"):
        dynajax.make_config("pendulum-swingup", agent="linear", settings={"agent.hidden": (8,)})
    config = dynajax.make_config("pendulum-swingup", agent="linear", vary={"agent.noise": [0, 1]})
    assert [v.name for v in config.variants] == ["none;agent.noise=0", "none;agent.noise=1"]


@pytest.mark.parametrize(
    ("flag", "entries", "base"),
    [("agent", dynajax.AGENTS, "Agent"), ("trust", dynajax.TRUST, "TrustRule")],
)
def test_entries_that_are_not_subclasses_are_refused(monkeypatch, flag, entries, base):
    monkeypatch.setitem(entries, "five", 5)
    with pytest.raises(UsageError, match=rf"--{flag}=five: 5 is .* inherits from {base}$"):
        dynajax.make_config("pendulum-swingup", **{flag: "five"})


def test_unknown_names():
    with pytest.raises(UsageError, match=r"--agent=sacc: .*nearest is sac"):
        dynajax.make_config("pendulum-swingup", agent="sacc")
    with pytest.raises(UsageError, match=r"--agent=nowhere:sac: the module 'nowhere' cannot be f"):
        dynajax.make_config("pendulum-swingup", agent="nowhere:sac")
    with pytest.raises(UsageError, match=r"--trust=penaltie: .*nearest is penalty"):
        dynajax.make_config("pendulum-swingup", trust="penaltie")


def test_names_of_fixes_with_a_module(monkeypatch):
    def variants(*fixes):
        return [v.name for v in dynajax.make_config("pendulum-swingup", fixes=fixes).variants]

    # Names stay as they were typed, in one order.
    assert variants("test_plugins:shrunk, scale") == ["scale,test_plugins:shrunk"]
    # A module may also register its fix.
    monkeypatch.setitem(dynajax.FIXES, "damped", dynajax.Fix("predict s' - 0.9 s", skip=damped))
    assert variants("test_plugins:damped") == ["test_plugins:damped"]


@pytest.mark.parametrize(
    ("fix", "text"),
    [
        ("test_plugins:shrunk,target", "test_plugins:shrunk and target contradict each other"),
        ("test_plugins:shrunk,test_plugins:shrunk", "test_plugins:shrunk is given twice"),
        ("test_plugins:shrink", "the module 'test_plugins' has no 'shrink'"),
        ("test_plugins:left", "it must be a Fix"),
        ("nowhere:shrunk", "the module 'nowhere' cannot be found"),
        ("shrunk", "choose none, or from scale, target, auto, beta, or module:NAME"),
    ],
)
def test_refused_fixes_with_a_module(fix, text):
    with pytest.raises(UsageError) as error:
        dynajax.make_config("pendulum-swingup", fixes=[fix])
    assert str(error.value).startswith("--fix=") and text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "base"),
    [
        ("model.network", "DynamicsModel"),
        ("model.likelihood", "Likelihood"),
        ("rollout.source", "Source"),
    ],
)
def test_refused_models_likelihoods_and_sources(flag, base):
    for name, text in (
        ("test_plugins:Linear", f"it must be a class that inherits from {base}"),
        ("test_plugins:Nothing", "the module 'test_plugins' has no 'Nothing'"),
        ("nothing", "unknown name; the nearest is "),
    ):
        with pytest.raises(UsageError) as error:
            dynajax.make_config("pendulum-swingup", settings={flag: name})
        assert str(error.value).startswith(f"--set {flag}={name}: ") and text in str(error.value)


@pytest.mark.parametrize(
    ("settings", "blamed"),
    [
        ({"model.likelihood": "test_plugins:Median"}, "model.likelihood=test_plugins:Median"),
        ({"model.network": "test_plugins:WithoutVariance"}, "model.network=test_plugins:Without"),
    ],
)
def test_variances_that_a_plug_in_does_not_predict(settings, blamed):
    for arguments, flag in (
        ({"fixes": ["beta"]}, "--fix=beta"),
        ({"trust": "macura"}, "--trust=macura"),
        ({"trust": "penalty"}, "--trust=penalty"),
    ):
        with pytest.raises(UsageError) as error:
            dynajax.make_config("pendulum-swingup", settings=settings, **arguments)
        assert str(error.value).startswith(flag) and blamed in str(error.value)
    settings = settings | {"trust.kind": "epistemic"}
    assert dynajax.make_config("pendulum-swingup", settings=settings, trust="penalty")
