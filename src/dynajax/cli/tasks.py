"""List the tasks with their sizes and the engines that run them.

  dynajax tasks
  dynajax tasks humanoid Pendulum

Arguments select the tasks whose name contains one of them. D and A are the sizes of an observation
and of an action; frames are the steps of the simulator in an episode. The column "ends" says whether
an episode can end earlier: "rule" if dynajax knows the condition, "?" if `register_termination` has
to define it. A task of your own is listed by its full name, such as own_task:Cart-v0.
"""

import warnings
from collections.abc import Iterator, Sequence

import gymnasium

from dynajax import envs
from dynajax.envs import dmc, mjx, terminations
from dynajax.types import EnvSpec, UsageError


def select_names(words: Sequence[str]) -> list[str]:
    """Return the names of dm_control's, Gymnasium's and Brax's tasks that contain one of `words`.

    A word of the form module:name is a name itself.
    """
    known = [*dmc.names(), *sorted(gymnasium.registry), *(f"brax:{name}" for name in mjx.BRAX)]
    given = [word for word in words if ":" in word and word not in known]
    selected = [n for n in known if not words or any(w.lower() in n.lower() for w in words)]
    return [*selected, *given]


def list_tasks(words: Sequence[str]) -> Iterator[str]:
    """Yield a header and a line for each task, as soon as it is known.

    Raises:
      UsageError: there is no task, or one of the form module:name cannot be made.
    """
    count = 0
    for name in select_names(words):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                spec = envs.spec(name)
        except UsageError:
            if ":" in name and name in words:
                raise
            # It has discrete actions, or needs a package that is not installed.
            continue
        if not count:
            yield f"{'task':<34}{'D':>5}{'A':>4}{'frames':>8}  {'ends':<6}engines"
        count += 1
        yield format_task(spec)
    if not count:
        raise UsageError(f"{' '.join(words)}: no task has that in its name; leave it out for all")


def format_task(spec: EnvSpec) -> str:
    """Return the line of one task."""
    rule = spec.termination
    ends = "?" if rule is None else "never" if rule is terminations.never else "rule"
    name = spec.name if spec.name.startswith("brax:") else spec.name.rpartition(":")[2]
    host = not spec.name.startswith("brax:") and name not in mjx.registered()
    engines = [*(["host"] if host else []), *(["mjx"] if name in mjx.TASKS else [])]
    return (
        f"{spec.name:<34}{spec.obs_dim:>5}{spec.action_dim:>4}{spec.time_limit:>8}  {ends:<6}"
        f"{', '.join(engines)}"
    )


def main(words: Sequence[str]) -> int:
    """Print the tasks."""
    for line in list_tasks(words):
        print(line, flush=True)
    return 0
