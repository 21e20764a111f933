"""Named sizes and cadences: what `--preset` takes.

A preset sets sizes and the default agent; how synthetic data are made is the algorithm's business
(`algorithms.py`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A default agent, values of fields by path, and of some agents' own fields."""

    summary: str
    agent: str  # unless --agent names another
    settings: Mapping[str, Any]
    agents: Mapping[str, Mapping[str, Any]]


#: A field that a preset does not name keeps its default, which is the paper's value.
PRESETS: dict[str, Preset] = {
    # The sizes that learn most on two CPU cores in a few minutes, by measurement.
    "quick": Preset(
        "sizes for a laptop, minutes",
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
            "model.fit_steps": 500,
            "model.max_holdout": 1000,
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
    "paper": Preset("the paper's sizes and agent", "sac", {}, {}),
    # An ensemble that learns as much in a third of the gradient steps, by measurement.
    "fast": Preset(
        "the paper's sizes, with shorter fits",
        "sac",
        {"model.learning_rate": 2e-3, "model.fit_steps": 1650, "model.weight_averaging_steps": 100},
        {},
    ),
    # The sizes of `quick` grown for a GPU, with the fits of `fast`. Not measured on a GPU yet.
    "modern": Preset(
        "SimBa's sizes, for a GPU",
        "simba",
        {
            "task.repeat": 2,
            "steps": 250_000,
            "random_steps": 2_500,
            "learn.utd": 10,
            "model.learning_rate": 2e-3,
            "model.fit_steps": 1650,
            "model.weight_averaging_steps": 100,
        },
        {"simba": {"critics": 2, "initial_temperature": 1.0}},
    ),
}
