"""Any Gymnasium task, made to one shape: a flat float32 observation, actions in [-1, 1]."""

import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from dynajax.actions import rescale
from dynajax.envs import checks, states
from dynajax.envs.dmc import headless
from dynajax.types import UsageError


def _load(name: str, render: bool) -> gymnasium.Env:
    registered = gymnasium.registry[name.rpartition(":")[2]]
    kwargs: dict[str, Any] = {"render_mode": "rgb_array"} if render else {}
    if render and headless():
        os.environ["MUJOCO_GL"] = "egl"
    try:
        # By its entry rather than its id: gymnasium warns of every id that has a newer version.
        env = gymnasium.make(registered, disable_env_checker=True, **kwargs)
    except Exception as error:
        raise UsageError(f"--env={name}: it cannot be made ({checks.reason(error)})") from error
    if render and "rgb_array" not in (env.metadata.get("render_modes") or ()):
        raise UsageError(f"--env={name}: it draws no pictures (it has no render mode rgb_array)")
    return env


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
      bounds: actions (A,) of the task that -1 and 1 stand for.

    Args:
      name: a registered id, or `module:Id-v0` whose module has been imported.
      time_limit: environment steps, for a task that has no limit of its own.
      render: whether `render()` will be called.

    Raises:
      UsageError: the task cannot be made, or does not fit; see `checks.task`.
    """

    def __init__(self, name: str, *, time_limit: int = 1000, render: bool = False):
        self._name, self._limit = name, time_limit
        self._env = env = _load(name, render)
        try:
            checks.task(name, env.action_space, env.observation_space)
        except UsageError:
            self.close()
            raise
        self.time_limit = _own_limit(env) or time_limit
        if getattr(env.spec, "max_episode_steps", None) is None:
            env = gymnasium.wrappers.TimeLimit(env, self.time_limit)
        self._env = env
        #: What sets the simulator to a state; None if nothing can.
        self.setter = states.setter(env)
        #: The wrappers that keep running statistics, by class name.
        self.statistics = states.statistics(env)
        self._space = env.observation_space
        bounds: Any = env.action_space
        self._low, self._high = bounds.low.astype(np.float64), bounds.high.astype(np.float64)
        self.bounds = self._low.ravel(), self._high.ravel()
        self._dtype = bounds.dtype
        self.obs_names = tuple(
            part if size == 1 else f"{part}[{i}]"
            for part, space in checks.leaves(self._space)
            for size in [spaces.flatdim(space)]
            for i in range(size)
        )
        self.observation_space = spaces.Box(-np.inf, np.inf, (len(self.obs_names),))
        self.action_space = spaces.Box(-1.0, 1.0, (self._low.size,))
        self.render_mode = env.render_mode
        self.metadata = env.metadata

    def _flat(self, observation: Any) -> np.ndarray:
        checks.observation(self._name, self._space, observation)
        return np.asarray(spaces.flatten(self._space, observation), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode with the task's own `reset`.

        Raises:
          UsageError: its API is Gym's old one, or its observation is none of its space.
        """
        result = self._call(self._env.reset, seed=seed, options=options)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise checks.old_api(self._name)
        return self._flat(result[0]), result[1]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one action (A,) in [-1, 1]; errors as those of `reset`, or a reward of several."""
        scaled = rescale(np.reshape(action, self._low.shape), self._low, self._high)
        result = self._call(self._env.step, scaled.astype(self._dtype))
        observation, reward, terminated, truncated, info = result
        return (
            self._flat(observation),
            checks.number(self._name, "reward", reward),
            bool(checks.number(self._name, "terminated", terminated)),
            bool(checks.number(self._name, "truncated", truncated)),
            info,
        )

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (TypeError, ValueError) as error:
            if checks.is_old_api(error):
                raise checks.old_api(self._name) from error
            raise

    @functools.cached_property
    def unrestorable(self) -> str | None:
        """Why the task cannot be set to a state, in one line; None if it can.

        Gymnasium's MuJoCo and classic control tasks can, and those that have methods
        `snapshot() -> np.ndarray` (1-D) and `restore(array)`. The first call tries it out on two
        tasks made for that, because a wrapper or the task may keep more than is restored.
        """
        advice = "give it methods snapshot() -> np.ndarray and restore(array)"
        if self.setter is None:
            return f"nothing can set it to a stored state; {advice}"
        difference = states.probe(lambda: GymnasiumEnv(self._name, time_limit=self._limit))
        if difference is None:
            return None
        outside = itertools.takewhile(lambda layer: layer is not self.setter, self._wrappers())
        kept = ", ".join(type(layer).__name__ for layer in outside)
        return f"{difference}; something in it ({kept}) keeps more than what is restored; {advice}"

    @property
    def can_restore(self) -> bool:
        """Whether the task can be set to a state; see `unrestorable`."""
        return self.unrestorable is None

    def _wrappers(self) -> Iterator[Any]:
        """Those that the task itself has been given, outermost first, and the task."""
        plain = gymnasium.wrappers.TimeLimit | gymnasium.wrappers.OrderEnforcing
        return (layer for layer in states.layers(self._env) if not isinstance(layer, plain))

    def _limits(self) -> list[Any]:
        """The wrappers that count steps, outermost first."""
        return [layer for layer in states.layers(self._env) if hasattr(layer, "_elapsed_steps")]

    def snapshot(self) -> np.ndarray:
        """The simulator's state, as one float64 vector; see `envs.states`."""
        counts = [float(layer._elapsed_steps) for layer in self._limits()]
        return np.concatenate([np.asarray(self.setter.snapshot(), np.float64), counts])

    def restore(self, values: np.ndarray, *, steps: int | None = None) -> None:
        """Sets the simulator to a `snapshot`; see `DMControlEnv.restore`."""
        limits = self._limits()
        state, counts = values[: len(values) - len(limits)], values[len(values) - len(limits) :]
        self.setter.restore(state)
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
        """Ends the task; what its own `close` raises is a warning, for the work is done."""
        try:
            self._env.close()
        except Exception as error:
            line = f"--env={self._name}: its close() failed ({checks.reason(error)})"
            warnings.warn(line, stacklevel=2)
