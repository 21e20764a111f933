"""Decide which runs are seeds of one method.

Runs are of one method if they differ only in settings that do not change what is learned, or how a
return is measured: those in `NOT_METHOD`. Every other setting counts as method, also one that is
added later, because joining two methods is worse than showing one twice.
"""

from collections.abc import Mapping
from typing import Any

from dynajax import config

#: Settings in which the runs of one method may differ.
NOT_METHOD = (
    "env",  # runs of different tasks are never joined
    "variants",  # each variant of a run is a curve of its own
    "seed",
    "seeds",
    "steps",  # the number of steps; a shorter run is the beginning of a longer one
    "eval.every",
    "eval.episodes",
    "eval.checkpoints",
    "host.workers",  # the processes that step the environments
)
#: Settings that describe a task. On different tasks a method may differ in them, too.
TASK = ("task.repeat", "host.time_limit")
#: Settings that a model-free run has but does not use.
_OF_MODEL = ("model.", "rollout.", "source.", "trust.", "replay.synthetic")


def method_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the settings in which another method differs, as "learn.utd=1".

    Args:
      old, new: configurations of two runs, as in config.json.

    Returns:
      The values in `new`; empty if the runs are of one method.
    """
    ignored = NOT_METHOD if old["env"] == new["env"] else NOT_METHOD + TASK
    model_free = old["algo"] == new["algo"] == "model-free"
    changes = []
    for line in config.difference(old, new):
        path, _, change = line.partition(": ")
        if path in ignored or (model_free and path.startswith(_OF_MODEL)):
            continue
        changes.append(f"{path}={change.rsplit(' -> ', 1)[1]}")
    return changes
