"""Evaluation episodes with the deterministic policy."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dynajax.config import Config
from dynajax.envs.training_envs import all_finite
from dynajax.envs.vector import Stream, VectorEnv, default_workers, episode_seed
from dynajax.types import EnvSpec, Evaluation


class Evaluator:
    """Run K = `config.eval.episodes` episodes of each learner, all in lockstep.

    Args:
      config: the configuration of the run.
      spec: the specification of its task, from `envs.spec`.
      seeds: S seeds of the learners, which are also those of the training environments.
      discounts: S discounts of the learners; by default that of the configuration.
      stream: the stream of episode seeds, see `episode_seed`.
    """

    def __init__(
        self,
        config: Config,
        spec: EnvSpec,
        seeds: Sequence[int],
        discounts: Sequence[float] | None = None,
        stream: Stream = "evaluate",
    ):
        self._stream = stream
        self._seeds = [int(s) for s in seeds]
        self._episodes = config.eval.episodes
        self._discounts = discounts or [config.learn.discount] * len(self._seeds)
        n = len(self._seeds) * self._episodes
        self._envs = VectorEnv(
            spec.name,
            n,
            workers=default_workers(config, n),
            **config.stepping,
            seeds=np.repeat(self._seeds, self._episodes).tolist(),
        )

    def __call__(
        self,
        policy: Callable[[np.ndarray], Any],
        step: int,
        check: Callable[[], None] | None = None,
    ) -> Evaluation:
        """Run episodes that depend only on the policy, the learner's seed and `step`.

        Args:
          policy: (S, K, D) float32 -> (S, K, A), the deterministic policies of all learners. An
            episode that is over keeps its last observation.
          step: environment steps of training so far.
          check: is called between the steps, and may raise an exception.

        Returns:
          Returns and lengths. A transition that is not finite ends its episode and is not counted.
        """
        shape = num_learners, k = len(self._seeds), self._episodes
        n = num_learners * k
        seeds = [
            episode_seed(seed, self._stream, step * k + i) for seed in self._seeds for i in range(k)
        ]
        returns, lengths = np.zeros(n), np.zeros(n, np.int64)
        discounted, discount = np.zeros(n), np.repeat(self._discounts, k)
        obs = self._envs.reset(np.arange(n), seeds)
        starts = obs.copy()
        active = np.flatnonzero(all_finite(obs))
        while active.size:
            if check is not None:
                check()
            actions = np.asarray(policy(obs.reshape(num_learners, k, -1)), np.float32)
            actions = actions.reshape(n, -1)[active]
            next_obs, reward, terminated, truncated = self._envs.step(active, actions)
            valid = all_finite(next_obs, reward)
            stepped = active[valid]
            # JAX uses numpy arrays without copying them and may still read the old one.
            obs = obs.copy()
            obs[stepped] = next_obs[valid]
            returns[stepped] += reward[valid]
            discounted[stepped] += discount[stepped] ** lengths[stepped] * reward[valid]
            lengths[stepped] += 1
            active = active[valid & ~terminated & ~truncated]
        return Evaluation(
            returns.reshape(shape),
            lengths.reshape(shape),
            starts.reshape(*shape, -1),
            discounted.reshape(shape),
        )

    def close(self) -> None:
        """Close the environments and end their processes."""
        self._envs.close()
