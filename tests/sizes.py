"""Settings with which programs compile and run in seconds."""

from collections.abc import Mapping
from typing import Any

from dynajax.config import MODEL_GROUPS

#: For any agent.
SMALL_OF_ANY = {
    "random_steps": 50,
    "learn.utd": 2,
    "learn.batch": 20,
    "model.members": 3,
    "model.elites": 2,
    "model.width": 8,
    "model.depth": 2,
    "model.batch": 16,
    "model.schedule": "fixed",
    "model.fit_steps": 20,
    "model.round_steps": 10,
    "model.patience": 3,
    "model.max_holdout": 40,
    "rollout.batch": 8,
    "replay.real": 120,
    "replay.synthetic": 64,
    "eval.every": 10,
}
#: Networks of each agent.
NETWORKS = {
    "sac": {"agent.hidden": (8, 8)},
    "simba": {"agent.actor_width": 8, "agent.critic_width": 8, "agent.critic_blocks": 1},
    "bro": {
        "agent.actor_width": 8,
        "agent.critic_width": 8,
        "agent.critic_blocks": 1,
        "agent.quantiles": 5,
    },
}
#: For the agent sac.
SMALL = SMALL_OF_ANY | NETWORKS["sac"]
#: For a run of hundreds of steps with several fits and evaluations, of any agent.
SHORT_RUN = SMALL_OF_ANY | {
    "random_steps": 100,
    "model.fit_every": 50,
    "replay.real": 1000,
    "replay.synthetic": 1000,
    "eval.every": 100,
    "eval.episodes": 2,
}


def without_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a model-free run takes."""
    return {name: x for name, x in settings.items() if name.split(".")[0] not in MODEL_GROUPS}


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as command line flags."""
    texts = {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in settings.items()
    }
    return [f"--set={name}={value}" for name, value in texts.items()]
