"""Action repeat: a decision lasts several simulator steps, its frames, and sums their rewards."""

from typing import Any

import gymnasium
import numpy as np


class Repeat(gymnasium.Env):
    """An environment of `envs.make` whose steps are decisions.

    A terminated or truncated frame ends the decision, and so does one that is not finite, which
    makes the decision's reward NaN. The last decision of an episode can be shorter.

    Attributes:
      obs_names: D names.
      time_limit: decisions of an episode, at most.
      bounds: actions (A,) of the task that -1 and 1 stand for.

    Args:
      env: what takes the frames.
      repeat: frames of a decision, 1 or more.
    """

    def __init__(self, env: Any, repeat: int) -> None:
        self._env, self._repeat = env, repeat
        self.obs_names, self.bounds = env.obs_names, env.bounds
        self.time_limit = -(-env.time_limit // repeat)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.render_mode = env.render_mode
        fps = env.metadata.get("render_fps")
        self.metadata = {**env.metadata, "render_fps": fps / repeat} if fps else env.metadata

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode."""
        return self._env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes one action (A,) for as many frames as the decision has."""
        total = 0.0
        for _ in range(self._repeat):
            obs, reward, terminated, truncated, info = self._env.step(action)
            total += reward
            finite = np.isfinite(obs).all() and np.isfinite(reward)
            if terminated or truncated or not finite:
                break
        return obs, total if finite else np.nan, terminated, truncated, info

    def snapshot(self) -> np.ndarray:
        """The simulator's state between two decisions; see `envs.states`."""
        return self._env.snapshot()

    def restore(self, values: np.ndarray, *, steps: int | None = None) -> None:
        """Sets the simulator to a `snapshot`; `steps` are decisions, see `DMControlEnv.restore`."""
        self._env.restore(values, steps=None if steps is None else steps * self._repeat)

    @property
    def unrestorable(self) -> str | None:
        """Why the task cannot be set to a state; None if it can."""
        return self._env.unrestorable

    @property
    def can_restore(self) -> bool:
        """Whether the task can be set to a state."""
        return self._env.can_restore

    @property
    def statistics(self) -> tuple[str, ...]:
        """The wrappers that keep running statistics, by class name."""
        return self._env.statistics

    @property
    def mujoco(self) -> tuple[Any, Any] | None:
        """MuJoCo's own model and data, where the task has them."""
        return self._env.mujoco

    def render(self) -> Any:
        """The task's picture: (H, W, 3) uint8."""
        return self._env.render()

    def close(self) -> None:
        self._env.close()
