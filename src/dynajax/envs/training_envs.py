"""Training environments of the host engine: S environments of one task, one per learner."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np

from dynajax.config import Config
from dynajax.envs import terminations
from dynajax.envs.vector import VectorEnv, default_workers, episode_seed
from dynajax.types import EnvSpec, TrainState, Transition, UsageError

# After this many resets that are not finite, assume that further ones will not be either.
_MAX_RESETS = 10
# Relative differences up to this one can be rounding errors of another processor.
_ROUNDING = 1e-4


def all_finite(obs: np.ndarray, reward: np.ndarray | float = 0.0) -> np.ndarray:
    """Return a mask (n,) of the environments whose obs (n, D) and reward (n,) are finite."""
    return np.isfinite(obs).all(-1) & np.isfinite(reward)


class TrainingEnvs:
    """S environments of one task, one per learner, each with its own sequence of episodes.

    Episode e of a learner is reset with `episode_seed(learner_seed, "train", e)`. A checkpoint
    therefore stores only the index of the current episode and its actions, not the simulator.

    Attributes:
      obs: (S, D) float32, current observations.
      dropped: (S,) int, number of transitions that were not finite.
      frames: (S,) int, number of simulator steps.

    Args:
      config: the run's configuration.
      spec: the task's description, see `envs.spec`.
      learner_seeds: S seeds; learners with the same seed have the same initial states.

    Warns:
      UserWarning: a wrapper of the task keeps running statistics, separately in each environment.
    """

    obs: np.ndarray

    def __init__(self, config: Config, spec: EnvSpec, learner_seeds: Sequence[int]):
        n = len(learner_seeds)
        self._spec = spec
        self._seeds = [int(s) for s in learner_seeds]
        self._needs_termination = config.has_model and spec.termination is None
        self._indices = np.arange(n)
        self._episode = np.full(n, -1)
        self._returns = np.zeros(n)
        self._actions: list[list[np.ndarray]] = [[] for _ in range(n)]
        # Observation and reward (D + 1,) of the reset and of each step of the current episodes.
        self._trace: list[list[np.ndarray]] = [[] for _ in range(n)]
        # Number, actions and trace of the previous episode, without its last step.
        self._previous: list[tuple[int, list[np.ndarray], list[np.ndarray]]] = [(0, [], [])] * n
        self._finished: list[tuple[int, float, int]] = []
        self.dropped = np.zeros(n, np.int64)
        self.frames = np.zeros(n, np.int64)
        self._vector_env = VectorEnv(
            spec.name,
            n,
            workers=default_workers(config, n),
            seeds=self._seeds,
            **config.stepping,
        )
        self._statistics = " and ".join(self._vector_env.statistics)
        if self._statistics:
            warnings.warn(
                f"--env={spec.name}: {self._statistics} keeps running statistics, which differ "
                "between training and evaluation and are reset when a run is resumed",
                stacklevel=2,
            )

    def start(self) -> None:
        """Start episode 0 of every learner."""
        self._episode[:] = -1
        self.obs = np.zeros((len(self._indices), self._spec.obs_dim), np.float32)
        self._start_next_episode(self._indices)

    def _reset(self, indices: np.ndarray) -> np.ndarray:
        """Reset `indices` to their current episodes; return the first observations (len, D)."""
        seeds = [episode_seed(self._seeds[i], "train", int(self._episode[i])) for i in indices]
        return self._vector_env.reset(indices, seeds)

    def _start_next_episode(self, indices: np.ndarray) -> None:
        """Start the next episode of `indices` and write the first observations to `obs`.

        `obs` must be a new array that has not been passed to JAX, which may read it without a copy.
        """
        for i in indices:
            if self._actions[i]:
                number, trace = int(self._episode[i]), self._trace[i]
                self._previous[i] = number, self._actions[i][:-1], trace[: len(self._actions[i])]
            self._returns[i], self._actions[i] = 0.0, []
        for _ in range(_MAX_RESETS):
            if not indices.size:
                return
            self._episode[indices] += 1
            self.obs[indices] = self._reset(indices)
            for i in indices:
                self._trace[i] = [np.append(self.obs[i], np.float32(0))]
            indices = indices[~all_finite(self.obs[indices])]
        if indices.size:
            raise UsageError(
                f"--env={self._spec.name}: {_MAX_RESETS} resets in a row returned an observation "
                "that is not finite; reset() must return finite numbers"
            )

    def step(self, actions: np.ndarray) -> tuple[Transition, np.ndarray]:
        """Step every environment, and start the next episode of those whose episode ended.

        Args:
          actions: (S, A) float32 in [-1, 1].

        Returns:
          The transitions, leaves (S, ...) float32, and a mask `valid` (S,). `next_obs` is the true
          last observation of an episode, and `discount` is 0 only if it terminated. A transition
          that is not finite is invalid: it is set to zeros, counted in `dropped`, and ends the
          episode.

        Raises:
          UsageError: an episode terminated, but model rollouts have no termination function.
        """
        actions = np.array(actions, np.float32)
        next_obs, reward, terminated, truncated, frames = self._vector_env.step(
            self._indices, actions
        )
        valid = all_finite(next_obs, reward)
        if self._needs_termination and (terminated & valid).any():
            first = np.flatnonzero(terminated & valid)[0]
            steps = len(self._actions[first]) + 1
            raise UsageError(terminations.unknown_message(self._spec.name, steps))
        discount = 1 - terminated.astype(np.float32)
        transition = Transition(self.obs, actions, reward, discount, next_obs)
        if not valid.all():
            masks = (valid.reshape(-1, *[1] * (x.ndim - 1)) for x in transition)
            transition = Transition(*map(np.where, masks, transition, [np.float32(0)] * 5))
        self._returns += transition.reward
        self.dropped += ~valid
        self.frames += frames
        rows = np.concatenate([next_obs, reward[:, None]], axis=1)
        for i in self._indices[valid]:
            self._actions[i].append(actions[i])
            self._trace[i].append(rows[i])
        ended = self._indices[terminated | truncated | ~valid]
        self._finished += [
            (int(i), float(self._returns[i]), len(self._actions[i])) for i in ended if valid[i]
        ]
        # The transition keeps the last observations, in whose place the first ones are written.
        self.obs = next_obs.copy() if ended.size else next_obs
        self._start_next_episode(ended)
        return transition, valid

    def restart_episodes(self) -> None:
        """End the running episodes without a termination, after another use of the environments.

        They are not counted as finished, because their returns are incomplete. An episode that has
        just begun starts again from the same state.
        """
        self.obs = self.obs.copy()
        self._episode -= [not actions for actions in self._actions]
        self._start_next_episode(self._indices)

    def snapshot(self) -> np.ndarray:
        """Return the physics states of all environments: (S, L) float64, see `envs.states`."""
        return self._vector_env.snapshot(self._indices)

    def value_ranges(self, state: TrainState) -> np.ndarray:
        """Return the ranges of the first observations and rewards; see `Engine`."""
        return self._vector_env.value_ranges(self._indices)

    def pop_finished(self) -> list[tuple[int, float, int]]:
        """Return (learner, return, length) of the episodes that ended since the last call.

        Those that ended with a transition that was not finite are left out.
        """
        finished, self._finished = self._finished, []
        return finished

    def progress(self) -> dict[str, np.ndarray]:
        """Return the state for a checkpoint, from which `restore` continues.

        Returns:
          "episode", "length", "dropped", "frames" (S,) int64; "return" (S,) float64;
          "actions" (S, L, A) and "trace" (S, L + 1, D + 1) float32, padded with zeros to the longest
          length L (at least 1): the observation and reward of the reset and each step;
          the same of the previous episode with the prefix "previous.", empty if the current one has
          a step;
          "finished" (F, 3) float64, the episodes that have not been popped, or one row of -1.
        """
        # Where an episode has just begun, only the previous one can show that the task was changed.
        none: tuple[int, list[np.ndarray], list[np.ndarray]] = (0, [], [])
        previous = [
            none if actions else old
            for actions, old in zip(self._actions, self._previous, strict=True)
        ]
        numbers, *steps = zip(*previous, strict=True)
        compared = {"episode": np.array(numbers), **self._pad(*steps)}
        return {
            "episode": self._episode.copy(),
            "return": self._returns.copy(),
            **self._pad(self._actions, self._trace),
            "dropped": self.dropped.copy(),
            "frames": self.frames.copy(),
            **{f"previous.{name}": array for name, array in compared.items()},
            # Not every checkpoint format can store an empty array.
            "finished": np.array(self._finished or [(-1, -1, -1)], np.float64),
        }

    def _pad(
        self, all_actions: Sequence[list[np.ndarray]], traces: Sequence[list[np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Return "length", "actions" and "trace" of S episodes as arrays, see `progress`."""
        length = np.array([len(a) for a in all_actions], np.int64)
        longest = max(1, *map(len, all_actions))
        actions = np.zeros((len(length), longest, self._spec.action_dim), np.float32)
        trace = np.zeros((len(length), longest + 1, self._spec.obs_dim + 1), np.float32)
        for i, (taken, rows) in enumerate(zip(all_actions, traces, strict=True)):
            if taken:
                actions[i, : len(taken)] = taken
            if rows:
                trace[i, : len(rows)] = rows
        return {"length": length, "actions": actions, "trace": trace}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Restore `progress` by resetting to the episodes' seeds and repeating their actions.

        If the result of a learner is not bitwise equal, a warning names the learner, and its next
        episode starts. The warning also names running statistics that are lost.

        Raises:
          UsageError: the task was changed, see `_check_unchanged`.
        """
        self.obs = np.zeros((len(self._indices), self._spec.obs_dim), np.float32)
        self._check_previous(progress)
        length = np.array(progress["length"], np.int64)
        self._episode = np.array(progress["episode"], np.int64)
        self._returns = np.array(progress["return"], np.float64)
        self.dropped = np.array(progress["dropped"], np.int64)
        self.frames = np.array(progress["frames"], np.int64)
        self._finished = [(int(i), float(g), int(n)) for i, g, n in progress["finished"] if i >= 0]
        actions = np.asarray(progress["actions"], np.float32)
        self._actions = [list(a[:n]) for a, n in zip(actions, length, strict=True)]
        trace = np.array(progress["trace"], np.float32)
        self._trace = [list(rows[: n + 1]) for rows, n in zip(trace, length, strict=True)]
        differences = self._replay(self._indices)
        self._check_unchanged(differences)
        lost = f"; the running statistics of {self._statistics} before it are lost"
        for i in differences:
            warnings.warn(
                f"--env={self._spec.name}: the episode of learner {i} cannot be reproduced from "
                "its seed and actions, so its next episode starts"
                f"{lost if self._statistics else ''}",
                stacklevel=2,
            )
        self._start_next_episode(np.array(list(differences), np.int64))

    def _check_previous(self, progress: Mapping[str, np.ndarray]) -> None:
        """Repeat the previous episodes of learners whose current one has just begun.

        Raises:
          UsageError: the task was changed, see `_check_unchanged`.
        """
        length = np.asarray(progress["previous.length"])
        if not length.any():
            return
        self._episode = np.array(progress["previous.episode"], np.int64)
        pairs = zip(progress["previous.actions"], progress["previous.trace"], length, strict=True)
        episodes = [(list(actions[:n]), list(trace[: n + 1])) for actions, trace, n in pairs]
        self._actions, self._trace = map(list, zip(*episodes, strict=True))
        self._check_unchanged(self._replay(np.flatnonzero(length)))

    def _replay(self, indices: np.ndarray) -> dict[int, tuple[int, np.ndarray]]:
        """Repeat the episodes of `indices`, each up to its first difference, and write `obs`.

        Returns:
          For each learner with a difference: the number of the step (0: the reset), and what it
          returned: observation, reward and end (D + 2,) float32.
        """
        differences: dict[int, tuple[int, np.ndarray]] = {}
        step, rows = 0, np.zeros((len(indices), self._spec.obs_dim + 2), np.float32)
        if indices.size:
            rows[:, :-2] = self._reset(indices)
        while indices.size:
            self.obs[indices] = rows[:, :-2]
            going_on = []
            for i, row in zip(indices, rows, strict=True):
                recorded = self._trace[i][step]
                # Compare as integers, because -0.0 equals 0.0 as a float.
                same = row[:-1].view(np.uint32) == recorded.view(np.uint32)
                if row[-1] or not (np.isfinite(row).all() and same.all()):
                    differences[int(i)] = step, row
                    continue
                if step < len(self._actions[i]):
                    going_on.append(i)
            indices = np.array(going_on, np.int64)
            if indices.size:
                actions = np.stack([self._actions[i][step] for i in indices])
                obs, reward, terminated, truncated, _ = self._vector_env.step(indices, actions)
                rows = np.column_stack([obs, reward, terminated | truncated]).astype(np.float32)
            step += 1
        return differences

    def _check_unchanged(self, differences: Mapping[int, tuple[int, np.ndarray]]) -> None:
        """Refuse a task that was changed after the checkpoint was saved.

        A task is changed if a step from the same state has another result, and has it again when
        the episode is repeated once more: the results of some tasks depend on more than the seed.
        Differences in the size of rounding errors are not a change: another processor causes them.

        Raises:
          UsageError: the task was changed; the line says in what.
        """
        again = self._replay(np.array(list(differences), np.int64))
        for i, (step, row) in differences.items():
            recorded = np.array(self._trace[i])
            if step == 0 or i not in again:
                continue
            scale = np.abs(recorded).max(0)
            tolerance = _ROUNDING * np.append(scale + 1e-3 * scale.max(), 1.0)
            before = np.append(recorded[step], np.float32(0))
            large = np.flatnonzero(~(np.abs(row - before) <= tolerance))
            if again[i][0] != step or not np.array_equal(again[i][1], row, equal_nan=True):
                continue
            if large.size:
                names = [*self._spec.obs_names, "the reward", "the end of the episode"]
                first = large[0]
                self._refuse(
                    i,
                    f"{names[first]} of step {step} is {row[first]:.7g} and was {before[first]:.7g}",
                )

    def _refuse(self, learner: int, difference: str) -> NoReturn:
        raise UsageError(
            f"--env={self._spec.name}: the task was changed after the checkpoint was saved: in the "
            f"episode of learner {learner}, repeated with the same actions, {difference}; choose "
            "another --out to start a new run, or restore the task"
        )

    def close(self) -> None:
        """Close the environments and stop their processes."""
        self._vector_env.close()
