"""Custom agent and trust rule, defined in a file outside the package."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dynajax
from conftest import SMALL_OF_ANY
from dynajax import UsageError
from dynajax.types import Array

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

    def update(self, state, batch, critic_weight, actor_weight, noise):
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
    """Keep the half of the transitions on which the members agree most."""

    needs_all_members = True

    def init(self):
        return jnp.zeros((), jnp.int32)

    def apply(self, state, predictions, h, horizon, key):
        u = predictions.mean.var(0).sum(-1)
        return state + 1, dynajax.TrustOutput(keep_mask=u <= jnp.median(u))


dynajax.AGENTS["linear"] = Linear
dynajax.TRUST["half"] = HalfAndHalf


# --- Tests ----------------------------------------------------------------------------------------


def config(engine, steps):
    return dynajax.make_config(
        "pendulum-swingup",
        agent="test_plugins:linear",
        trust="test_plugins:half",
        preset="paper",
        fixes=["none", "scale,target"],
        steps=steps,
        engine=engine,
        settings=SMALL_OF_ANY
        | {
            "eval.every": 150,
            "eval.episodes": 1,
            "model.fit_every": 50,
            "replay.real": 400,
            "agent.step": 1e-2,
        },
    )


@pytest.mark.parametrize("engine", ["host", "mjx"])
def test_custom_agent_and_rule_train_and_resume(tmp_path, engine):
    whole = dynajax.train(config(engine, 300), tmp_path / "whole", quiet=True)
    dynajax.train(config(engine, 150), tmp_path / "parts", quiet=True)
    parts = dynajax.train(config(engine, 300), tmp_path / "parts", quiet=True)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(parts.state), strict=True):
        np.testing.assert_array_equal(a, b)
    learners = whole.state.learners
    assert isinstance(learners.agent, Weights) and np.abs(learners.agent.actor).max() > 0
    # The rule ran once per agent step that learned, and kept half of the transitions.
    np.testing.assert_array_equal(learners.trust, [250, 250])
    assert 0.4 < np.asarray(learners.synthetic_buffer.valid).mean() < 0.6
    np.testing.assert_allclose(learners.config.agent.step, 1e-2)

    info = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert info["config"]["agent_name"] == "test_plugins:linear"
    assert info["config"]["agent"]["step"] == 1e-2
    assert info["config"]["trust_name"] == "test_plugins:half"
    report = dynajax.write_report(tmp_path / "whole").read_text()
    assert "linear" in report and "half" in report


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
    with pytest.raises(UsageError, match=r"--agent=nowhere:sac: the module 'nowhere'"):
        dynajax.make_config("pendulum-swingup", agent="nowhere:sac")
    with pytest.raises(UsageError, match=r"--trust=penaltie: .*nearest is penalty"):
        dynajax.make_config("pendulum-swingup", trust="penaltie")
