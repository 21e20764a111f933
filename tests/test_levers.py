"""Every agent, every rule of trust and every way to use a model: on both engines, and resumed."""

import jax
import numpy as np
import pytest

from conftest import SMALL_OF_ANY
from dynajax import UsageError, make_config, train
from dynajax.agents import AGENTS
from dynajax.trust import TRUST

SIZES = SMALL_OF_ANY | {
    "eval.every": 60,
    "eval.episodes": 1,
    "model.fit_every": 30,
    "replay.real": 400,
}
#: Small networks of each agent.
NETWORKS = {
    "sac": {"agent.hidden": (8, 8), "agent.critic_layer_norm": True},
    "simba": {"agent.actor_width": 8, "agent.critic_width": 8, "agent.critic_blocks": 1},
    "bro": {
        "agent.actor_width": 8,
        "agent.critic_width": 8,
        "agent.critic_blocks": 1,
        "agent.quantiles": 5,
        "learn.reset_at": (70, 95),
    },
}
#: What each is tried with; all agents and all rules are here, and every lever once.
LEVERS = {
    "sac": ("none", {"rollout.on_top": True, "rollout.random_action_fraction": 0.5}),
    "simba": (
        "macura",
        {
            "rollout.fresh": True,
            "rollout.real_fraction": 0.5,
            "rollout.value_expansion_steps": 1,
            "task.repeat": 2,
        },
    ),
    "bro": ("m2ac", {"rollout.real_fraction": 0.0, "rollout.horizon": 2}),
    "simba, infoprop": ("infoprop", {"rollout.horizon": 3, "rollout.state_noise": 0.0}),
    "sac, penalty": (
        "penalty",
        {
            "model.reward_from": "next_state",
            "trust.kind": "spread",
            "rollout.value_expansion_steps": 2,
        },
    ),
    "simba, weight": (
        "weight",
        {
            "rollout.fresh": True,
            "rollout.on_top": True,
            "model.epochs": 2.0,
            "precision": "bfloat16",
        },
    ),
}


def test_nothing_is_left_out():
    assert {name.split(",")[0] for name in LEVERS} == {*NETWORKS} <= {*AGENTS}
    assert {rule for rule, _ in LEVERS.values()} <= {*TRUST}
    assert {rule for rule, _ in LEVERS.values()} >= {
        *("none", "macura", "m2ac", "infoprop", "penalty", "weight")
    }


def configured(name, engine, steps, **arguments):
    agent = name.split(",")[0]
    trust, settings = LEVERS[name]
    arguments = {"fixes": ["none", "scale,target"]} | arguments
    return make_config(
        "pendulum-swingup",
        agent=agent,
        trust=trust,
        preset="paper",
        steps=steps,
        engine=engine,
        settings=SIZES | NETWORKS[agent] | settings,
        **arguments,
    )


# The device engine compiles for half a minute, so there each agent is tried once.
@pytest.mark.parametrize(
    ("name", "engine"), [(n, "host") for n in LEVERS] + [(n, "mjx") for n in NETWORKS]
)
def test_a_run_goes_on_to_the_bit_with_two_codes_as_rows(tmp_path, name, engine, traced):
    whole = train(configured(name, engine, 120), tmp_path / "whole", quiet=True)
    # Once for what the programs need, before the first step, and for the steps; the device engine
    # has a program of steps for each length of a segment.
    assert (traced["fit"], traced["value"]) == (1, 1)
    assert traced["learn"] == 1 or engine == "mjx"
    train(configured(name, engine, 60), tmp_path / "parts", quiet=True)
    parts = train(configured(name, engine, 120), tmp_path / "parts", quiet=True)
    leaves = jax.tree.leaves(whole.state), jax.tree.leaves(parts.state)
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)
    # The rows are of different codes, and so of different models and agents, all of them numbers.
    rows = whole.state.learners
    for network in (rows.agent.actor, rows.model.params):
        for leaf in jax.tree.leaves(network):
            assert np.isfinite(leaf).all()
    kernel = jax.tree.leaves(rows.model.params["layers"]["head"])[0]
    assert not np.array_equal(kernel[0], kernel[1])


def test_what_does_not_go_together_is_refused_in_one_line():
    for name, arguments, says in (
        ("simba", {"oracle": "reward"}, "--trust=macura: .*oracle"),
        (
            "simba, weight",
            {"oracle": "reward"},
            "rollout.fresh=true: .*oracle|--trust=uncertainty_weight",
        ),
    ):
        with pytest.raises(UsageError, match=says) as refused:
            configured(name, "host", 60, **arguments)
        assert "\n" not in str(refused.value)
    for trust, settings, says in (
        ("m2ac", {"model.members": 1, "model.elites": 1}, "--trust=m2ac: .*model.members above 1"),
        ("none", {"task.repeat": 0}, "task.repeat=0: it must be at least 1"),
        ("none", {"rollout.fresh": True, "rollout.horizon": (0, 9, 1, 5)}, "must be one number"),
        ("none", {"rollout.real_fraction": 1.5}, "at least 0 and at most 1"),
        (
            "none",
            {"rollout.value_expansion_steps": -1},
            "rollout.value_expansion_steps=-1: it must be at least 0",
        ),
        (
            "none",
            {"rollout.value_expansion_steps": 1, "rollout.random_action_fraction": 0.5},
            "expand=1: .*rollout.random_action_fraction=0",
        ),
        (
            "infoprop",
            {"rollout.value_expansion_steps": 1},
            "expand=1: --trust=infoprop keeps account",
        ),
        ("none", {"model.reward_from": "s'"}, "choose one of inputs, next_state"),
        ("none", {"model.epochs": -1}, "it must be at least 0"),
    ):
        with pytest.raises(UsageError, match=says) as refused:
            make_config("pendulum-swingup", trust=trust, preset="paper", settings=settings)
        assert "\n" not in str(refused.value)
