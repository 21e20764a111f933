"""Named sizes and cadences: what `--preset` takes.

A preset sets sizes and the default agent; the algorithm decides how synthetic data are generated
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


# For two CPU cores: the sizes of a model that learns most in a few minutes, and a SimBa with two
# critics, each by measurement.
_LAPTOP: dict[str, Any] = {
    "task.repeat": 2,
    "random_steps": 1_000,
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
}
_LAPTOP_SIMBA: dict[str, Any] = {
    "critics": 2,
    "learning_rate": 3e-4,
    "initial_temperature": 1.0,
}

#: A field that a preset does not name keeps its default, which is the value of the preset `paper`.
PRESETS: dict[str, Preset] = {
    # The agent that learns most in the first minutes.
    "quick": Preset(
        "sizes for a laptop, minutes",
        "simba",
        _LAPTOP | {"steps": 8_000, "learn.utd": 10, "eval.every": 1000, "eval.episodes": 5},
        {
            "sac": {"hidden": (64, 64)},
            "simba": _LAPTOP_SIMBA | {"actor_width": 64, "critic_width": 64, "critic_blocks": 1},
        },
    ),
    # The agent that learns most in 100,000 frames, selected on three tasks (results/agent).
    "medium": Preset(
        "sizes for a laptop, half an hour",
        "simba",
        _LAPTOP | {"steps": 50_000, "learn.utd": 6, "eval.every": 5000, "eval.episodes": 10},
        {
            "sac": {"hidden": (128, 128)},
            "simba": _LAPTOP_SIMBA | {"actor_width": 96, "critic_width": 96, "critic_blocks": 2},
        },
    ),
    # The code of *Stealing That Free Lunch*, the earlier code of the authors of *Fixing That Free Lunch*.
    "paper": Preset("SAC with the sizes of Stealing That Free Lunch", "sac", {}, {}),
    # An ensemble with a lower holdout error in a third of the gradient steps, by measurement; on some
    # tasks its reward R^2 is lower (docs/speed.md).
    "fast": Preset(
        "the sizes of paper, with shorter fits",
        "sac",
        {"model.learning_rate": 2e-3, "model.fit_steps": 1650, "model.weight_averaging_steps": 100},
        {},
    ),
    # The sizes of `quick` grown for a GPU, with the fits of `fast`. Not measured on a GPU yet.
    "modern": Preset(
        "SimBa with its published widths, for a GPU",
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
