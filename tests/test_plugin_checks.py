"""Wrong plug-in functions: one line each says where, what was returned or raised, what is needed."""

import functools
import math
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dynajax
from dynajax import UsageError, plugin_checks, replay, user_code
from dynajax.agents.sac import SAC
from dynajax.diagnose import fits
from dynajax.envs import terminations
from dynajax.models import MODELS, Gaussian, MLPModel
from dynajax.models.likelihoods import LIKELIHOODS
from dynajax.synthetic import SOURCES, Buffered, OnTheFly, UpdateInputs
from dynajax.types import EnvSpec

ROOT = Path(__file__).parents[1]
SPEC = EnvSpec("task", 3, 1, 100, ("x", "y", "z"), None)
SMALL = {"agent.hidden": (8,), "model.width": 8, "learn.batch": 16, "model.members": 2}
SMALL |= {"model.elites": 2, "learn.utd": 2, "replay.synthetic": 400}


class Linear(dynajax.Agent):
    """An agent without a fault."""

    def init(self, key):
        return {"w": jnp.zeros((self.spec.obs_dim, self.spec.action_dim))}

    def deterministic_action(self, state, obs):
        return jnp.tanh(obs @ state["w"])

    def act(self, state, obs, key):
        return self.deterministic_action(state, obs), jnp.zeros(obs.shape[:-1])

    def value(self, state, obs, action):
        return jnp.zeros((1, *obs.shape[:-1]))

    def update(self, state, batch, weight, mask, noise):
        return state, {"reward": batch.reward.mean()}


class Agreed(dynajax.TrustRule):
    """A trust rule without a fault."""

    needs_all_members = True

    def apply(self, state, predictions, h, horizon, key):
        return state, dynajax.TrustOutput(keep_mask=predictions.active)


class Point(dynajax.Likelihood):
    """A likelihood without a fault."""

    has_variance = False
    outputs_per_target = 1

    def read(self, output, bounds):
        return Gaussian(output, None)

    def loss(self, prediction, z, exponent):
        return jnp.abs(prediction.mean - z).mean()


class Dense(nn.Module):
    """A network whose output layer has another name and, by default, another size."""

    outputs: int = 5

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs, name="out")(x)


class Normalized(nn.Module):
    """A network with variables besides its parameters."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=True)(x))


def check(agent="sac", trust="none", **settings):
    config = dynajax.make_config(
        "pendulum-swingup",
        agent=agent,
        trust=trust,
        preset="paper",
        settings={k: v for k, v in SMALL.items() if k != "agent.hidden" or agent == "sac"}
        | {k.replace("_", ".", 1): v for k, v in settings.items()},
    )
    plugin_checks.check(config, SPEC)


class Ranked(dynajax.TrustRule):
    """A rule that compares the transitions of a batch, which must have some."""

    needs_all_members = True

    def apply(self, state, predictions, h, horizon, key):
        u = predictions.mean.std(0).mean(-1)
        assert u.shape == (self.batch,)
        return state, dynajax.TrustOutput(keep_mask=u <= 0.9 * u.max())


@pytest.mark.parametrize("source", ["none", "on_the_fly", "buffered"])
def test_trust_rule_sees_transitions_with_value_expansion_alone(monkeypatch, source):
    monkeypatch.setitem(dynajax.TRUST, "ranked", Ranked)
    no_rollouts = {} if source == "buffered" else {"rollout_real_fraction": 1.0}
    check(trust="ranked", rollout_source=source, rollout_value_expansion_steps=1, **no_rollouts)


def line(call, *arguments, **keywords) -> str:
    """Return the one line of a usage error."""
    with pytest.raises(UsageError) as error:
        call(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def wrong(base, members):
    """Return a class with other members; functions are called as the members that they are."""
    for name, member in members.items():
        function = getattr(member, "fget", getattr(member, "__func__", member))
        if hasattr(function, "__code__"):
            function.__name__ = function.__qualname__ = name
    return type("Wrong", (base,), {**members, "__module__": __name__})


def branch(obs, action, next_obs):
    if next_obs[0] > 2:
        return jnp.bool(True)
    return jnp.bool(False)


class Silent:
    def __call__(self, obs, action, next_obs):
        return None


BOOL = "it must be bool ()"
PURE = "it must return bool () in pure JAX (jnp.where instead of if, jnp instead of numpy and math)"


@pytest.mark.parametrize(
    ("function", "texts"),
    [
        (branch, ("test_plugin_checks:branch raised TracerBoolConversionError: ", PURE)),
        (lambda s, a, n: n[0] > 1 and n[1] > 1, ("raised TracerBoolConversionError: ", PURE)),
        (lambda s, a, n: np.asarray(n)[0] > 2, ("raised TracerArrayConversionError: ", PURE)),
        (lambda s, a, n: math.sqrt(n[0]) > 2, ("raised ConcretizationTypeError: ", PURE)),
        (lambda s, a, n: n > 2, ("returned bool (3,) (", BOOL)),
        (lambda s, a, n: n[:1] > 2, ("returned bool (1,) (", BOOL)),
        (lambda s, a, n: None, ("returned None (", BOOL)),
        (lambda s, a, n: n[0], ("returned float32 () (", BOOL)),
        (lambda s, a, n: [n[0] > 1], ("returned a list of 1 (bool ()) (", BOOL)),
        (jax.jit(lambda s, a, n: n > 1), ("returned bool (3,) (", BOOL)),
        (functools.partial(lambda k, s, a, n: n > k, 2), ("returned bool (3,) (", BOOL)),
        (Silent(), ("test_plugin_checks:Silent returned None (", BOOL)),
        (lambda s, a, n: {}["height"], ("raised KeyError: 'height' (", "it must return bool ()")),
        (lambda s, a: s[0] > 2, ("(s, a) takes other arguments than the 3 that", "(")),
    ],
)
def test_wrong_termination_function(function, texts):
    text = line(terminations.check, SPEC._replace(termination=function))
    assert text.startswith("--env=task: the termination function test_plugin_checks:"), text
    assert all(part in text for part in texts), text
    assert re.search(rf"\({re.escape(__file__)}, line \d+\)", text), text


def test_line_names_where_the_users_code_raised_and_keeps_the_cause():
    with pytest.raises(UsageError) as error:
        terminations.check(SPEC._replace(termination=branch))
    assert f"{__file__}, line {branch.__code__.co_firstlineno + 1})" in str(error.value)
    assert isinstance(error.value.__cause__, jax.errors.TracerBoolConversionError)


def test_right_termination_functions_are_accepted():
    for function in (None, lambda s, a, n: n[0] > 2, lambda s, a, n: False, terminations.never):
        terminations.check(SPEC._replace(termination=function))


AGENTS = [
    (Linear, {"init": lambda self, key: {"w": "x"}}, "init returned ['w'] = str 'x' ("),
    (Linear, {"init": lambda self: 0}, "init() takes other arguments than the 1 that"),
    (Linear, {"act": lambda self, s, o, k: o[..., :1]}, "act returned float32 (1,) ("),
    (
        Linear,
        {"act": lambda self, s, o, k: (o[..., :1], o[..., :1])},
        "act returned log_density = float32 (1,) (",
    ),
    (Linear, {"deterministic_action": lambda self, s, o: o}, "returned action = float32 (3,) ("),
    (
        Linear,
        {"deterministic_action": lambda self, s, o: s["w"] @ o},
        "raised TypeError: dot_general requires",
    ),
    (Linear, {"value": lambda self, s, o, a: o[..., 0]}, "it must be float (C)"),
    (Linear, {"update": lambda self, s, *a: s}, "update returned a dict of (w) ("),
    (
        Linear,
        {"update": lambda self, s, *a: ({"w": s["w"].T}, {})},
        "update returned state['w'] = float32 (1, 3), not float32 (3, 1) (",
    ),
    (
        Linear,
        {"update": lambda self, s, *a: ({**s, "b": 1}, {})},
        "state = a dict of (w, b), another structure than a dict of (w) (",
    ),
    (Linear, {"update": lambda self, s, b, *a: (s, {"r": b.reward})}, "'r': float32 (16,) ("),
    (Linear, {"update": lambda self, s, b: (s, {})}, "update(s, b) takes other arguments"),
    (Linear, {"noise": lambda self, k, n: jnp.zeros(7)}, "it must be arrays (2, ...)"),
    (Linear, {"reset": lambda self, s, k: None}, "reset returned None, another structure"),
    (Linear, {"temperature": lambda self, s: s["w"]}, "temperature returned float32 (3, 1)"),
    (Linear, {"__init__": lambda self, x: None}, "Wrong(x) takes other arguments than the 3"),
    (Linear, {"act": None}, "the class Wrong has no act(self, state, obs, noise); define it"),
    (dynajax.Agent, {}, "has no act(self, state, obs, noise), deterministic_action(self, state, "),
    (Linear, {"Fields": int}, "its Fields is the class int; decorate it with @dynajax.fields"),
    (Linear, {"check": classmethod(lambda cls, c: c.x)}, "check raised AttributeError: 'Config'"),
    (Linear, {"check": lambda self, c: None}, "check(self, c) takes other arguments than the 1"),
    (SAC, {"aggregate_critics": lambda self, q: q.min()}, "aggregate_critics returned float32 ()"),
    (SAC, {"critic_loss": lambda self, q, t, w, n: q}, "critic_loss returned float32 (2, 16, 1)"),
    (SAC, {"optimizer": 1e-3}, "Wrong.optimizer is float 0.001"),
    (SAC, {"actor_network": property(lambda self: None)}, "actor_network returned None ("),
    (SAC, {"actor_network": lambda self: Dense()}, "decorate it with @property"),
    (SAC, {"actor_network": property(lambda self: Dense())}, "returned output = float32 (5,) ("),
    (
        SAC,
        {"critic_network": property(lambda self: Normalized())},
        "variables = a dict of (batch_stats, params) (",
    ),
]
OUTPUT = dynajax.TrustOutput
RULES = [
    (dynajax.TrustRule, {"apply": lambda self, s, p, *a: (s, OUTPUT())}, "apply is never called"),
    (Agreed, {"apply": lambda self, s, p, *a: OUTPUT()}, "apply returned TrustOutput(continue"),
    (Agreed, {"apply": lambda self, s, p: (s, OUTPUT())}, "apply(s, p) takes other arguments"),
    (
        Agreed,
        {"apply": lambda self, s, p, *a: (s, OUTPUT(keep_mask=p.mean.var(0) < 1))},
        "returned output.keep_mask = bool (400, 4) (",
    ),
    (
        Agreed,
        {"apply": lambda self, s, p, *a: (s, OUTPUT(continue_mask=p.sample[:, 0]))},
        "output.continue_mask = float32 (400,) (",
    ),
    (
        Agreed,
        {"apply": lambda self, s, p, *a: (s, OUTPUT(weight=p.sample[:, 0]))},
        "it must be None (or set uses_weights = True in its class)",
    ),
    (
        Agreed,
        {"init": lambda self: 0.0, "apply": lambda self, s, p, *a: (s > 0, OUTPUT())},
        "returned state = bool (), not float32 () (",
    ),
    (Agreed, {"sample": lambda self, p, h, k: p.mean}, "sample returned float32 (2, 400, 4) ("),
    (Agreed, {"calibrate": lambda self, s, p, c: c}, "another structure than None"),
]
MODEL_CASES = [
    (dynajax.DynamicsModel, {}, "the class Wrong has no has_variance, init(self, key, members), "),
    (MLPModel, {"make_network": lambda self, d, o: None}, "make_network returned None ("),
    (MLPModel, {"make_network": lambda self, d, o: Dense()}, "output = float32 (5,) ("),
    (
        dynajax.NeuralModel,
        {
            "make_network": lambda self, d, o: Dense(o),
            "decay": lambda self, layers: jnp.zeros(()),
        },
        "output_heads returned the path ('network', 'head'), but the parameters are {'network': ",
    ),
    (MLPModel, {"decay": lambda self, layers: layers["no"]}, "decay raised KeyError: 'no' ("),
    (MLPModel, {"loss": lambda self, p, s, b: b.reward}, "loss returned float32 (256,) ("),
    (
        MLPModel,
        {"predict_joint": lambda self, p, s, o, a: o},
        "predict_joint returned float32 (256, 3) (",
    ),
    (MLPModel, {"output_heads": lambda self: None}, "output_heads returned None ("),
    (MLPModel, {"has_variance": lambda self: True}, "it must be bool (); decorate it with @prop"),
    (MLPModel, {"init": lambda self, k, m: {"x": k}}, "returned ['x'] = uint32 (2,) ("),
]
LIKELIHOOD_CASES = [
    (dynajax.Likelihood, {}, "has no has_variance, outputs_per_target, loss(self, "),
    (Point, {"outputs_per_target": 3}, "Wrong.outputs_per_target is 3"),
    (Point, {"loss": lambda self, p, z, e: p.mean - z}, "loss returned float32 (256, 4) ("),
    (Point, {"read": lambda self, o, b: o}, "read returned float32 (256, 4) ("),
    (Point, {"has_variance": True}, "read returned .log_variance = None ("),
]
SOURCE_CASES = [
    (OnTheFly, {"prepare": lambda self, x: x}, "prepare(x) takes other arguments than the 6"),
    (OnTheFly, {"prepare": lambda self, x, *a: x.no}, "prepare raised AttributeError: 'Learner"),
    (OnTheFly, {"prepare": lambda self, x, s, m, r, *a: (x, r)}, "prepare returned a tuple of 2 ("),
    (
        OnTheFly,
        {
            "prepare": lambda self, x, s, m, r, *a: (
                x,
                UpdateInputs(jax.tree.map(lambda y: y[:1], r)),
                {},
            )
        },
        "prepare returned inputs.real.packed = float32 (1, 1, 16), valid = bool (1, 1) (",
    ),
    (
        OnTheFly,
        {"minibatches": lambda self, m, t, i: (t, [replay.to_minibatch(i.real)], {})},
        "minibatches returned minibatches[0].data.obs = float32 (1, 3) (",
    ),
    (OnTheFly, {"minibatches": lambda self, m, t, i: (t, [], {})}, "minibatches = a list of 0 "),
    (OnTheFly, {"start_shape": lambda self: 3}, "start_shape returned int 3 ("),
    (Buffered, {"init": lambda self: "x"}, "init returned str 'x' ("),
]
CASES = [
    *(("--agent", dynajax.AGENTS, "agent", *case) for case in AGENTS),
    *(("--trust", dynajax.TRUST, "trust", *case) for case in RULES),
    *(("--set model.network", MODELS, "model_network", *case) for case in MODEL_CASES),
    *(("--set model.likelihood", LIKELIHOODS, "model_likelihood", *c) for c in LIKELIHOOD_CASES),
    *(("--set rollout.source", SOURCES, "rollout_source", *case) for case in SOURCE_CASES),
]


@pytest.mark.parametrize(("flag", "entries", "keyword", "base", "members", "text"), CASES)
def test_wrong_method(monkeypatch, flag, entries, keyword, base, members, text):
    monkeypatch.setitem(entries, "wrong", wrong(base, members))
    found = line(check, **{keyword: "wrong"})
    assert found.startswith(f"{flag}=wrong: ") and text in found, found


def test_right_plug_ins_are_accepted(monkeypatch):
    for entries, base in (
        (dynajax.AGENTS, Linear),
        (dynajax.AGENTS, SAC),
        (dynajax.TRUST, Agreed),
        (MODELS, MLPModel),
        (LIKELIHOODS, Point),
        (SOURCES, Buffered),
        (SOURCES, OnTheFly),
    ):
        monkeypatch.setitem(entries, "mine", wrong(base, {}))
        keywords = {
            id(dynajax.AGENTS): "agent",
            id(dynajax.TRUST): "trust",
            id(MODELS): "model_network",
            id(LIKELIHOODS): "model_likelihood",
            id(SOURCES): "rollout_source",
        }
        check(**{keywords[id(entries)]: "mine"})


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"skip": lambda o, n, w: 0.9}, "the rule skip test_plugin_checks:<lambda> returned float"),
        ({"skip": lambda o, n: o[0]}, "(o, n) takes other arguments than the 3"),
        ({"skip": lambda o, n, w: o}, "returned float32 (1000, 3) ("),
        ({"skip": lambda o, n, w: o[0] if w.sum() > 1 else n[0]}, "in pure JAX (jnp.where"),
        ({"affine": lambda raw, w: raw.mean(0)}, "the rule affine test_plugin_checks:<lambda> ret"),
        ({"skip": 0.9}, "the rule skip is float 0.9; it must be a function"),
        ({}, "the Fix changes nothing; give it skip, affine or exponent"),
        ({"exponent": "half"}, "its exponent is str 'half'; it must be a number"),
    ],
)
def test_wrong_fix(monkeypatch, rules, text):
    monkeypatch.setitem(dynajax.FIXES, "wrong", dynajax.Fix("a wrong fix", **rules))
    found = line(fits.fit, SPEC, ["wrong"], [], 0)
    assert found.startswith("--fix=wrong: ") and text in found, found


def test_error_of_the_package_itself_is_not_hidden(monkeypatch):
    """An error that no line of the user raised or called keeps its type and traceback."""
    monkeypatch.setitem(MODELS, "mine", wrong(MLPModel, {}))
    monkeypatch.setattr(MLPModel, "output_heads", lambda self: 1 / 0)
    MLPModel.output_heads.__module__ = "dynajax.models.neural"
    monkeypatch.setattr(user_code, "_LIBRARIES", (str(ROOT),))
    monkeypatch.setattr(user_code, "_PACKAGE", str(ROOT / "tests"))
    with pytest.raises(ZeroDivisionError):
        check(model_network="mine")


def test_traceback_is_shown_on_request(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import dynajax\ndef ends(obs, action, next_obs):\n    return bool(next_obs[0] > 2)\n"
        "dynajax.register_termination('Pendulum-v1', ends)\n"
        "AGENT = 3\nclass Mine(dynajax.Agent):\n    pass\n"
    )

    def run(*arguments):
        command = [sys.executable, str(ROOT / "experiments" / "run.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and not (tmp_path / "runs").exists()
        return done.stderr

    short = run("--env=mine:Pendulum-v1")
    assert short.count("\n") == 1 and "mine.py, line 3)" in short
    assert short.endswith(" (--verbosity=1 shows the traceback)\n")
    full = run("--env=mine:Pendulum-v1", "--verbosity=1")
    assert "Traceback (most recent call last)" in full
    assert "return bool(next_obs[0] > 2)" in full


def test_misspelt_names_get_the_nearest_or_what_the_module_has():
    found = line(dynajax.make_config, "Pendulum-v1", agent="test_plugin_checks:Liner")
    assert found.endswith("the module 'test_plugin_checks' has no 'Liner'; it has Linear"), found
    found = line(dynajax.make_config, "Pendulum-v1", fixes="test_plugin_checks:typo")
    assert found.endswith("it has nothing that is a Fix"), found
    found = line(dynajax.make_config, "Pendulum-v1", algo="mpbo")
    assert found.endswith("the nearest is mbpo"), found
