"""Termination conditions of Gymnasium tasks, as pure functions for model rollouts.

Each function takes one transition (obs (D,), action (A,), next_obs (D,)) and returns a bool scalar,
which is True if the simulator would return `terminated`. The conditions are those of gymnasium
1.4's MuJoCo tasks with default arguments (v4 and v5 are equal) and depend only on `next_obs`. For
an observation that is not finite they return what the task returns.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import user_code
from dynajax.types import Array, EnvSpec, Termination, UsageError

#: Terminations, real or predicted, from which on a function that is always wrong is refused.
_ENOUGH = 5
#: Share of the terminations that may differ: a task compares in float64, the function in float32.
_TOLERANCE = 0.01
#: What a task must do whose episodes end at a time limit.
TIME_LIMIT = "a time limit must be returned as truncated, not as terminated"


def never(obs: Array, action: Array, next_obs: Array) -> Array:
    """Return False: episodes end only at the time limit (dm_control, HalfCheetah, Pendulum)."""
    return jnp.zeros((), bool)


def inverted_pendulum(obs: Array, action: Array, next_obs: Array) -> Array:
    """Return True if the pole leans by more than 0.2 rad."""
    return ~(jnp.all(jnp.isfinite(next_obs)) & (jnp.abs(next_obs[1]) <= 0.2))


def hopper(obs: Array, action: Array, next_obs: Array) -> Array:
    """Return True if the torso is at 0.7 m or lower, leans by 0.2 rad or more, or leaves +-100.

    The task compares raw velocities with 100 but returns them clipped to +-10. From the observation
    only a NaN velocity can be detected.
    """
    height, angle = next_obs[0], next_obs[1]
    in_range = jnp.all(jnp.abs(next_obs[1:]) < 100)
    return ~(in_range & (height > 0.7) & (height < jnp.inf) & (jnp.abs(angle) < 0.2))


def walker2d(obs: Array, action: Array, next_obs: Array) -> Array:
    """Return True if the torso is outside 0.8 to 2 m, or leans by 1 rad or more."""
    height, angle = next_obs[0], next_obs[1]
    return ~((height > 0.8) & (height < 2.0) & (jnp.abs(angle) < 1.0))


def ant(obs: Array, action: Array, next_obs: Array) -> Array:
    """Return True if the torso is outside 0.2 to 1 m, or the state is not finite."""
    height = next_obs[0]
    return ~(jnp.all(jnp.isfinite(next_obs)) & (height >= 0.2) & (height <= 1.0))


def humanoid(obs: Array, action: Array, next_obs: Array) -> Array:
    """Return True if the torso is outside 1 to 2 m."""
    height = next_obs[0]
    return ~((height > 1.0) & (height < 2.0))


_BY_TASK: dict[str, Termination] = {
    "InvertedPendulum": inverted_pendulum,
    "Hopper": hopper,
    "Walker2d": walker2d,
    "HalfCheetah": never,
    "Ant": ant,
    "Humanoid": humanoid,
}
#: Termination functions by Gymnasium id, without the prefix `module:`.
TERMINATIONS: dict[str, Termination] = {
    **{
        f"{task}-{version}": function
        for task, function in _BY_TASK.items()
        for version in ("v4", "v5")
    },
    "Pendulum-v1": never,
}


def register_termination(env_id: str, function: Termination) -> None:
    """Register the termination function of a task, which model rollouts use to end episodes.

    Args:
      env_id: a Gymnasium id, with or without the prefix `module:`, or dm_control's DOMAIN-TASK.
      function: maps (obs (D,), action (A,), next_obs (D,)) to a bool scalar, in pure JAX, with flat
        observations as returned by the environments of `envs.make`.

    Raises:
      UsageError: `function` is not callable.
    """
    if not callable(function):
        raise UsageError(
            f"register_termination({env_id!r}, {function!r}): the second argument must be a "
            "function (obs, action, next_obs) -> bool"
        )
    TERMINATIONS[env_id.rpartition(":")[2]] = function


def check(spec: EnvSpec) -> None:
    """Check the termination function of a task, if it is a user's.

    Raises:
      UsageError: it raises, or returns something else than a bool scalar; see `user_code.call`.
    """
    if spec.termination is None or not user_code.is_users(spec.termination):
        return

    def trace() -> None:
        obs, action = jnp.zeros(spec.obs_dim), jnp.zeros(spec.action_dim)
        user_code.call(
            f"--env={spec.name}",
            spec.termination,
            obs,
            action,
            obs,
            returns=user_code.array(bool),
            role="the termination function",
        )

    jax.eval_shape(trace)


class Counts(NamedTuple):
    """How often a termination function agrees with real transitions; numbers or arrays."""

    transitions: Any
    terminated: Any  # according to the task
    predicted: Any  # according to the function
    both: Any


def unknown_message(name: str, steps: int | None = None) -> str:
    """Return the error for an episode that terminates although no function is registered."""
    after = "" if steps is None else f" after {steps} agent steps"
    return (
        f"--env={name}: an episode terminated{after}, but model rollouts have no "
        f"termination function; add one with dynajax.register_termination("
        f"{name.rpartition(':')[2]!r}, function), or choose --algo=model-free; {TIME_LIMIT}"
    )


def compare(name: str, function: Termination | None, counts: Counts) -> str | None:
    """Return a warning if a task and its termination function disagree, or None.

    Args:
      name: task name.
      function: None if it is not known.
      counts: of the real transitions so far.

    Raises:
      UsageError: the function is always wrong: it predicts none of the terminations, or nothing
        but terminations, or only such that did not happen; or there is none, and an episode
        terminated.
    """
    transitions, terminated, predicted, both = (int(np.sum(x)) for x in counts)
    if function is None:
        if terminated:
            raise UsageError(unknown_message(name))
        return None
    missed, false = terminated - both, predicted - both
    remedy = (
        "it must return True exactly where the task returns terminated (see "
        "dynajax.register_termination)"
    )
    if missed:
        remedy += f"; {TIME_LIMIT}"
    line = (
        f"--env={name}: the termination function {{}}: of {transitions} real transitions the task "
        f"terminated {terminated}, of which it misses {missed}, and it ends {false} others; {remedy}"
    )
    goes_on = transitions - terminated
    ends_all = goes_on >= _ENOUGH and false == goes_on
    if ends_all or (both == 0 and missed + false >= _ENOUGH):
        raise UsageError(line.format("contradicts the task"))
    if missed + false > _TOLERANCE * (missed + predicted):
        return line.format("differs from the task")
    return None
