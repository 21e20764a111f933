"""Tasks of dm_control.suite behind Gymnasium's interface (Tassa et al., 2018)."""

import collections
import functools
import logging
import math
import os
import sys
import types
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from dynajax.actions import rescale
from dynajax.envs import checks, states
from dynajax.envs.opengl import forget, mujoco
from dynajax.types import UsageError

# A camera picture in pixels; multiples of 16 suit every video encoder.
HEIGHT, WIDTH = 240, 320
# The first is said of dm_control's own model files; an unstable step is counted as dropped.
_NOISE = ("attribute 'settotalmass' is deprecated", "The simulation is unstable")


def headless() -> bool:
    """Whether OpenGL has no window system to draw in, nor a user's choice of something else."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")
    return sys.platform == "linux" and not any(os.environ.get(name) for name in screens)


@functools.cache
def _suite() -> types.ModuleType:
    """dm_control.suite, imported at first use.

    By itself dm_control takes GLFW even where there is no display, and then fails to draw.
    """
    logging.getLogger("absl").addFilter(
        lambda record: not any(text in record.getMessage() for text in _NOISE)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*DISPLAY environment variable is missing")
        if headless():
            os.environ["MUJOCO_GL"] = "egl"
        try:
            from dm_control import suite
        except (
            Exception
        ):  # whatever a missing library of OpenGL raises; nothing has to be drawn yet
            forget("dm_control", "OpenGL")
            os.environ["MUJOCO_GL"] = "disabled"
            from dm_control import suite
    return suite


def names() -> list[str]:
    """Every task, as DOMAIN-TASK."""
    return [f"{domain}-{task}" for domain, task in _suite().ALL_TASKS]


def load(name: str, seed: int = 0) -> Any:
    """dm_control's own Environment of the task `name`, one of `names()`.

    Raises:
      UsageError: dm_control cannot make it.
    """
    domain, _, task = name.partition("-")
    try:
        return _suite().load(domain, task, task_kwargs={"random": seed})
    except Exception as error:
        raise UsageError(f"--env={name}: it cannot be made ({checks.reason(error)})") from error


def bounds(env: Any) -> tuple[np.ndarray, np.ndarray]:
    """The actions (A,) of dm_control's `env` that -1 and 1 stand for."""
    spec = env.action_spec()
    unlimited = checks.unlimited(spec.minimum, spec.maximum)
    return np.where(unlimited, -1.0, spec.minimum), np.where(unlimited, 1.0, spec.maximum)


def _in_order(observation: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    """(name, array) in the order of dm_control's own flatten_observation."""
    ordered = isinstance(observation, collections.OrderedDict)
    keys = list(observation) if ordered else sorted(observation)
    return [(key, np.asarray(observation[key])) for key in keys]


class DMControlEnv(gymnasium.Env):
    """One task of dm_control.suite.

    Observations are float32 (D,), actions (A,) in [-1, 1], rescaled to the task's bounds; an
    actuator without bounds takes the action as it is. `reset(seed=n)` determines the episode.
    A step after which the physics is invalid returns NaN and ends the episode.

    Attributes:
      obs_names: D names such as "velocity[3]", or "head_height" where there is one entry.
      time_limit: environment steps of an episode.
      bounds: actions (A,) of the task that -1 and 1 stand for.
      unrestorable, can_restore, statistics: as of `GymnasiumEnv`; these tasks keep nothing beside
        the physics.

    Args:
      name: DOMAIN-TASK, one of `names()`.
      time_limit: environment steps, for a task that has no limit of its own (lqr).
      seed: fixes what a task draws when it is loaded (the masses of lqr).
    """

    unrestorable = None
    can_restore = True
    statistics = ()

    def __init__(self, name: str, *, time_limit: int = 1000, seed: int = 0):
        from dm_control.rl.control import PhysicsError

        self._physics_error = PhysicsError
        self._env = load(name, seed)
        own_limit = self._env._step_limit
        self.time_limit = math.ceil(own_limit) if math.isfinite(own_limit) else time_limit
        self._steps = 0

        self.bounds = self._low, self._high = bounds(self._env)
        loaded = states.parameters(self._env.physics.model)
        self.obs_names = tuple(
            key if array.size == 1 else f"{key}[{i}]"
            for key, array in _in_order(self._env.reset().observation)
            for i in range(array.size)
        )
        self._drawn = states.drawn(loaded, self._env.physics.model)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (len(self.obs_names),))
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, self._low.shape)
        self.render_mode = "rgb_array"
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": round(1 / self._env.control_timestep()),
        }

    def _flat(self, observation: Mapping[str, Any]) -> np.ndarray:
        arrays = [array.ravel() for _, array in _in_order(observation)]
        return np.concatenate(arrays).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode, the same one for the same seed (0 to 2^32 - 1)."""
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
        self._steps = 0
        return self._flat(self._env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one action (A,); truncated at the time limit or by invalid physics."""
        try:
            timestep = self._env.step(rescale(action, self._low, self._high))
        except self._physics_error:
            return np.full(len(self.obs_names), np.nan, np.float32), np.nan, False, True, {}
        self._steps += 1
        terminated = timestep.last() and timestep.discount == 0
        truncated = not terminated and (timestep.last() or self._steps >= self.time_limit)
        return self._flat(timestep.observation), float(timestep.reward), terminated, truncated, {}

    def snapshot(self) -> np.ndarray:
        """The simulator's state, as one float64 vector; see `envs.states`."""
        physics = self._env.physics
        state = states.take(physics.model.ptr, physics.data.ptr, self._drawn)
        return np.append(state, [self._steps, self._env._step_count])

    def restore(self, values: np.ndarray, *, steps: int | None = None) -> None:
        """Sets the simulator to a `snapshot`, from which the same steps follow, bit for bit.

        Args:
          steps: environment steps that the episode shall count as having had; as stored if not
            given.
        """
        physics = self._env.physics
        states.put(physics.model.ptr, physics.data.ptr, self._drawn, values[:-2])
        # dm_control ends a step with the first half of the next one.
        mujoco.mj_step1(physics.model.ptr, physics.data.ptr)
        counted = values[-2:] if steps is None else (steps, steps)
        self._steps, self._env._step_count = (int(n) for n in counted)
        self._env._reset_next_step = False

    @property
    def mujoco(self) -> tuple[Any, Any]:
        """MuJoCo's own model and data."""
        return self._env.physics.model.ptr, self._env.physics.data.ptr

    def render(self) -> np.ndarray:
        """What the first camera sees: (H, W, 3) uint8."""
        camera = 0 if self._env.physics.model.ncam else -1
        return self._env.physics.render(HEIGHT, WIDTH, camera_id=camera)

    def close(self) -> None:
        """Ends the task."""
        self._env.close()
