"""Rollouts inside each update: the current policy and model generate the synthetic part of a
minibatch, and nothing is stored (as in MAD-TD; Voelcker et al., 2025)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dynajax import replay
from dynajax.config import Config
from dynajax.models.model_env import ModelEnv
from dynajax.synthetic.base import RolloutStarts, Source, SourceKeys, UpdateInputs
from dynajax.types import (
    LearnerState,
    Metrics,
    Minibatch,
    PackedTransitions,
    Shared,
    UsageError,
)


class OnTheFly(Source):
    """Synthetic transitions that each update generates for itself from sampled real states."""

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a growing horizon, because the size of a minibatch is fixed."""
        if len(config.rollout.horizon) > 1:
            raise UsageError(
                f"--set rollout.horizon={','.join(map(str, config.rollout.horizon))}: with "
                "rollout.source=on_the_fly it must be one number"
            )

    def split_keys(self, rollout_key: Array, sample_key: Array) -> SourceKeys:
        """Return the keys of one agent step; no transitions are sampled, only starts."""
        return SourceKeys(sample_key, rollout_key, sample_key)

    def start_shape(self) -> tuple[int, ...] | None:
        """Return the shape of the starts of all updates' rollouts."""
        if not self.config.synthetic_batch:
            return None
        return self.config.learn.utd, self.config.num_parallel_rollouts

    def prepare(
        self,
        learner: LearnerState,
        shared: Shared,
        model_env: ModelEnv,
        real: PackedTransitions,
        starts: Int[Array, "*shape"] | None,
        keys: SourceKeys,
    ) -> tuple[LearnerState, UpdateInputs, Metrics]:
        """Look up where the rollouts of each update start."""
        if starts is None:
            return learner, UpdateInputs(real), {}
        obs = replay.gather(learner.real_buffer, starts).unpack().obs
        update_keys = jax.random.split(keys.rollout, self.config.learn.utd)
        length, batch = self.config.rollout.horizon[0], obs.shape[1]
        # The noise of all updates is drawn here: many small draws take longer.
        noise = jax.vmap(lambda key: model_env.draw_rollout(key, length, batch))(update_keys)
        return learner, UpdateInputs(real, starts=RolloutStarts(obs, noise)), {}

    def minibatches(
        self, model_env: ModelEnv, trust: Any, inputs: UpdateInputs
    ) -> tuple[Any, list[Minibatch], Metrics]:
        """Generate the synthetic transitions of one update, and return its minibatches."""
        real = replay.to_minibatch(inputs.real)
        if inputs.starts is None:
            return trust, [real], {}
        trust, synthetic, metrics = self._generate(model_env, trust, inputs.starts)
        if self.config.separate:
            return trust, [real, synthetic], metrics
        return trust, [replay.concatenate(real, synthetic)], metrics

    def _generate(
        self, model_env: ModelEnv, trust: Any, starts: RolloutStarts
    ) -> tuple[Any, Minibatch, Metrics]:
        """Return rollouts as the synthetic part of a minibatch.

        All steps of a rollout are learned from, the later ones only as far as it continues.
        """
        length = self.config.rollout.horizon[0]

        # Not packed: packing and unpacking cost a CPU 6 % of an agent step.
        def append(h: Array | int, steps: list[Minibatch], step: Minibatch) -> list[Minibatch]:
            return [*steps, step]

        trust, steps, metrics = model_env.collect(
            trust, starts.obs, length, starts.noise, append, [], longest=length, unroll=True
        )
        # Rollout by rollout, so that whole rollouts are cut off.
        size = self.config.synthetic_batch
        batch = jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:])[:size], *steps)
        rewards = jnp.where(batch.valid, batch.data.reward, 0.0).sum()
        mean = rewards / jnp.maximum(batch.valid.sum(), 1)
        return trust, batch, {**metrics, "synthetic_reward_mean": mean}
