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

from dynajax import registry
from dynajax.envs import checks
from dynajax.types import Array, EnvSpec, UsageError

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


def check_repeat(repeat: int) -> None:
    """Check the number of simulator steps per action.

    Raises:
      UsageError: it is less than 1.
    """
    if repeat < 1:
        raise UsageError(f"env.repeat={repeat}: use 1 simulator step per action or more")


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
        reason = f"the module {module!r} registers no such task with register_mjx_task"
    return f"{reason or 'it is not available on the device'}; use --engine=host"


def _make_checked(name: str, make: Callable[[], Task]) -> Task:
    """Make a user's task and check that its spec and functions are consistent."""
    task = make()
    if not isinstance(task, Task):
        raise UsageError(f"--env={name}: its function returned {type(task).__name__}, not a Task")
    spec = task.spec
    if spec.obs_dim < 1 or spec.action_dim < 1 or len(spec.obs_names) != spec.obs_dim:
        raise UsageError(
            f"--env={name}: its spec has obs_dim={spec.obs_dim}, {len(spec.obs_names)} obs_names "
            f"and action_dim={spec.action_dim}; both dimensions must be at least 1, with one name "
            "per observation dimension"
        )
    try:
        # Use an abstract key, because JAX's CPU devices may not have been configured yet.
        first = jax.eval_shape(task.reset, jax.eval_shape(jax.random.key, 0))
        action = jax.ShapeDtypeStruct((spec.action_dim,), jnp.float32)
        after, reward, terminated = jax.eval_shape(task.step, first, action)
    except Exception as error:
        raise UsageError(
            f"--env={name}: JAX cannot trace its reset(key) or step(state, action) "
            f"({checks.describe_error(error)})"
        ) from error
    expected = {
        "the observation of reset": (first.obs, (spec.obs_dim,), jnp.float32),
        "the observation of step": (after.obs, (spec.obs_dim,), jnp.float32),
        "the reward": (reward, (), jnp.float32),
        "terminated": (terminated, (), jnp.bool),
    }
    for part, (value, shape, dtype) in expected.items():
        if (value.shape, value.dtype) != (shape, dtype):
            raise UsageError(
                f"--env={name}: {part} is {value.dtype} {value.shape}, but must be "
                f"{jnp.dtype(dtype)} {shape}"
            )
    if jax.tree.map(_shape_and_dtype, first) != jax.tree.map(_shape_and_dtype, after):
        raise UsageError(
            f"--env={name}: the states of reset and step differ in shapes or dtypes, so a loop "
            "cannot carry the state; return the same structure from both"
        )
    return task


def _shape_and_dtype(leaf: Any) -> tuple:
    return leaf.shape, str(leaf.dtype)
