"""List the tasks with their sizes and the engines that run them.

  dynajax tasks
  dynajax tasks humanoid Pendulum

Arguments select the tasks whose name contains one of them. A task of your own is listed by its full
name, such as own_task:Cart-v0.
"""

import warnings
from collections.abc import Iterator, Sequence

import gymnasium

from dynajax import envs
from dynajax.envs import dmc, mjx, terminations
from dynajax.types import EnvSpec, UsageError

_LEGEND = """
obs, action: sizes of an observation and an action; frames: steps of the simulator in a whole episode
terminates: "no", "yes" (dynajax knows the condition), or "?" (an algorithm with a model needs
  dynajax.register_termination); engines: host is the CPU, mjx an accelerator (--engine)"""


def select_names(words: Sequence[str]) -> list[str]:
    """Return the names of dm_control's, Gymnasium's and Brax's tasks that contain one of `words`.

    A word of the form module:name is a name itself.
    """
    known = [*dmc.names(), *sorted(gymnasium.registry), *(f"brax:{name}" for name in mjx.BRAX)]
    given = [word for word in words if ":" in word and word not in known]
    selected = [n for n in known if not words or any(w.lower() in n.lower() for w in words)]
    return [*selected, *given]


def list_tasks(words: Sequence[str]) -> Iterator[str]:
    """Yield a header, a line for each task as soon as it is known, and what the columns mean.

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
            yield f"{'task':<34}{'obs':>5}{'action':>8}{'frames':>8}  {'terminates':<12}engines"
        count += 1
        yield format_task(spec)
    if not count:
        raise UsageError(f"{' '.join(words)}: no task has that in its name; leave it out for all")
    yield _LEGEND


def format_task(spec: EnvSpec) -> str:
    """Return the line of one task."""
    rule = spec.termination
    terminates = "?" if rule is None else "no" if rule is terminations.never else "yes"
    name = spec.name if spec.name.startswith("brax:") else spec.name.rpartition(":")[2]
    host = not spec.name.startswith("brax:") and name not in mjx.registered()
    engines = [*(["host"] if host else []), *(["mjx"] if name in mjx.TASKS else [])]
    return (
        f"{spec.name:<34}{spec.obs_dim:>5}{spec.action_dim:>8}{spec.time_limit:>8}  "
        f"{terminates:<12}{', '.join(engines)}"
    )


def main(words: Sequence[str]) -> int:
    """Print the tasks."""
    for line in list_tasks(words):
        print(line, flush=True)
    return 0
