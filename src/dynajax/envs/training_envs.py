"""The host engine: S environments of one task in real physics, one for each row."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from dynajax.config import Config
from dynajax.envs.vector import VectorEnv, default_workers, episode_seed
from dynajax.types import EnvSpec, Transition, UsageError

# A task whose reset is not finite this often in a row will not get better.
_RESET_TRIES = 10


def finite(obs: np.ndarray, reward: np.ndarray | float = 0.0) -> np.ndarray:
    """Which rows of obs (n, D) and reward (n,) hold numbers only: (n,) bool."""
    return np.isfinite(obs).all(-1) & np.isfinite(reward)


class TrainingEnvs:
    """Training environments, each with its own stream of episodes.

    Episode e of a row is reset with `episode_seed(row_seed, "train", e)`, so its seed and its
    actions are all that a checkpoint needs of the simulator.

    Attributes:
      obs: (S, D) float32, current observations.
      dropped: (S,) int, transitions that were not finite.

    Args:
      config: a run's configuration.
      spec: what `envs.spec` says of its task.
      row_seeds: S seeds; rows that share one see the same first states.

    Warns:
      UserWarning: a wrapper of the task keeps running statistics, of which every environment has
        its own.
    """

    obs: np.ndarray

    def __init__(self, config: Config, spec: EnvSpec, row_seeds: Sequence[int]):
        rows = len(row_seeds)
        self._spec = spec
        self._seeds = [int(s) for s in row_seeds]
        self._needs_termination = config.algo == "mbpo" and spec.termination is None
        self._rows = np.arange(rows)
        self._episode = np.full(rows, -1)
        self._returns = np.zeros(rows)
        self._actions: list[list[np.ndarray]] = [[] for _ in range(rows)]
        self._finished: list[tuple[int, float, int]] = []
        self.dropped = np.zeros(rows, np.int64)
        self._pool = VectorEnv(
            spec.name,
            rows,
            workers=default_workers(config, rows),
            seeds=self._seeds,
            **config.stepping,
        )
        self._statistics = " and ".join(self._pool.statistics)
        if self._statistics:
            warnings.warn(
                f"--env={spec.name}: {self._statistics} keeps running statistics; those of training "
                "and of evaluation are not the same, and a resumed run begins them anew",
                stacklevel=2,
            )

    def start(self) -> None:
        """Begins episode 0 of every row."""
        self._episode[:] = -1
        self.obs = np.zeros((len(self._rows), self._spec.obs_dim), np.float32)
        self._next_episode(self._rows)

    def _reset(self, rows: np.ndarray) -> np.ndarray:
        """First observations (len, D) of the current episodes of `rows`."""
        seeds = [episode_seed(self._seeds[r], "train", int(self._episode[r])) for r in rows]
        return self._pool.reset(rows, seeds)

    def _next_episode(self, rows: np.ndarray) -> None:
        """Resets `rows`, in an `obs` that nobody else has seen: JAX may read it without a copy."""
        for row in rows:
            self._returns[row], self._actions[row] = 0.0, []
        for _ in range(_RESET_TRIES):
            if not rows.size:
                return
            self._episode[rows] += 1
            self.obs[rows] = self._reset(rows)
            rows = rows[~finite(self.obs[rows])]
        if rows.size:
            raise UsageError(
                f"--env={self._spec.name}: {_RESET_TRIES} resets in a row gave an observation "
                "that is not finite; reset() must return numbers"
            )

    def step(self, actions: np.ndarray) -> tuple[Transition, np.ndarray]:
        """Steps every row, and begins the next episode where one ended.

        Args:
          actions: (S, A) float32 in [-1, 1].

        Returns:
          The transitions, leaves (S, ...) float32, `next_obs` being the true last observation of
          an episode and `discount` 0 only where it terminated; and valid (S,) bool. A row whose
          observation or reward is not finite is not valid: it holds zeros, counts as dropped,
          and ends its episode.

        Raises:
          UsageError: an episode terminated, and model rollouts do not know when they should.
        """
        actions = np.array(actions, np.float32)
        next_obs, reward, terminated, truncated = self._pool.step(self._rows, actions)
        valid = finite(next_obs, reward)
        if self._needs_termination and (terminated & valid).any():
            name = self._spec.name
            raise UsageError(
                f"--env={name}: an episode terminated, and the model's rollouts have no rule for "
                f"it; give one with dynajax.register_termination({name.rpartition(':')[2]!r}, "
                "function), or choose --algo=model-free"
            )
        discount = 1 - terminated.astype(np.float32)
        whole = Transition(self.obs, actions, reward, discount, next_obs)
        transition = Transition(
            *(np.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, np.float32(0)) for x in whole)
        )
        self._returns += transition.reward
        self.dropped += ~valid
        for row in self._rows[valid]:
            self._actions[row].append(actions[row])
        ended = self._rows[terminated | truncated | ~valid]
        self._finished += [(int(r), float(self._returns[r]), len(self._actions[r])) for r in ended]
        self.obs = next_obs
        self._next_episode(ended)
        return transition, valid

    def snapshot(self) -> np.ndarray:
        """The physics states of all rows: (S, L) float64, see `envs.states`."""
        return self._pool.snapshot(self._rows)

    def pop_finished(self) -> list[tuple[int, float, int]]:
        """(row, return, length) of the episodes that ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def progress(self) -> dict[str, np.ndarray]:
        """All that it takes to go on from here.

        Returns:
          "episode", "length", "dropped" (S,) int64; "return" (S,) float64; "obs" (S, D) float32;
          "actions" (S, L, A) float32, zeros after each row's length, L being the longest (at
          least 1); "finished" (F, 3) float64, the episodes not yet popped, or one row of -1.
        """
        length = np.array([len(a) for a in self._actions], np.int64)
        longest = max(1, *map(len, self._actions))
        actions = np.zeros((len(length), longest, self._spec.action_dim), np.float32)
        for row, taken in enumerate(self._actions):
            if taken:
                actions[row, : len(taken)] = taken
        return {
            "episode": self._episode.copy(),
            "length": length,
            "return": self._returns.copy(),
            "actions": actions,
            "obs": self.obs.copy(),
            "dropped": self.dropped.copy(),
            # No array is empty, for not every checkpoint format can hold one that is.
            "finished": np.array(self._finished or [(-1, -1, -1)], np.float64),
        }

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Goes back to `progress`, by taking its actions again from the episodes' seeds.

        A row that does not arrive at the same observation, bit for bit, begins its next episode,
        and a warning names it, and the running statistics that are lost.
        """
        length, actions = progress["length"], np.asarray(progress["actions"], np.float32)
        self._episode = np.array(progress["episode"], np.int64)
        self._returns = np.array(progress["return"], np.float64)
        self.dropped = np.array(progress["dropped"], np.int64)
        self._actions = [list(a[:n]) for a, n in zip(actions, length, strict=True)]
        self._finished = [(int(r), float(g), int(n)) for r, g, n in progress["finished"] if r >= 0]
        obs = self._reset(self._rows)
        same = finite(obs)
        for t in range(int(length.max())):
            rows = self._rows[(t < length) & same]
            obs[rows], reward, terminated, truncated = self._pool.step(rows, actions[rows, t])
            same[rows] = finite(obs[rows], reward) & ~terminated & ~truncated
        self.obs = obs
        wanted = np.asarray(progress["obs"], np.float32)
        # As integers, for -0.0 equals 0.0.
        same &= (obs.view(np.uint32) == wanted.view(np.uint32)).all(-1)
        lost = f"; the running statistics of {self._statistics} before it are lost"
        for row in self._rows[~same]:
            warnings.warn(
                f"--env={self._spec.name}: the episode of row {row} does not repeat from its seed "
                "and actions, so the row starts its next episode"
                f"{lost if self._statistics else ''}",
                stacklevel=2,
            )
        self._next_episode(self._rows[~same])

    def close(self) -> None:
        """Ends the environments and their processes."""
        self._pool.close()
