"""The environments by name, and all that the rest of the code has to import for them.

A name is a task of dm_control.suite, `DOMAIN-TASK` (cheetah-run, finger-turn_hard), or a
Gymnasium id (Hopper-v5), with `module:` before it where a module of the user's registers it. So a
new task is a `gymnasium.register` and, if its episodes can end, a `register_termination`. The
device engine (`envs.mjx`) has some of dm_control's tasks, Brax's, as `brax:NAME`, and those that a
module gives to `register_mjx_task`.
"""

import difflib
import re

import gymnasium

from dynajax import registry
from dynajax.envs import dmc, gym, mjx, terminations
from dynajax.envs.mjx import register_mjx_task
from dynajax.envs.repeat import Repeat
from dynajax.envs.terminations import TERMINATIONS, register_termination
from dynajax.types import EnvSpec, UsageError

__all__ = ["TERMINATIONS", "make", "register_mjx_task", "register_termination", "spec"]

Env = dmc.DMControlEnv | gym.GymnasiumEnv | Repeat


def _is_gymnasium(name: str) -> bool:
    return ":" in name or name in gymnasium.registry or bool(re.search(r"-v\d+$", name))


def _check_name(name: str) -> None:
    registry.import_module("--env", name)
    known = [*gymnasium.registry, *mjx.registered(), *([] if ":" in name else dmc.names())]
    module, _, name_only = name.rpartition(":")
    if name_only not in known:
        by_lower = {k.lower(): k for k in known}
        near = difflib.get_close_matches(name_only.lower(), by_lower, 1, 0.0)[0]
        missing = f"the module {module!r} registers no such task" if module else "no such task"
        raise UsageError(
            f"--env={name}: {missing}; the nearest is {by_lower[near]} "
            "(DOMAIN-TASK of dm_control.suite, or a Gymnasium id)"
        )


def is_device_only(name: str) -> bool:
    """Whether a task is one of `envs.mjx` and has no simulator on the host."""
    if name.startswith("brax:"):
        return True
    registry.import_module("--env", name)
    name_only = name.rpartition(":")[2]
    return name_only in mjx.registered() and name_only not in [*gymnasium.registry, *dmc.names()]


def make(
    name: str, *, time_limit: int = 1000, seed: int = 0, render: bool = False, repeat: int = 1
) -> Env:
    """Makes an environment: float32 observations (D,), actions (A,) in [-1, 1].

    Args:
      name: see the module.
      time_limit: simulator steps of an episode, for a task that has no limit of its own.
      seed: fixes what a dm_control task draws when it is loaded; episodes get theirs from
        `reset(seed=...)`.
      render: whether `render()` will be called.
      repeat: simulator steps that an action is taken for, see `Repeat`.

    Returns:
      A gymnasium.Env that has `obs_names` (D names) and `time_limit` (its own steps) too.

    Raises:
      UsageError: an unknown name, or a task that does not fit.
    """
    mjx.check_repeat(repeat)
    if not (_is_gymnasium(name) and name in gymnasium.registry):
        if is_device_only(name):
            raise UsageError(f"--env={name}: this task runs on the device only; add --engine=mjx")
        _check_name(name)
    env: Env
    if _is_gymnasium(name):
        env = gym.GymnasiumEnv(name, time_limit=time_limit, render=render)
    else:
        env = dmc.DMControlEnv(name, time_limit=time_limit, seed=seed)
    return env if repeat == 1 else Repeat(env, repeat)


def spec(name: str, *, time_limit: int = 1000, repeat: int = 1) -> EnvSpec:
    """What the algorithm has to know of a task; arguments and errors as for `make`.

    `termination` is None where the rule is not known: a Gymnasium id that is not in TERMINATIONS,
    and dm_control's lqr. `time_limit` counts decisions where an action is repeated.
    """
    if is_device_only(name):
        return mjx.make(name, repeat=repeat).spec
    env = make(name, time_limit=time_limit, repeat=repeat)
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
    )
    env.close()
    return result
