"""Wrap any Gymnasium task: flat float32 observations, actions in [-1, 1]."""

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
        # Pass the registry entry instead of the id, because gymnasium warns about every id that has
        # a newer version.
        env = gymnasium.make(registered, disable_env_checker=True, **kwargs)
    except Exception as error:
        reason = checks.describe_error(error)
        once = "; if only one instance can exist, add --set host.evaluate_on=training"
        hint = once if isinstance(error, OSError) else ""
        raise UsageError(f"--env={name}: it cannot be made ({reason}){hint}") from error
    if render and "rgb_array" not in (env.metadata.get("render_modes") or ()):
        raise UsageError(f"--env={name}: it cannot render (it has no render mode rgb_array)")
    return env


def _task_limit(env: gymnasium.Env) -> int | None:
    """Return the time limit that the task defines, in agent steps, or None."""
    candidates = [getattr(env.spec, "max_episode_steps", None)]
    candidates += [
        getattr(env.unwrapped, n, None) for n in ("max_episode_steps", "_max_episode_steps")
    ]
    return next((int(c) for c in candidates if isinstance(c, int | np.integer) and c > 0), None)


class GymnasiumEnv(gymnasium.Env):
    """A registered Gymnasium task.

    Observations are float32 (D,), flattened by `gymnasium.spaces.flatten`. Actions (A,) are in
    [-1, 1] and rescaled to the task's bounds. Exceptions that the task raises are not caught.

    Attributes:
      obs_names: D names such as "obs[3]", or "position[3]" for a part of a Dict.
      obs_parts: parts of the task's observations, in the order in which they are flattened.
      time_limit: maximum number of agent steps per episode.
      bounds: actions (A,) of the task that correspond to -1 and 1.
      task_action_shape: shape of the task's actions.
      restorer: object that sets the simulator to a state, or None; see `states.find_restorer`.
      statistics: class names of the wrappers that keep running statistics.
      num_frames: simulator steps (frames) of a step; see `ActionRepeat`.

    Args:
      name: a registered id, or `module:Id-v0` if the module has been imported.
      time_limit: agent steps per episode, used if the task defines no limit.
      render: whether `render()` will be called.

    Raises:
      UsageError: the task cannot be made or is not supported; see `checks.check_spaces`.
    """

    num_frames = 1

    def __init__(self, name: str, *, time_limit: int = 1000, render: bool = False):
        self._name, self._limit = name, time_limit
        self._env = env = _load(name, render)
        try:
            checks.check_spaces(name, env.action_space, env.observation_space)
        except UsageError:
            self.close()
            raise
        self.time_limit = _task_limit(env) or time_limit
        if getattr(env.spec, "max_episode_steps", None) is None:
            env = gymnasium.wrappers.TimeLimit(env, self.time_limit)
        self._env = env
        self.restorer = states.find_restorer(env)
        self.statistics = states.statistics_wrappers(env)
        self._space = env.observation_space
        bounds: Any = env.action_space
        self._low, self._high = bounds.low.astype(np.float64), bounds.high.astype(np.float64)
        self.bounds = self._low.ravel(), self._high.ravel()
        self.task_action_shape = self._low.shape
        self._dtype = bounds.dtype
        self.obs_parts = checks.obs_parts(self._space)
        self.obs_names = tuple(
            part if size == 1 else f"{part}[{i}]"
            for part, space in checks.leaf_spaces(self._space)
            for size in [spaces.flatdim(space)]
            for i in range(size)
        )
        self.value_ranges = checks.ValueRanges(len(self.obs_names))
        self._double = checks.double_space(self._space)
        self.observation_space = spaces.Box(-np.inf, np.inf, (len(self.obs_names),))
        self.action_space = spaces.Box(-1.0, 1.0, (self._low.size,))
        self.render_mode = env.render_mode
        self.metadata = env.metadata

    def _flat(self, observation: Any, reward: float | None = None) -> np.ndarray:
        checks.check_observation(self._name, self._space, observation)
        if self.value_ranges.open:
            self.value_ranges.add(np.asarray(spaces.flatten(self._double, observation)), reward)
        return np.asarray(spaces.flatten(self._space, observation), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; arguments are passed to the task's `reset`.

        Raises:
          UsageError: the task uses the API of Gym before 0.26, or the observation is not in its
            observation space.
        """
        result = self._call(self._env.reset, seed=seed, options=options)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise checks.old_api_error(self._name)
        return self._flat(result[0]), result[1]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one action (A,) in [-1, 1].

        Raises:
          UsageError: see `reset`; also if reward, `terminated` or `truncated` is not one number.
        """
        scaled = rescale(np.reshape(action, self._low.shape), self._low, self._high)
        result = self._call(self._env.step, np.asarray(scaled, self._dtype))
        observation, reward, terminated, truncated, info = result
        reward = checks.to_scalar(self._name, "reward", reward)
        return (
            self._flat(observation, reward),
            reward,
            bool(checks.to_scalar(self._name, "terminated", terminated)),
            bool(checks.to_scalar(self._name, "truncated", truncated)),
            info,
        )

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (TypeError, ValueError) as error:
            if checks.is_old_api_error(error):
                raise checks.old_api_error(self._name) from error
            raise

    @functools.cached_property
    def unrestorable(self) -> str | None:
        """Return the reason why the task cannot be set to a state in one line, or None if it can.

        Gymnasium's MuJoCo and classic control tasks can be set to a state, and so can tasks with
        the methods `snapshot() -> np.ndarray` (1-D) and `restore(array)`. The first call tests this
        on two new instances, because the task or a wrapper may have state that is not restored.
        """
        remedy = "give it methods snapshot() -> np.ndarray and restore(array)"
        if self.restorer is None:
            return f"it has no methods to set it to a stored state; {remedy}"
        difference = states.probe(lambda: GymnasiumEnv(self._name, time_limit=self._limit))
        if difference is None:
            return None
        outside = itertools.takewhile(lambda layer: layer is not self.restorer, self._wrappers())
        names = ", ".join(type(layer).__name__ for layer in outside)
        return f"{difference}; part of it ({names}) has state that is not restored; {remedy}"

    def _wrappers(self) -> Iterator[Any]:
        """Yield the wrappers that gymnasium did not add, outermost first, and then the task."""
        default = gymnasium.wrappers.TimeLimit | gymnasium.wrappers.OrderEnforcing
        return (layer for layer in states.layers(self._env) if not isinstance(layer, default))

    def _limits(self) -> list[Any]:
        """Return the wrappers that count steps, outermost first."""
        return [layer for layer in states.layers(self._env) if hasattr(layer, "_elapsed_steps")]

    def snapshot(self) -> np.ndarray:
        """Return the simulator's state as a float64 vector; see `envs.states`."""
        counts = [float(layer._elapsed_steps) for layer in self._limits()]
        return np.concatenate([np.asarray(self.restorer.snapshot(), np.float64), counts])

    def restore(self, values: np.ndarray, *, steps: int | None = None) -> None:
        """Set the simulator to a `snapshot`; see `DMControlEnv.restore`."""
        limits = self._limits()
        state, counts = values[: len(values) - len(limits)], values[len(values) - len(limits) :]
        self.restorer.restore(state)
        for layer, count in zip(limits, counts, strict=True):
            layer._elapsed_steps = int(count) if steps is None else steps

    @property
    def mujoco(self) -> tuple[Any, Any] | None:
        """Return MuJoCo's model and data, or None if the task has none."""
        task: Any = self._env.unwrapped
        if hasattr(task, "model") and hasattr(task, "data"):
            return task.model, task.data
        return getattr(task, "mujoco", None)

    def render(self) -> Any:
        """Return an image of the task: (H, W, 3) uint8."""
        return self._env.render()

    def close(self) -> None:
        """Close the task; warn if its `close` fails, since by then all results are complete."""
        try:
            self._env.close()
        except Exception as error:
            line = f"--env={self._name}: its close() failed ({checks.describe_error(error)})"
            warnings.warn(line, stacklevel=2)
