"""Any Gymnasium task, made to one shape: a flat float32 observation, actions in [-1, 1]."""

import importlib
import os
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from dynajax.envs import states
from dynajax.envs.dmc import headless, rescale
from dynajax.types import UsageError


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def import_module(name: str) -> None:
    """Imports the module part of `module:Id-v0`, so that it can register its tasks.

    Raises:
      UsageError: it cannot be imported.
    """
    module, colon, _ = name.rpartition(":")
    if not colon:
        return
    try:
        importlib.import_module(module)
    except Exception as error:
        raise UsageError(
            f"--env={name}: the module {module!r} cannot be imported ({_reason(error)}); "
            "it must be installed or on PYTHONPATH"
        ) from error


def _load(name: str, render: bool) -> gymnasium.Env:
    registered = gymnasium.registry[name.rpartition(":")[2]]
    kwargs: dict[str, Any] = {"render_mode": "rgb_array"} if render else {}
    if render and headless():
        os.environ["MUJOCO_GL"] = "egl"
    try:
        # By its entry rather than its id: gymnasium warns of every id that has a newer version.
        env = gymnasium.make(registered, disable_env_checker=True, **kwargs)
    except Exception as error:
        raise UsageError(f"--env={name}: it cannot be made ({_reason(error)})") from error
    if render and "rgb_array" not in (env.metadata.get("render_modes") or ()):
        raise UsageError(f"--env={name}: it draws no pictures (it has no render mode rgb_array)")
    return env


def _leaves(space: spaces.Space, prefix: str = "") -> Iterator[tuple[str, spaces.Space]]:
    """(name, space) of the parts of a Dict or Tuple, in the order in which they are flattened."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces
        items = parts.items() if isinstance(parts, dict) else enumerate(parts)
        for key, part in items:
            yield from _leaves(part, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix or "obs", space


def _check(name: str, env: gymnasium.Env) -> None:
    """Refuses a task that the algorithm cannot act in or learn from."""
    action, observation = env.action_space, env.observation_space
    if not isinstance(action, spaces.Box) or not np.issubdtype(action.dtype, np.floating):
        raise UsageError(
            f"--env={name}: its actions are {' '.join(str(action).split())}; "
            "dynajax needs continuous ones (a float Box)"
        )
    if not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        raise UsageError(
            f"--env={name}: its actions have infinite bounds; wrap it so that they are finite "
            "(gymnasium.wrappers.RescaleAction, or ClipAction and a Box of your own)"
        )
    for part, space in _leaves(observation):
        if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) >= 3:
            raise UsageError(
                f"--env={name}: its observation {part!r} is a picture {space.shape}; "
                "dynajax learns from state vectors"
            )
    if not observation.is_np_flattenable:
        raise UsageError(
            f"--env={name}: its observations, {type(observation).__name__}, have no fixed length; "
            "dynajax needs a Box, or a Dict or Tuple of boxes"
        )


def _own_limit(env: gymnasium.Env) -> int | None:
    """The length that a task itself gives its episodes, in environment steps."""
    candidates = [getattr(env.spec, "max_episode_steps", None)]
    candidates += [
        getattr(env.unwrapped, n, None) for n in ("max_episode_steps", "_max_episode_steps")
    ]
    return next((int(c) for c in candidates if isinstance(c, int | np.integer) and c > 0), None)


class GymnasiumEnv(gymnasium.Env):
    """A registered Gymnasium task.

    Observations are float32 (D,), flattened by gymnasium's rules; actions (A,) in [-1, 1] are
    rescaled to the task's bounds. An exception of the task itself passes through.

    Attributes:
      obs_names: D names: "obs[3]", or "position[3]" for a part of a Dict.
      time_limit: environment steps of an episode, at most.

    Args:
      name: a registered id, or `module:Id-v0` whose module has been imported.
      time_limit: environment steps, for a task that has no limit of its own.
      render: whether `render()` will be called.

    Raises:
      UsageError: the task cannot be made, or does not fit; see `_check`.
    """

    def __init__(self, name: str, *, time_limit: int = 1000, render: bool = False):
        env = _load(name, render)
        try:
            _check(name, env)
        except UsageError:
            env.close()
            raise
        self.time_limit = _own_limit(env) or time_limit
        if getattr(env.spec, "max_episode_steps", None) is None:
            env = gymnasium.wrappers.TimeLimit(env, self.time_limit)
        self._env = env
        self._setter = states.setter(env)
        self._space = env.observation_space
        bounds: Any = env.action_space
        self._low, self._high = bounds.low.astype(np.float64), bounds.high.astype(np.float64)
        self._dtype = bounds.dtype
        self.obs_names = tuple(
            part if size == 1 else f"{part}[{i}]"
            for part, space in _leaves(self._space)
            for size in [spaces.flatdim(space)]
            for i in range(size)
        )
        self.observation_space = spaces.Box(-np.inf, np.inf, (len(self.obs_names),))
        self.action_space = spaces.Box(-1.0, 1.0, (self._low.size,))
        self.render_mode = env.render_mode
        self.metadata = env.metadata

    def _flat(self, observation: Any) -> np.ndarray:
        return np.asarray(spaces.flatten(self._space, observation), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode with the task's own `reset`."""
        observation, info = self._env.reset(seed=seed, options=options)
        return self._flat(observation), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one action (A,) in [-1, 1]."""
        scaled = rescale(np.reshape(action, self._low.shape), self._low, self._high)
        observation, reward, terminated, truncated, info = self._env.step(
            scaled.astype(self._dtype)
        )
        return self._flat(observation), float(reward), bool(terminated), bool(truncated), info

    @property
    def can_restore(self) -> bool:
        """Whether the task can be set to a state: Gymnasium's MuJoCo and classic control tasks,
        and those that have methods `snapshot() -> np.ndarray` (1-D) and `restore(array)`."""
        return self._setter is not None

    def _limits(self) -> list[Any]:
        """The wrappers that count steps, outermost first."""
        layers: list[Any] = []
        layer: Any = self._env
        while layer is not None:
            if hasattr(layer, "_elapsed_steps"):
                layers.append(layer)
            layer = layer.__dict__.get("env")
        return layers

    def snapshot(self) -> np.ndarray:
        """The simulator's state, as one float64 vector; see `envs.states`."""
        counts = [float(layer._elapsed_steps) for layer in self._limits()]
        return np.concatenate([np.asarray(self._setter.snapshot(), np.float64), counts])

    def restore(self, values: np.ndarray, *, steps: int | None = None) -> None:
        """Sets the simulator to a `snapshot`; see `DMControlEnv.restore`."""
        limits = self._limits()
        state, counts = values[: len(values) - len(limits)], values[len(values) - len(limits) :]
        self._setter.restore(state)
        for layer, count in zip(limits, counts, strict=True):
            layer._elapsed_steps = int(count) if steps is None else steps

    @property
    def mujoco(self) -> tuple[Any, Any] | None:
        """MuJoCo's own model and data, where the task has them."""
        task: Any = self._env.unwrapped
        if hasattr(task, "model") and hasattr(task, "data"):
            return task.model, task.data
        return getattr(task, "mujoco", None)

    def render(self) -> Any:
        """The task's picture: (H, W, 3) uint8."""
        return self._env.render()

    def close(self) -> None:
        self._env.close()
