"""Published algorithms as rows of the same switches: what `--algo` takes.

A row sets how synthetic data are generated and used. It sets neither the agent (`--agent`) nor, apart
from WIMLE's number of rollouts, sizes (`--preset`). `--fix`, `--trust` and `--set` override it.
docs/algorithms.md compares each row with its paper.
"""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

from dynajax.config import Config
from dynajax.config.schema import RolloutConfig


class Algorithm(NamedTuple):
    """One row of the table."""

    title: str
    paper: str
    settings: Mapping[str, Any]  # values of fields by path
    trust: str = "none"  # trust rule, unless --trust names another
    fix: str = ""  # fixes, unless --fix names others
    agent: str | None = "sac"  # of the paper, None if there is none of that kind here


#: The data recipe of MBPO as published.
_MBPO: dict[str, Any] = {
    "rollout.source": "buffered",
    "rollout.mixing": "mixed",
    "rollout.real_fraction": 0.05,
    "rollout.horizon": (1,),
    "model.reward_from": "inputs",
}

ALGORITHMS: dict[str, Algorithm] = {
    "model-free": Algorithm(
        "model-free", "SAC, SimBa or BRO, by --agent", {"rollout.source": "none"}
    ),
    "mbpo": Algorithm("MBPO", "Janner et al., 2019", _MBPO),
    "m2ac": Algorithm("M2AC", "Pan et al., 2020", {**_MBPO, "rollout.horizon": (10,)}, "m2ac"),
    "macura": Algorithm(
        "MACURA", "Frauenknecht et al., 2024", {**_MBPO, "rollout.horizon": (10,)}, "macura"
    ),
    "infoprop": Algorithm(
        "Infoprop", "Frauenknecht et al., 2025", {**_MBPO, "rollout.horizon": (100,)}, "infoprop"
    ),
    # Offline in the paper; here its penalty is applied online.
    "mopo": Algorithm(
        "MOPO, online", "Yu et al., 2020", {**_MBPO, "rollout.horizon": (5,)}, "penalty"
    ),
    "mve": Algorithm(
        "MVE",
        "Feinberg et al., 2018",
        {
            "rollout.source": "none",
            "rollout.value_expansion_steps": 1,
            "model.reward_from": "inputs",
        },
        agent=None,
    ),
    "mad-td": Algorithm(
        "MAD-TD",
        "Voelcker et al., 2025",
        {
            "rollout.source": "on_the_fly",
            "rollout.mixing": "mixed",
            "rollout.real_fraction": 0.95,
            "rollout.horizon": (1,),
            "model.reward_from": "inputs",
        },
        agent=None,
    ),
    "wimle": Algorithm(
        "WIMLE",
        "Aghabozorgi et al., 2026",
        {
            "rollout.source": "buffered",
            "source.regenerate_every": 1000,
            "rollout.start_window": 100_000,
            "rollout.batch": 10_000,
            "rollout.mixing": "separate",
            "rollout.horizon": (1,),
            "rollout.state_noise": 0.0,
            "rollout.reward_noise": 0.0,
            "model.reward_from": "inputs",
        },
        "uncertainty_weight",
        agent="bro",
    ),
    "dynajax": Algorithm(
        "dynajax",
        "this project",
        {
            "rollout.source": "on_the_fly",
            "rollout.mixing": "mixed",
            "rollout.real_fraction": 0.5,
            "rollout.horizon": (1,),
            "model.reward_from": "next_state",
        },
        fix="scale,auto,beta",
    ),
}


def describe(config: Config) -> str:
    """Return one line that says which algorithm a run is, and how far it is from the published one.

    For example "MBPO (Janner et al., 2019) with scale,target; agent simba, preset quick: not the
    paper's agent or sizes".
    """
    row = ALGORITHMS[config.algo]
    if not config.has_model:
        return f"model-free; agent {config.agent_name}, preset {config.preset}"
    names = " | ".join(v.name for v in config.variants)
    text = f"{row.title} ({row.paper}) " + (f"with {names}" if names != "none" else "without fixes")
    if config.trust_name != row.trust:
        text += f", trust rule {config.trust_name}"
    defaults = {f"rollout.{f.name}": f.default for f in dataclasses.fields(RolloutConfig)}
    del defaults["rollout.batch"]  # a size
    expected = {**defaults, **row.settings}
    changed = [path for path, value in expected.items() if _get(config, path, value) != value]
    if changed:
        text += f", changed: {', '.join(changed)}"
    for name, usual in (("network", "mlp"), ("likelihood", "gaussian")):
        if (value := getattr(config.model, name)) != usual:
            text += f", {name} {value}"
    if config.oracle != "none":
        text += f", oracle {config.oracle}"
    text += f"; agent {config.agent_name}, preset {config.preset}"
    if config.algo == "dynajax":
        return text
    same_agent = config.agent_name == row.agent
    if config.algo == "mbpo" and same_agent and config.preset == "paper":
        return text
    return text + ": not the paper's " + ("sizes" if same_agent else "agent or sizes")


def _get(config: Config, path: str, missing: Any) -> Any:
    """Return a field by path; a source without the field is named by rollout.source already."""
    try:
        return operator.attrgetter(path)(config)
    except AttributeError:
        return missing
