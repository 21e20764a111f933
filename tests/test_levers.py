"""Every agent, trust rule and way to use a model: trained on both engines, and resumed."""

import jax
import numpy as np
import pytest

from dynajax import UsageError, make_config, train
from dynajax.agents import AGENTS
from dynajax.synthetic import SOURCES
from dynajax.trust import TRUST
from sizes import NETWORKS, SMALL_OF_ANY

SIZES = SMALL_OF_ANY | {
    "eval.every": 60,
    "eval.episodes": 1,
    "model.fit_every": 30,
    "replay.real": 400,
}
#: More settings of each agent.
AGENT_SETTINGS = {
    "sac": {"agent.critic_layer_norm": True},
    "simba": {},
    "bro": {"learn.reset_at": (70, 95)},
}
#: Trust rule and settings by agent and label; all agents and trust rules occur, and every lever.
LEVERS = {
    "sac": (
        "none",
        {
            "rollout.mixing": "separate",
            "rollout.random_action_fraction": 0.5,
            "model.network": "resnet",
            "model.likelihood": "deterministic",
        },
    ),
    "simba": (
        "macura",
        {
            "rollout.source": "on_the_fly",
            "rollout.real_fraction": 0.5,
            "rollout.value_expansion_steps": 1,
            "task.repeat": 2,
        },
    ),
    "bro": ("m2ac", {"rollout.real_fraction": 0.0, "rollout.horizon": 2}),
    "simba, infoprop": ("infoprop", {"rollout.horizon": 3}),
    "sac, penalty": (
        "penalty",
        {
            "model.reward_from": "next_state",
            "trust.kind": "epistemic",
            "rollout.value_expansion_steps": 2,
        },
    ),
    "simba, uncertainty_weight": (
        "uncertainty_weight",
        {
            "rollout.source": "on_the_fly",
            "rollout.mixing": "separate",
            "model.epochs": 2.0,
            "precision": "bfloat16",
        },
    ),
    "sac, regenerated": (
        "uncertainty_weight",
        {
            "source.regenerate_every": 20,
            "rollout.start_window": 40,
            "rollout.mixing": "separate",
            "rollout.state_noise": 0.0,
            "rollout.reward_noise": 0.0,
        },
    ),
    "simba, value_weight": (
        "value_weight",
        {
            "rollout.source": "on_the_fly",
            "rollout.real_fraction": 0.5,
            "trust.per_transition": True,
            "learn.hold_noise": 4,
            "replay.age_decay": 0.98,
        },
    ),
    "sac, expansion": ("none", {"rollout.source": "none", "rollout.value_expansion_steps": 1}),
}


def test_all_agents_trust_rules_and_sources_are_tried():
    assert {name.split(",")[0] for name in LEVERS} == {*NETWORKS} == {*AGENT_SETTINGS} <= {*AGENTS}
    assert {rule for rule, _ in LEVERS.values()} <= {*TRUST}
    assert {rule for rule, _ in LEVERS.values()} >= {
        *("none", "macura", "m2ac", "infoprop", "penalty", "uncertainty_weight"),
        "value_weight",
    }
    sources = {settings.get("rollout.source", "buffered") for _, settings in LEVERS.values()}
    assert sources == {"none", "buffered", "on_the_fly"} <= {*SOURCES}


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
        settings=SIZES | NETWORKS[agent] | AGENT_SETTINGS[agent] | settings,
        **arguments,
    )


# Compiling for the device engine takes half a minute, so it is tried once with each agent.
@pytest.mark.parametrize(
    ("name", "engine"), [(n, "host") for n in LEVERS] + [(n, "mjx") for n in NETWORKS]
)
def test_run_of_two_variants_resumes_bit_for_bit(tmp_path, name, engine, traced):
    whole = train(configured(name, engine, 120), tmp_path / "whole", quiet=True)
    # One trace serves the memory estimate and all steps; the device engine has one program of
    # steps for each segment length.
    assert (traced["fit"], traced["value"]) == (1, 1)
    assert traced["learn"] == 1 or engine == "mjx"
    train(configured(name, engine, 60), tmp_path / "parts", quiet=True)
    parts = train(configured(name, engine, 120), tmp_path / "parts", quiet=True)
    leaves = jax.tree.leaves(whole.state), jax.tree.leaves(parts.state)
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)
    # The variants have different models and agents, all of them finite.
    learners = whole.state.learners
    for network in (learners.agent.actor, learners.model.params):
        for leaf in jax.tree.leaves(network):
            assert np.isfinite(leaf).all()
    kernel = learners.model.params["network"]["head"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


def test_incompatible_settings_are_refused_in_one_line():
    for name, arguments, says in (
        ("simba", {"oracle": "reward"}, "--oracle=reward: .*rollout.source=buffered"),
        ("bro", {"oracle": "reward"}, "--oracle=reward: .*rollout.horizon=1"),
        ("sac, regenerated", {"oracle": "reward"}, "--oracle=reward: --trust=uncertainty_weight "),
    ):
        with pytest.raises(UsageError, match=says) as refused:
            configured(name, "host", 60, **arguments)
        assert "\n" not in str(refused.value)
    for trust, settings, says in (
        ("m2ac", {"model.members": 1, "model.elites": 1}, "--trust=m2ac: .*model.members above 1"),
        ("none", {"task.repeat": 0}, "task.repeat=0: it must be at least 1"),
        (
            "none",
            {"rollout.source": "on_the_fly", "rollout.horizon": (0, 9, 1, 5)},
            "must be one number",
        ),
        ("none", {"rollout.real_fraction": 1.5}, "at least 0 and at most 1"),
        (
            "none",
            {"rollout.value_expansion_steps": -1},
            "rollout.value_expansion_steps=-1: it must be at least 0",
        ),
        (
            "none",
            {"rollout.value_expansion_steps": 1, "rollout.random_action_fraction": 0.5},
            "value_expansion_steps=1: .*rollout.random_action_fraction=0",
        ),
        (
            "infoprop",
            {"rollout.value_expansion_steps": 1},
            "value_expansion_steps=1: --trust=infoprop keeps a state",
        ),
        (
            "uncertainty_weight",
            {"rollout.value_expansion_steps": 1},
            "value_expansion_steps=1: --trust=uncertainty_weight weights synthetic transitions",
        ),
        (
            "infoprop",
            {"rollout.reward_noise": 0},
            "rollout.reward_noise=0: --trust=infoprop has a variance of its own",
        ),
        (
            "none",
            {"model.max_holdout": 50_000},
            "max_holdout=50000: it must be at least 1 and at most 46340",
        ),
        ("none", {"model.reward_from": "s'"}, "choose one of inputs, next_state"),
        ("none", {"rollout.mixing": "both"}, "choose one of mixed, separate"),
        ("none", {"source.regenerate_every": -1}, "it must be at least 0"),
        ("none", {"model.epochs": -1}, "it must be at least 0"),
    ):
        with pytest.raises(UsageError, match=says) as refused:
            make_config("pendulum-swingup", trust=trust, preset="paper", settings=settings)
        assert "\n" not in str(refused.value)
