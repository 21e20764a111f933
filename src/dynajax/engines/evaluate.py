"""Evaluation episodes with the deterministic policy."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dynajax.config import Config
from dynajax.envs.training_envs import all_finite
from dynajax.envs.vector import Stream, VectorEnv, default_workers, episode_seed
from dynajax.types import EnvSpec, Evaluation


class Evaluator:
    """Runs K = config.eval.episodes episodes for each row, all in lockstep.

    Args:
      config: a run's configuration.
      spec: what `envs.spec` says of its task.
      row_seeds: S seeds, those of the training environments.
      discounts: S discounts of the rows; the configuration's if not given.
      stream: of which stream the episodes are, see `episode_seed`.
    """

    def __init__(
        self,
        config: Config,
        spec: EnvSpec,
        row_seeds: Sequence[int],
        discounts: Sequence[float] | None = None,
        stream: Stream = "evaluate",
    ):
        self._stream = stream
        self._spec = spec
        self._seeds = [int(s) for s in row_seeds]
        self._episodes = config.eval.episodes
        self._discounts = discounts or [config.learn.discount] * len(self._seeds)
        n = len(self._seeds) * self._episodes
        self._pool = VectorEnv(
            spec.name,
            n,
            workers=default_workers(config, n),
            **config.stepping,
            seeds=np.repeat(self._seeds, self._episodes).tolist(),
        )

    def __call__(self, act: Callable[[np.ndarray], Any], step: int) -> Evaluation:
        """Episodes that depend on the policy, the row's seed and `step` alone.

        Args:
          act: (S, K, D) float32 -> (S, K, A), the deterministic policy of every row. An episode
            that is over keeps its last observation.
          step: environment steps of training so far.

        Returns:
          Returns and lengths; an episode ends at a transition that is not finite, which does not
          count.
        """
        rows, k = len(self._seeds), self._episodes
        seeds = [
            episode_seed(seed, self._stream, step * k + i) for seed in self._seeds for i in range(k)
        ]
        returns, lengths = np.zeros(rows * k), np.zeros(rows * k, np.int64)
        discounted, discount = np.zeros(rows * k), np.repeat(self._discounts, k)
        obs = self._pool.reset(np.arange(rows * k), seeds)
        starts = obs.copy()
        active = np.flatnonzero(all_finite(obs))
        while active.size:
            actions = np.asarray(act(obs.reshape(rows, k, -1)), np.float32)
            actions = actions.reshape(rows * k, -1)[active]
            next_obs, reward, terminated, truncated = self._pool.step(active, actions)
            good = all_finite(next_obs, reward)
            stepped = active[good]
            # JAX may still read the old array, for it takes numpy arrays without a copy.
            obs = obs.copy()
            obs[stepped] = next_obs[good]
            returns[stepped] += reward[good]
            discounted[stepped] += discount[stepped] ** lengths[stepped] * reward[good]
            lengths[stepped] += 1
            active = active[good & ~terminated & ~truncated]
        shape = rows, k
        return Evaluation(
            returns.reshape(shape),
            lengths.reshape(shape),
            starts.reshape(*shape, -1),
            discounted.reshape(shape),
        )

    def close(self) -> None:
        """Ends the environments and their processes."""
        self._pool.close()
