"""Evaluation episodes with the deterministic policy."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dynajax.config import Config
from dynajax.envs.training_envs import all_finite
from dynajax.envs.vector import Stream, VectorEnv, default_workers, episode_seed
from dynajax.types import EnvSpec, Evaluation


class Evaluator:
    """Run K = `config.eval.episodes` episodes of each learner in lockstep.

    Attributes:
      memory: bytes that its own environments need.

    Args:
      config: the configuration of the run.
      spec: the specification of its task, from `envs.spec`.
      seeds: S seeds of the learners, which are also those of the training environments.
      discounts: S discounts of the learners; by default that of the configuration.
      stream: the stream of episode seeds, see `episode_seed`.
      training: environments of the learners, S, in which the episodes of a learner run one after
        the other; by default there is a copy of the task for every episode.
      task_seeds: S seeds with which the copies are made; by default `seeds`.
    """

    def __init__(
        self,
        config: Config,
        spec: EnvSpec,
        seeds: Sequence[int],
        discounts: Sequence[float] | None = None,
        stream: Stream = "evaluate",
        training: VectorEnv | None = None,
        task_seeds: Sequence[int] | None = None,
    ):
        self._stream = stream
        self._seeds = [int(s) for s in seeds]
        self._episodes, self._obs_dim = config.eval.episodes, spec.obs_dim
        self._discounts = discounts or [config.learn.discount] * len(self._seeds)
        n, k = len(self._seeds) * self._episodes, self._episodes
        self._stack = contextlib.ExitStack()
        self.memory = 0
        if training is not None:
            self._envs = training
            #: The environment of each episode, and the episodes that run at the same time.
            self._env_of = np.arange(n) // k
            self._rounds = list(np.arange(n).reshape(-1, k).T)
            return
        self._env_of, self._rounds = np.arange(n), [np.arange(n)]
        self._envs = VectorEnv(
            spec.name,
            n,
            workers=default_workers(config, n),
            **config.stepping,
            seeds=np.repeat(task_seeds or self._seeds, k).tolist(),
        )
        self._stack.callback(self._envs.close)
        self.memory = self._envs.memory

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
          step: agent steps of training so far.
          check: is called between the steps, and may raise an exception.

        Returns:
          Returns and lengths. A transition that is not finite ends its episode, whose returns are NaN:
          otherwise a policy that returns NaN would be the best one where rewards are negative.
        """
        shape = num_learners, k = len(self._seeds), self._episodes
        n = num_learners * k
        seeds = np.array(
            [
                episode_seed(seed, self._stream, step * k + i)
                for seed in self._seeds
                for i in range(k)
            ]
        )
        returns, lengths = np.zeros(n), np.zeros(n, np.int64)
        discounted, discount = np.zeros(n), np.repeat(self._discounts, k)
        starts = np.zeros((n, self._obs_dim), np.float32)
        for active in self._rounds:
            starts[active] = self._envs.reset(self._env_of[active], seeds[active])
            obs = starts.copy()
            valid = all_finite(obs[active])
            returns[active[~valid]] = discounted[active[~valid]] = np.nan
            active = active[valid]
            while active.size:
                if check is not None:
                    check()
                actions = np.asarray(policy(obs.reshape(num_learners, k, -1)), np.float32)
                actions = actions.reshape(n, -1)[active]
                result = self._envs.step(self._env_of[active], actions)
                valid = all_finite(result.obs, result.reward)
                stepped = active[valid]
                # JAX uses numpy arrays without copying them and may still read the old one.
                obs = obs.copy()
                obs[stepped] = result.obs[valid]
                returns[stepped] += result.reward[valid]
                discounted[stepped] += discount[stepped] ** lengths[stepped] * result.reward[valid]
                lengths[stepped] += 1
                returns[active[~valid]] = discounted[active[~valid]] = np.nan
                active = active[valid & ~result.terminated & ~result.truncated]
        return Evaluation(
            returns.reshape(shape),
            lengths.reshape(shape),
            starts.reshape(*shape, -1),
            discounted.reshape(shape),
        )

    def close(self) -> None:
        """Close the environments that were made for evaluations, and end their processes."""
        self._stack.close()
