"""Lists the tasks that there are: their sizes, and which engines run them.

  dynajax tasks
  dynajax tasks humanoid Pendulum

Words narrow the list to names that have one of them. D and A are the entries of an observation and
of an action; frames are the simulator's steps of an episode; "ends" says whether an episode can end
before that ("rule": dynajax knows when, "?": `register_termination` can tell it). A module of yours
adds its own by its name, as in my_module:MyEnv-v0.
"""

import warnings
from collections.abc import Iterator, Sequence

import gymnasium

from dynajax import envs
from dynajax.envs import dmc, mjx, terminations
from dynajax.types import EnvSpec, UsageError


def names(words: Sequence[str]) -> list[str]:
    """dm_control's tasks, Gymnasium's and Brax's, with the words' own."""
    every = [*dmc.names(), *sorted(gymnasium.registry), *(f"brax:{name}" for name in mjx.BRAX)]
    own = [word for word in words if ":" in word and word not in every]
    chosen = [n for n in every if not words or any(w.lower() in n.lower() for w in words)]
    return [*chosen, *own]


def listed(words: Sequence[str]) -> Iterator[str]:
    """A line for each task, as soon as it is known.

    Raises:
      UsageError: there is none, or a named one cannot be made.
    """
    count = 0
    for name in names(words):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                spec = envs.spec(name)
        except UsageError:
            if ":" in name and name in words:
                raise
            # Discrete actions, or a package that is not installed.
            continue
        if not count:
            yield f"{'task':<34}{'D':>5}{'A':>4}{'frames':>8}  {'ends':<6}engines"
        count += 1
        yield line(spec)
    if not count:
        raise UsageError(f"{' '.join(words)}: no task has that in its name; leave it out for all")


def line(spec: EnvSpec) -> str:
    """One task's."""
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
    for text in listed(words):
        print(text, flush=True)
    return 0
