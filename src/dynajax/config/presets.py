"""Named sizes and cadences: what `--preset` takes."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """The agent, values of fields by path, and of some agents' own fields."""

    summary: str
    agent: str  # unless another is asked for
    settings: Mapping[str, Any]
    agents: Mapping[str, Mapping[str, Any]]


#: What a field is where a preset does not name it is the paper's.
PRESETS: dict[str, Preset] = {
    # What learns most on two CPU cores in a few minutes; chosen by measurement (BUILD_NOTES.md).
    "quick": Preset(
        "a laptop's sizes",
        "simba",
        {
            "task.repeat": 2,
            "steps": 8_000,
            "random_steps": 1_000,
            "learn.utd": 10,
            "learn.batch": 128,
            "model.members": 5,
            "model.elites": 4,
            "model.width": 128,
            "model.depth": 3,
            "model.batch": 128,
            "model.learning_rate": 3e-3,
            "model.reward_from": "next_state",
            "model.fit_steps": 500,
            "model.max_holdout": 1000,
            "rollout.fresh": True,
            "rollout.real_fraction": 0.5,
            "rollout.batch": 200,
            "replay.real": 100_000,
            "replay.synthetic": 100_000,
            "eval.every": 1000,
            "eval.episodes": 5,
        },
        {
            "sac": {"hidden": (64, 64)},
            "simba": {
                "actor_width": 64,
                "critic_width": 64,
                "critic_blocks": 1,
                "critics": 2,
                "learning_rate": 3e-4,
                "initial_temperature": 1.0,
            },
        },
    ),
    "paper": Preset("the paper's sizes", "sac", {}, {}),
    # An ensemble that learns as much in a third of the gradient steps; chosen by measurement
    # (BUILD_NOTES.md, "Less arithmetic for the same learning").
    "fast": Preset(
        "the paper's sizes, with faster fits",
        "sac",
        {"model.learning_rate": 2e-3, "model.fit_steps": 1650, "model.weight_averaging_steps": 100},
        {},
    ),
    # `quick` grown to a GPU's sizes, with `fast`'s fits. Not tried on one yet.
    "modern": Preset(
        "a residual network's sizes on a GPU",
        "simba",
        {
            "task.repeat": 2,
            "steps": 250_000,
            "random_steps": 2_500,
            "learn.utd": 10,
            "model.learning_rate": 2e-3,
            "model.fit_steps": 1650,
            "model.weight_averaging_steps": 100,
            "model.reward_from": "next_state",
            "rollout.fresh": True,
            "rollout.real_fraction": 0.5,
        },
        {"simba": {"critics": 2, "initial_temperature": 1.0}},
    ),
}
