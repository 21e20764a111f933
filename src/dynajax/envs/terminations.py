"""Termination conditions of Gymnasium tasks, as pure functions for model rollouts.

Each function takes one transition (obs (D,), action (A,), next_obs (D,)) and returns a bool scalar,
which is True if the simulator would return `terminated`. The conditions are those of gymnasium
1.4's MuJoCo tasks with default arguments (v4 and v5 are equal) and depend only on `next_obs`. For
an observation that is not finite they return what the task returns.
"""

import jax
import jax.numpy as jnp

from dynajax import user_code
from dynajax.types import Array, EnvSpec, Termination, UsageError


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
