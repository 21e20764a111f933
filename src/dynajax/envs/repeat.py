"""Repeat each action for several frames (simulator control steps) and sum their rewards."""

from typing import Any

import gymnasium
import numpy as np

from dynajax.envs.checks import ValueRanges


class ActionRepeat(gymnasium.Env):
    """An environment of `envs.make` in which each action is repeated.

    One step of this environment, an agent step, is `repeat` frames. It ends early at a frame that
    is terminated, truncated or not finite, so the last agent step of an episode can be shorter. A
    frame that is not finite makes the reward of the agent step NaN.

    Attributes:
      obs_names, obs_parts, task_action_shape: as in `GymnasiumEnv`.
      time_limit: maximum number of agent steps per episode.
      bounds: actions (A,) of the task that correspond to -1 and 1.
      num_frames: frames of the last agent step.

    Args:
      env: environment whose steps are the frames.
      repeat: frames per agent step, 1 or more.
    """

    def __init__(self, env: Any, repeat: int) -> None:
        self._env, self._repeat, self.num_frames = env, repeat, 0
        self.obs_names, self.bounds = env.obs_names, env.bounds
        self.obs_parts, self.task_action_shape = env.obs_parts, env.task_action_shape
        self.time_limit = -(-env.time_limit // repeat)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.render_mode = env.render_mode
        fps = env.metadata.get("render_fps")
        self.metadata = {**env.metadata, "render_fps": fps / repeat} if fps else env.metadata

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        return self._env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one action (A,) for up to `repeat` frames."""
        total, self.num_frames = 0.0, 0
        for _ in range(self._repeat):
            self.num_frames += 1
            obs, reward, terminated, truncated, info = self._env.step(action)
            total += reward
            is_finite = np.isfinite(obs).all() and np.isfinite(reward)
            if terminated or truncated or not is_finite:
                break
        return obs, total if is_finite else np.nan, terminated, truncated, info

    def snapshot(self) -> np.ndarray:
        """Return the simulator's state between two agent steps; see `envs.states`."""
        return self._env.snapshot()

    def restore(self, values: np.ndarray, *, steps: int | None = None) -> None:
        """Set the simulator to a `snapshot`; see `DMControlEnv.restore`.

        Args:
          values: a `snapshot`.
          steps: age of the episode in agent steps.
        """
        self._env.restore(values, steps=None if steps is None else steps * self._repeat)

    @property
    def unrestorable(self) -> str | None:
        """Return the reason why the task cannot be set to a state, or None if it can."""
        return self._env.unrestorable

    @property
    def statistics(self) -> tuple[str, ...]:
        """Return the class names of the wrappers that keep running statistics."""
        return self._env.statistics

    @property
    def value_ranges(self) -> ValueRanges:
        """Return the ranges of the first observations and rewards of frames."""
        return self._env.value_ranges

    @property
    def mujoco(self) -> tuple[Any, Any] | None:
        """Return MuJoCo's model and data, or None if the task has none."""
        return self._env.mujoco

    def render(self) -> Any:
        """Return an image of the task: (H, W, 3) uint8."""
        return self._env.render()

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
