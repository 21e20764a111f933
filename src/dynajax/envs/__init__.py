"""Create environments by name; the rest of the package needs only this module.

A name is a task of dm_control.suite, `DOMAIN-TASK` (cheetah-run, finger-turn_hard), or a Gymnasium
id (Hopper-v5), with the prefix `module:` if a module of yours registers it. To add a task, call
`gymnasium.register`, and `register_termination` if its episodes can terminate. The device engine
(`envs.mjx`) provides some of dm_control's tasks, Brax's tasks as `brax:NAME`, and the tasks that a
module adds with `register_mjx_task`.
"""

import re
from typing import Any

import gymnasium

from dynajax import registry
from dynajax.envs import dmc, gym, mjx, terminations
from dynajax.envs.mjx import register_mjx_task
from dynajax.envs.repeat import ActionRepeat
from dynajax.envs.terminations import TERMINATIONS, register_termination
from dynajax.types import EnvSpec, UsageError

__all__ = ["TERMINATIONS", "make", "register_mjx_task", "register_termination", "spec"]

Env = dmc.DMControlEnv | gym.GymnasiumEnv | ActionRepeat

#: Environments that `spec` has kept for the next `make` with the same arguments.
_kept: dict[tuple[Any, ...], Env] = {}


def _is_gymnasium(name: str) -> bool:
    return ":" in name or name in gymnasium.registry or bool(re.search(r"-v\d+$", name))


def check_name(name: str) -> None:
    """Import the module of a task, and check that the task exists, without making it.

    Raises:
      UsageError: there is no such task, or the name is not a string.
    """
    if not isinstance(name, str):
        raise UsageError(f"--env={name!r}: it must be a name, or module:NAME, as a string")
    if not (_is_gymnasium(name) and name in gymnasium.registry) and not is_device_only(name):
        _check_name(name)


def _check_name(name: str) -> None:
    module, _, base_name = name.rpartition(":")
    registry.import_module("--env", name)
    if base_name in [*gymnasium.registry, *mjx.registered(), *([] if module else dmc.names())]:
        return
    if module:
        own = ", ".join(_registered_by(module)) or "none"
        raise UsageError(
            f"--env={name}: the module {module!r} registers no such task; it registers {own}"
        )
    known = [*gymnasium.registry, *mjx.registered(), *dmc.names()]
    raise UsageError(
        f"--env={name}: no such task; the nearest is {registry.nearest(base_name, known)} "
        "(use DOMAIN-TASK of dm_control.suite, or a Gymnasium id)"
    )


def _registered_by(module: str) -> list[str]:
    """Return the names of the tasks that a module, or one within it, defines."""

    def module_of(entry: Any) -> str:
        path = entry if isinstance(entry, str) else getattr(entry, "__module__", "")
        return str(path).partition(":")[0]

    tasks = {name: module_of(entry.entry_point) for name, entry in gymnasium.registry.items()}
    on_host = [name for name, of in tasks.items() if f"{of}.".startswith(f"{module}.")]
    return on_host + mjx.registered_by(module)


def is_device_only(name: str) -> bool:
    """Return True if `envs.mjx` has the task but no host simulator does."""
    if name.startswith("brax:"):
        return True
    registry.import_module("--env", name)
    base_name = name.rpartition(":")[2]
    return base_name in mjx.registered() and base_name not in [*gymnasium.registry, *dmc.names()]


def make(
    name: str, *, time_limit: int = 1000, seed: int = 0, render: bool = False, repeat: int = 1
) -> Env:
    """Make an environment with float32 observations (D,) and actions (A,) in [-1, 1].

    Args:
      name: task name, see the module docstring.
      time_limit: simulator steps per episode, used if the task defines no limit.
      seed: seed of the values that a dm_control task samples when it is loaded; episodes are
        seeded by `reset(seed=...)`.
      render: whether `render()` will be called.
      repeat: simulator steps per action, see `ActionRepeat`.

    Returns:
      A gymnasium.Env with the additional attributes `obs_names` (D names) and `time_limit`
      (in steps of the returned environment).

    Raises:
      UsageError: the name is unknown, or the task is not supported.
    """
    mjx.check_repeat(repeat)
    if not render and (kept := _kept.pop(_key(name, time_limit, seed, repeat), None)):
        return kept
    if not (_is_gymnasium(name) and name in gymnasium.registry):
        if is_device_only(name):
            raise UsageError(f"--env={name}: this task runs only on the device; add --engine=mjx")
        _check_name(name)
    env: Env
    if _is_gymnasium(name):
        env = gym.GymnasiumEnv(name, time_limit=time_limit, render=render)
    else:
        env = dmc.DMControlEnv(name, time_limit=time_limit, seed=seed)
    return env if repeat == 1 else ActionRepeat(env, repeat)


def _key(name: str, time_limit: int, seed: int, repeat: int) -> tuple[Any, ...]:
    # Tasks of Gymnasium do not depend on the seed when they are made.
    return name, time_limit, 0 if _is_gymnasium(name) else seed, repeat


def spec(
    name: str, *, time_limit: int = 1000, seed: int = 0, repeat: int = 1, keep: bool = False
) -> EnvSpec:
    """Return the static description of a task; arguments and errors are those of `make`.

    `termination` is None if the termination condition is unknown, which is the case for Gymnasium
    ids that are not in TERMINATIONS and for dm_control's lqr. `time_limit` counts agent steps,
    each of which is `repeat` simulator steps. With `keep` the environment that was made for it
    stays open, and the next `make` with the same arguments returns it instead of a second one.
    """
    if is_device_only(name):
        return mjx.make(name, repeat=repeat).spec
    env = make(name, time_limit=time_limit, seed=seed, repeat=repeat)
    unknown = _is_gymnasium(name) or name.startswith("lqr-")
    assert env.observation_space.shape and env.action_space.shape
    low, high = (tuple(bound.tolist()) for bound in env.bounds)
    result = EnvSpec(
        name=name,
        obs_dim=env.observation_space.shape[0],
        action_dim=env.action_space.shape[0],
        time_limit=env.time_limit,
        obs_names=env.obs_names,
        termination=TERMINATIONS.get(
            name.rpartition(":")[2], None if unknown else terminations.never
        ),
        bounds=(low, high),
        action_shape=env.task_action_shape,
        obs_parts=env.obs_parts,
    )
    if keep:
        _kept[_key(name, time_limit, seed, repeat)] = env
    else:
        env.close()
    terminations.check(result)
    return result
