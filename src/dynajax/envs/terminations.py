"""When an episode of a Gymnasium task ends, as pure functions for model rollouts.

Each takes one transition (obs (D,), action (A,), next_obs (D,)) and returns a bool scalar, True
where the simulator would say `terminated`. The rules are those of gymnasium 1.4's MuJoCo tasks at
their default arguments, the same in v4 and v5; all read the new observation alone. An observation
that is not finite counts as terminated exactly where it does in the task.
"""

import jax.numpy as jnp

from dynajax.types import Array, Termination, UsageError


def never(obs: Array, action: Array, next_obs: Array) -> Array:
    """No end but the time limit (dm_control, HalfCheetah, Pendulum)."""
    return jnp.zeros((), bool)


def inverted_pendulum(obs: Array, action: Array, next_obs: Array) -> Array:
    """The pole leans by more than 0.2 rad."""
    return ~(jnp.all(jnp.isfinite(next_obs)) & (jnp.abs(next_obs[1]) <= 0.2))


def hopper(obs: Array, action: Array, next_obs: Array) -> Array:
    """The torso is at 0.7 m or lower, leans by 0.2 rad or more, or the state leaves +-100.

    The task checks raw velocities against 100 and shows them clipped to +-10, so of them only a
    NaN can be seen.
    """
    height, angle = next_obs[0], next_obs[1]
    in_range = jnp.all(jnp.abs(next_obs[1:]) < 100)
    return ~(in_range & (height > 0.7) & (height < jnp.inf) & (jnp.abs(angle) < 0.2))


def walker2d(obs: Array, action: Array, next_obs: Array) -> Array:
    """The torso leaves 0.8 to 2 m, or leans by 1 rad or more."""
    height, angle = next_obs[0], next_obs[1]
    return ~((height > 0.8) & (height < 2.0) & (jnp.abs(angle) < 1.0))


def ant(obs: Array, action: Array, next_obs: Array) -> Array:
    """The torso leaves 0.2 to 1 m, or the state is not finite."""
    height = next_obs[0]
    return ~(jnp.all(jnp.isfinite(next_obs)) & (height >= 0.2) & (height <= 1.0))


def humanoid(obs: Array, action: Array, next_obs: Array) -> Array:
    """The torso leaves 1 to 2 m."""
    height = next_obs[0]
    return ~((height > 1.0) & (height < 2.0))


_RULES: dict[str, Termination] = {
    "InvertedPendulum": inverted_pendulum,
    "Hopper": hopper,
    "Walker2d": walker2d,
    "HalfCheetah": never,
    "Ant": ant,
    "Humanoid": humanoid,
}
#: Known rules by environment id, a Gymnasium id without its `module:` part.
TERMINATIONS: dict[str, Termination] = {
    **{f"{task}-{version}": rule for task, rule in _RULES.items() for version in ("v4", "v5")},
    "Pendulum-v1": never,
}


def register_termination(env_id: str, function: Termination) -> None:
    """Tells model rollouts when an episode of `env_id` ends.

    Args:
      env_id: a Gymnasium id, with or without its `module:` part, or dm_control's DOMAIN-TASK.
      function: (obs (D,), action (A,), next_obs (D,)) -> bool scalar, in pure JAX, observations
        being flat as `envs.make` returns them.

    Raises:
      UsageError: `function` cannot be called.
    """
    if not callable(function):
        raise UsageError(
            f"register_termination({env_id!r}, {function!r}): the second argument must be a "
            "function (obs, action, next_obs) -> bool"
        )
    TERMINATIONS[env_id.rpartition(":")[2]] = function
