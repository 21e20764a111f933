"""Tasks of dm_control.suite (Tassa et al., 2018) with the interface of Gymnasium."""

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
from dynajax.envs.opengl import mujoco, remove_modules
from dynajax.types import ObsPart, UsageError

# Image size in pixels, a multiple of 16, as most video encoders want.
HEIGHT, WIDTH = 240, 320
# dm_control's own model files cause the first message. The second is redundant, because steps with
# invalid physics are counted as dropped transitions.
_SUPPRESSED_LOGS = ("attribute 'settotalmass' is deprecated", "The simulation is unstable")


def headless() -> bool:
    """Return True on Linux without a display if the user has not set MUJOCO_GL."""
    variables = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")
    return sys.platform == "linux" and not any(os.environ.get(name) for name in variables)


@functools.cache
def _suite() -> types.ModuleType:
    """Import dm_control.suite on first use, with a rendering backend that works without a display.

    By default dm_control chooses GLFW even without a display, and rendering then fails.
    """
    logging.getLogger("absl").addFilter(
        lambda record: not any(text in record.getMessage() for text in _SUPPRESSED_LOGS)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*DISPLAY environment variable is missing")
        if headless():
            os.environ["MUJOCO_GL"] = "egl"
        try:
            from dm_control import suite
        except Exception:  # The type depends on which OpenGL library is missing.
            remove_modules("dm_control", "OpenGL")
            os.environ["MUJOCO_GL"] = "disabled"
            from dm_control import suite
    return suite


def names() -> list[str]:
    """Return the names of all tasks, as DOMAIN-TASK."""
    return [f"{domain}-{task}" for domain, task in _suite().ALL_TASKS]


def load(name: str, seed: int = 0) -> Any:
    """Load the dm_control Environment of the task `name`, one of `names()`.

    Raises:
      UsageError: dm_control fails to load it.
    """
    domain, _, task = name.partition("-")
    try:
        return _suite().load(domain, task, task_kwargs={"random": seed})
    except Exception as error:
        reason = checks.describe_error(error)
        raise UsageError(f"--env={name}: it cannot be made ({reason})") from error


def bounds(env: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the actions (A,) of a dm_control environment that correspond to -1 and 1."""
    spec = env.action_spec()
    unbounded = checks.is_unbounded(spec.minimum, spec.maximum)
    return np.where(unbounded, -1.0, spec.minimum), np.where(unbounded, 1.0, spec.maximum)


def _ordered_names(observation: Mapping[str, Any]) -> list[str]:
    """Return the names of an observation's parts in the order of dm_control's flatten_observation."""
    ordered = isinstance(observation, collections.OrderedDict)
    return list(observation) if ordered else sorted(observation)


class DMControlEnv(gymnasium.Env):
    """One task of dm_control.suite.

    Observations are float32 (D,). Actions (A,) are in [-1, 1] and rescaled to the task's bounds,
    except for actuators without bounds. `reset(seed=n)` determines the episode. A step that leads
    to invalid physics returns NaN and ends the episode.

    Attributes:
      obs_names: D names such as "velocity[3]", or "head_height" for a part with one entry.
      time_limit: agent steps per episode.
      bounds: actions (A,) of the task that correspond to -1 and 1.
      obs_parts, task_action_shape: as in `GymnasiumEnv`.
      num_frames: simulator steps (frames) of a step; see `ActionRepeat`.
      unrestorable, statistics: as in `GymnasiumEnv`; constant, since these tasks have no state
        outside the physics.

    Args:
      name: DOMAIN-TASK, one of `names()`.
      time_limit: agent steps per episode, used if the task defines no limit (lqr).
      seed: seed of the values that a task samples when it is loaded (the masses of lqr).
    """

    num_frames = 1
    unrestorable = None
    statistics = ()

    def __init__(self, name: str, *, time_limit: int = 1000, seed: int = 0):
        from dm_control.rl.control import PhysicsError

        self._physics_error = PhysicsError
        self._env = load(name, seed)
        task_limit = self._env._step_limit
        self.time_limit = math.ceil(task_limit) if math.isfinite(task_limit) else time_limit
        self._steps = 0

        self.bounds = self._low, self._high = bounds(self._env)
        loaded = states.copy_parameters(self._env.physics.model)
        self.task_action_shape = self._low.shape
        observation = self._env.reset().observation
        self._parts = _ordered_names(observation)
        self.obs_parts = tuple(ObsPart((key,), np.shape(observation[key])) for key in self._parts)
        self.obs_names = tuple(
            key if np.size(observation[key]) == 1 else f"{key}[{i}]"
            for key in self._parts
            for i in range(np.size(observation[key]))
        )
        self._randomized = states.changed_parameters(loaded, self._env.physics.model)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (len(self.obs_names),))
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, self._low.shape)
        self.value_ranges = checks.ValueRanges(len(self.obs_names))
        self.render_mode = "rgb_array"
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": round(1 / self._env.control_timestep()),
        }

    def _flat(self, observation: Mapping[str, Any], reward: float | None = None) -> np.ndarray:
        flat = np.concatenate([np.asarray(observation[key]).ravel() for key in self._parts])
        self.value_ranges.add(flat, reward)
        return flat.astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start the episode that the seed (0 to 2^32 - 1) determines."""
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
        self._steps = 0
        return self._flat(self._env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one action (A,); truncate at the time limit or if the physics is invalid."""
        try:
            timestep = self._env.step(rescale(action, self._low, self._high))
        except self._physics_error:
            return np.full(len(self.obs_names), np.nan, np.float32), np.nan, False, True, {}
        if timestep.first():  # dm_control begins another episode, whose first reward is None
            raise RuntimeError("step() was called after the end of an episode; call reset() first")
        self._steps += 1
        terminated = timestep.last() and timestep.discount == 0
        truncated = not terminated and (timestep.last() or self._steps >= self.time_limit)
        reward = float(timestep.reward)
        return self._flat(timestep.observation, reward), reward, terminated, truncated, {}

    def snapshot(self) -> np.ndarray:
        """Return the simulator's state as a float64 vector; see `envs.states`."""
        physics = self._env.physics
        state = states.read_state(physics.model.ptr, physics.data.ptr, self._randomized)
        return np.append(state, [self._steps, self._env._step_count])

    def restore(self, values: np.ndarray, *, steps: int | None = None) -> None:
        """Set the simulator to a `snapshot`; subsequent steps are then reproduced bitwise.

        Args:
          values: a `snapshot`.
          steps: age of the episode in agent steps; the stored age by default.
        """
        physics = self._env.physics
        states.write_state(physics.model.ptr, physics.data.ptr, self._randomized, values[:-2])
        # dm_control ends each step with the first half of the next one.
        mujoco.mj_step1(physics.model.ptr, physics.data.ptr)
        counts = values[-2:] if steps is None else (steps, steps)
        self._steps, self._env._step_count = (int(n) for n in counts)
        self._env._reset_next_step = False

    @property
    def mujoco(self) -> tuple[Any, Any]:
        """Return MuJoCo's model and data."""
        return self._env.physics.model.ptr, self._env.physics.data.ptr

    def render(self) -> np.ndarray:
        """Return the image of the first camera: (H, W, 3) uint8."""
        camera = 0 if self._env.physics.model.ncam else -1
        return self._env.physics.render(HEIGHT, WIDTH, camera_id=camera)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
