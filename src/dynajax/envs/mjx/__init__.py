"""Tasks in pure JAX that run on the device: dm_control.suite on MJX, Brax, and your own.

A name is that of a dm_control task (`cheetah-run`), `brax:NAME`, or `module:NAME` if your module
adds NAME with `register_mjx_task`. `make` returns functions for ONE environment, which the caller
vmaps over environments and scans over time. MJX and Brax are imported only by `make`, because the
imports take seconds.

There is no autoreset, and tasks only report termination, not the time limit. The caller counts
`spec.time_limit` steps and calls `reset` between episodes, where it costs the least.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import registry
from dynajax.envs import terminations
from dynajax.types import Array, EnvSpec, UsageError
from dynajax.user_code import array, arrays, call, describe, instance, like, several

__all__ = ["TASKS", "EnvState", "Task", "make", "names", "register_mjx_task"]

#: dm_control's tasks by domain; each domain is a module of this package.
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

_UNSUPPORTED = {
    "dog": "its limbs are ellipsoids and boxes, whose contacts with each other MJX cannot compute",
    "quadruped-escape": "MJX cannot compute an ellipsoid's contacts with a height field",
}


class EnvState(NamedTuple):
    """The state of one environment between two steps."""

    obs: Array  # (D,) float32
    physics: Any  # everything else that the next step depends on; a pytree of arrays


class Task(NamedTuple):
    """One environment as pure functions that can be jitted, vmapped and scanned."""

    spec: EnvSpec
    #: key -> initial state of an episode. A reset can cost as much as many steps.
    reset: Callable[[Array], EnvState]
    #: (state, action (A,) in [-1, 1]) -> (next state, reward (), terminated () bool). Observation
    #: and reward are NaN if the physics becomes invalid, as on the host engine.
    step: Callable[[EnvState, Array], tuple[EnvState, Array, Array]]


def _make_suite_task(name: str) -> Task:
    from dynajax.envs.mjx import suite

    return suite.make(name)


def _make_brax_task(name: str) -> Task:
    from dynajax.envs.mjx import brax_tasks

    return brax_tasks.make(name)


#: Functions that make the tasks, by name without the prefix `module:`.
TASKS: dict[str, Callable[[], Task]] = {
    **{
        f"{domain}-{task}": functools.partial(_make_suite_task, f"{domain}-{task}")
        for domain, tasks in SUITE.items()
        for task in tasks
    },
    **{f"brax:{name}": functools.partial(_make_brax_task, f"brax:{name}") for name in BRAX},
}
_BUILT_IN = frozenset(TASKS)


def names() -> list[str]:
    """Return the names of all built-in and registered tasks."""
    return list(TASKS)


def register_mjx_task(name: str, make: Callable[[], Task]) -> None:
    """Register a task for `--env=module:NAME --engine=mjx`.

    Args:
      name: name without the prefix `module:`; a registered task of this name is replaced.
      make: returns the task, whose functions must be pure JAX; the name in its spec is ignored.

    Raises:
      UsageError: `make` is not callable.
    """
    if not callable(make):
        raise UsageError(
            f"register_mjx_task({name!r}, {make!r}): the second argument must be a function that "
            "returns a Task"
        )
    name = name.rpartition(":")[2]
    TASKS[name] = functools.partial(_make_checked, name, make)


def registered() -> list[str]:
    """Return the names of the tasks that were added with `register_mjx_task`."""
    return [name for name in TASKS if name not in _BUILT_IN]


def registered_by(module: str) -> list[str]:
    """Return the names of the registered tasks whose functions a module defines."""
    makers: dict[str, Any] = {name: TASKS[name] for name in registered()}
    return [n for n, make in makers.items() if getattr(make.args[1], "__module__", "") == module]


def check_repeat(repeat: int) -> None:
    """Check the number of simulator steps per action.

    Raises:
      UsageError: it is less than 1.
    """
    if repeat < 1:
        raise UsageError(f"--set task.repeat={repeat}: it must be at least 1")


def make(name: str, *, repeat: int = 1) -> Task:
    """Make a task, in JAX's current default precision (see `jax_enable_x64`).

    Args:
      name: task name, see the module docstring; a module that it names is imported.
      repeat: simulator steps per action; `spec.time_limit` then counts agent steps.

    Raises:
      UsageError: the name is unknown, or the task is not supported.
    """
    check_repeat(repeat)
    is_brax = name.startswith("brax:")
    if not is_brax:
        registry.import_module("--env", name)
    make_task = TASKS.get(name if is_brax else name.rpartition(":")[2])
    if make_task is None:
        raise UsageError(f"--env={name}: {_unsupported_reason(name)}")
    task = make_task()
    task = Task(
        task.spec._replace(name=name),
        _with_highest_precision(task.reset),
        _with_highest_precision(task.step),
    )
    if repeat == 1:
        return task
    from dynajax.envs.mjx import repeating

    return repeating.repeat_actions(task, repeat)


def _with_highest_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Trace a function with exact float32 matmuls, which physics needs unlike neural networks."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return wrapped


def _unsupported_reason(name: str) -> str:
    if name.startswith("brax:"):
        return f"it is not a supported task of Brax: {', '.join(BRAX)}"
    module = name.rpartition(":")[0]
    reason = _UNSUPPORTED.get(name) or _UNSUPPORTED.get(name.partition("-")[0])
    if reason is None and module:
        own = ", ".join(registered_by(module)) or "none"
        reason = (
            f"the module {module!r} registers no such task with register_mjx_task; it registers "
            f"{own}"
        )
    return f"{reason or 'it is not available on the device'}; use --engine=host"


def _make_checked(name: str, make: Callable[[], Task]) -> Task:
    """Make a user's task and check that its spec and functions are consistent.

    The sequences of its spec become tuples, because a spec is a key of the cached programs.
    """
    owner = f"--env={name}"
    task: Task = call(owner, make, returns=instance(Task))
    spec = task.spec
    if not isinstance(spec, EnvSpec):
        raise UsageError(f"{owner}: its spec is {describe(spec)}; it must be an EnvSpec")
    numbers = (spec.obs_dim, spec.action_dim, spec.time_limit)
    are_positive = all(isinstance(n, int | np.integer) and n > 0 for n in numbers)
    if not are_positive or len(spec.obs_names) != spec.obs_dim:
        raise UsageError(
            f"{owner}: its spec has obs_dim={spec.obs_dim}, {len(spec.obs_names)} obs_names, "
            f"action_dim={spec.action_dim} and time_limit={spec.time_limit}; these must be whole "
            "numbers of at least 1, with one name per observation dimension"
        )
    spec = EnvSpec(*map(_to_tuples, spec))
    task = task._replace(spec=spec)
    terminations.check(spec._replace(name=name))
    jax.eval_shape(lambda: _check_functions(owner, task))
    return task


def _to_tuples(value: Any) -> Any:
    """Return a value with tuples instead of the lists and arrays in it."""
    if isinstance(value, np.ndarray | jax.Array):
        value = value.tolist()
    if hasattr(value, "_fields"):
        return type(value)(*map(_to_tuples, value))
    return tuple(map(_to_tuples, value)) if isinstance(value, list | tuple) else value


def _check_functions(owner: str, task: Task) -> None:
    """Check `reset` and `step` of a user's task while JAX traces them."""
    obs = array(jnp.float32, task.spec.obs_dim)
    state = instance(EnvState, obs=obs, physics=arrays("a pytree of arrays"))
    key, action = jax.random.PRNGKey(0), jnp.zeros(task.spec.action_dim)
    first = call(owner, task.reset, key, returns=state, role="the task's reset")
    first = jax.tree.map(jnp.asarray, first)
    after = like(first, "a state like that of reset")
    returns = several(state=after, reward=array(jnp.float32), terminated=array(bool))
    call(owner, task.step, first, action, returns=returns, role="the task's step")
