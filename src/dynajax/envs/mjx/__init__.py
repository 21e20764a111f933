"""Tasks that run on the device: dm_control.suite's own on MJX, and Brax's, as pure JAX functions.

A name is one of `dynajax.envs` (`cheetah-run`), or `brax:NAME`. `make` gives functions for ONE
environment; the caller maps them over rows and scans them over time. Only `make` imports MJX or
Brax, which takes seconds.

An episode has no end of its own but `terminated`, and nothing is ever reset by itself: the caller
counts `spec.time_limit` steps and calls `reset` between episodes, where it costs least.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dynajax.types import Array, EnvSpec, UsageError

__all__ = ["EnvState", "Task", "make", "names"]

#: dm_control's tasks by domain; each domain is a module here.
SUITE = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse"),
    "cheetah": ("run",),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("upright", "swim"),
    "hopper": ("stand", "hop"),
    "humanoid": ("stand", "walk", "run"),
    "pendulum": ("swingup",),
    "point_mass": ("easy",),
    "quadruped": ("walk", "run"),
    "reacher": ("easy", "hard"),
    "swimmer": ("swimmer6", "swimmer15"),
    "walker": ("stand", "walk", "run"),
}
BRAX = ("ant", "halfcheetah", "hopper", "humanoid", "inverted_pendulum", "walker2d")

_REFUSED = {
    "dog": "its limbs are ellipsoids and boxes, whose contacts with each other MJX cannot compute",
    "quadruped-escape": "MJX cannot compute an ellipsoid's contacts with a height field",
}


class EnvState(NamedTuple):
    """One environment between two steps."""

    obs: Array  # (D,) float32
    physics: Any  # all that the next step depends on; a pytree of arrays


class Task(NamedTuple):
    """One environment as pure functions, to be jitted, mapped and scanned by the caller."""

    spec: EnvSpec
    #: key -> the first state of an episode. It can cost as much as many steps.
    reset: Callable[[Array], EnvState]
    #: (state, action (A,) in [-1, 1]) -> (next state, reward (), terminated () bool). Where the
    #: physics has become invalid, observation and reward are NaN, as on the host engine.
    step: Callable[[EnvState, Array], tuple[EnvState, Array, Array]]


def names() -> list[str]:
    """Every task that `make` makes."""
    suite = [f"{domain}-{task}" for domain, tasks in SUITE.items() for task in tasks]
    return [*suite, *(f"brax:{name}" for name in BRAX)]


def make(name: str) -> Task:
    """Makes a task in the precision that JAX has at this moment (see `jax_enable_x64`).

    Raises:
      UsageError: not a task of `names()`; the text says why.
    """
    if name not in names():
        domain = name.partition("-")[0]
        reason = _REFUSED.get(name) or _REFUSED.get(domain)
        if reason is None:
            reason = (
                f"not one of Brax's tasks here: {', '.join(BRAX)}"
                if name.startswith("brax:")
                else "not ported to the device"
            )
        rest = "" if name.startswith("brax:") else "; use --engine=host"
        raise UsageError(f"--env={name}: {reason}{rest}")
    if name.startswith("brax:"):
        from dynajax.envs.mjx import brax_tasks

        return brax_tasks.make(name)
    from dynajax.envs.mjx import suite

    return suite.make(name)
