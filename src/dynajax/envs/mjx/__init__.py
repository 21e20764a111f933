"""Tasks that run on the device: dm_control.suite's own on MJX, Brax's, and yours, in pure JAX.

A name is one of `dynajax.envs` (`cheetah-run`), `brax:NAME`, or `module:NAME` where that module of
yours gives NAME to `register_mjx_task`. `make` gives functions for ONE
environment; the caller maps them over rows and scans them over time. Only `make` imports MJX or
Brax, which takes seconds.

An episode has no end of its own but `terminated`, and nothing is ever reset by itself: the caller
counts `spec.time_limit` steps and calls `reset` between episodes, where it costs least.
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


def _suite(name: str) -> Task:
    from dynajax.envs.mjx import suite

    return suite.make(name)


def _brax(name: str) -> Task:
    from dynajax.envs.mjx import brax_tasks

    return brax_tasks.make(name)


#: What makes each task, by its name without a `module:` part.
TASKS: dict[str, Callable[[], Task]] = {
    **{
        f"{domain}-{task}": functools.partial(_suite, f"{domain}-{task}")
        for domain, tasks in SUITE.items()
        for task in tasks
    },
    **{f"brax:{name}": functools.partial(_brax, f"brax:{name}") for name in BRAX},
}
_BUILT_IN = frozenset(TASKS)


def names() -> list[str]:
    """Every task that `make` makes by now."""
    return list(TASKS)


def register_mjx_task(name: str, make: Callable[[], Task]) -> None:
    """Adds a task of your own, for `--env=module:NAME --engine=mjx`.

    Args:
      name: without the `module:` part; a known name is replaced.
      make: makes the task; its functions in pure JAX, its spec's name any.

    Raises:
      UsageError: `make` cannot be called.
    """
    if not callable(make):
        raise UsageError(
            f"register_mjx_task({name!r}, {make!r}): the second argument must be a function that "
            "returns a Task"
        )
    name = name.rpartition(":")[2]
    TASKS[name] = functools.partial(_checked, name, make)


def registered() -> list[str]:
    """The names that `register_mjx_task` has added."""
    return [name for name in TASKS if name not in _BUILT_IN]


def check_repeat(repeat: int) -> None:
    """Raises UsageError where an action cannot be taken for that many simulator steps."""
    if repeat < 1:
        raise UsageError(f"env.repeat={repeat}: an action is taken for 1 simulator step or more")


def make(name: str, *, repeat: int = 1) -> Task:
    """Makes a task in the precision that JAX has at this moment (see `jax_enable_x64`).

    Args:
      name: see the module, which is imported if it is named.
      repeat: simulator steps that an action is taken for; `spec.time_limit` counts decisions then.

    Raises:
      UsageError: not a task of `names()`, or one that does not fit; the text says why.
    """
    check_repeat(repeat)
    brax = name.startswith("brax:")
    if not brax:
        registry.import_module("--env", name)
    maker = TASKS.get(name if brax else name.rpartition(":")[2])
    if maker is None:
        raise UsageError(f"--env={name}: {_why_not(name)}")
    task = maker()
    task = Task(task.spec._replace(name=name), _exact(task.reset), _exact(task.step))
    if repeat == 1:
        return task
    from dynajax.envs.mjx import repeating

    return repeating.repeat(task, repeat)


def _exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """Physics is no network: its products keep all digits, whatever is the default of others."""

    @functools.wraps(function)
    def exactly(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return exactly


def _why_not(name: str) -> str:
    if name.startswith("brax:"):
        return f"not one of Brax's tasks here: {', '.join(BRAX)}"
    module = name.rpartition(":")[0]
    reason = _REFUSED.get(name) or _REFUSED.get(name.partition("-")[0])
    if reason is None and module:
        reason = f"the module {module!r} gives no such task to register_mjx_task"
    return f"{reason or 'not ported to the device'}; use --engine=host"


def _checked(name: str, make: Callable[[], Task]) -> Task:
    """A task of the user's, refused where its parts do not fit together."""
    task = make()
    if not isinstance(task, Task):
        raise UsageError(f"--env={name}: its function returned {type(task).__name__}, not a Task")
    spec = task.spec
    if spec.obs_dim < 1 or spec.action_dim < 1 or len(spec.obs_names) != spec.obs_dim:
        raise UsageError(
            f"--env={name}: its spec has obs_dim={spec.obs_dim} with {len(spec.obs_names)} "
            f"obs_names, and action_dim={spec.action_dim}; it needs one of each at least"
        )
    try:
        # A key that is only traced, for the cores may not have been set up yet.
        first = jax.eval_shape(task.reset, jax.eval_shape(jax.random.key, 0))
        action = jax.ShapeDtypeStruct((spec.action_dim,), jnp.float32)
        after, reward, terminated = jax.eval_shape(task.step, first, action)
    except Exception as error:
        reason = checks.reason(error)
        raise UsageError(
            f"--env={name}: JAX cannot trace its reset(key) or step(state, action) ({reason})"
        ) from error
    shapes = {
        "the observation of reset": (first.obs, (spec.obs_dim,), jnp.float32),
        "the observation of step": (after.obs, (spec.obs_dim,), jnp.float32),
        "the reward": (reward, (), jnp.float32),
        "terminated": (terminated, (), jnp.bool),
    }
    for part, (value, shape, dtype) in shapes.items():
        if (value.shape, value.dtype) != (shape, dtype):
            raise UsageError(
                f"--env={name}: {part} is {value.dtype} {value.shape}, and must be "
                f"{jnp.dtype(dtype)} {shape}"
            )
    if jax.tree.map(_kind, first) != jax.tree.map(_kind, after):
        raise UsageError(
            f"--env={name}: the state after step has not the shapes and dtypes of reset's, "
            "so that no loop can carry it"
        )
    return task


def _kind(leaf: Any) -> tuple:
    return leaf.shape, str(leaf.dtype)
