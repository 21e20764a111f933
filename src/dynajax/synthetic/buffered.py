"""Buffered rollouts (Janner et al., 2019): each agent step rolls out the current policy from real
states into a synthetic buffer, from which all updates sample."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dynajax import replay
from dynajax.config import Config, fields, static
from dynajax.models.model_env import ModelEnv, rollout_metrics
from dynajax.replay import Request
from dynajax.synthetic.base import Source, SourceKeys, UpdateInputs
from dynajax.types import (
    LearnerState,
    Metrics,
    Minibatch,
    PackedTransitions,
    ReplayBuffer,
    Shared,
    UsageError,
)
from dynajax.xla.branches import apply_if


def horizon(config: Config, step: Int[Array, ""]) -> Array | int:
    """Return the rollouts' length at an agent step, linear between two steps.

    A constant horizon stays a Python number, so that its loop has a known length.
    """
    h = config.rollout.horizon
    if len(h) == 1:
        return h[0]
    first_step, last_step, first, last = h
    # In integers: a float32 fraction falls short of whole horizons.
    passed = jnp.clip(step - first_step, 0, last_step - first_step)
    return first + passed * (last - first) // (last_step - first_step)


@fields
@dataclass(frozen=True)
class BufferedFields:
    """Settings of `Buffered`."""

    #: Marks sources that roll out `rollout.batch` states at each agent step, see `Config`.
    buffered: ClassVar[bool] = True

    regenerate_every: int = static(
        0, 0, about="agent steps after which the synthetic buffer is cleared and refilled; 0: never"
    )


class Buffered(Source):
    """Synthetic transitions from a buffer that each agent step adds rollouts to.

    With `source.regenerate_every` n, rollouts are made only every n agent steps, into a buffer that
    is cleared before (WIMLE, 2026).
    """

    Fields: ClassVar[type] = BufferedFields

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse buffer sizes and horizons that do not fit, and regeneration with an oracle."""
        h, batch, capacity = config.rollout.horizon, config.rollout.batch, config.replay.synthetic
        shown = ",".join(map(str, h))
        if capacity % batch:
            raise UsageError(
                f"--set replay.synthetic={capacity}: it must be a multiple of rollout.batch={batch}"
            )
        if max(h[-2:]) * batch > capacity:
            raise UsageError(
                f"--set rollout.horizon={shown}: rollout.batch x horizon must be at most "
                f"replay.synthetic={capacity}"
            )
        if config.oracle != "none" and (every := config.source.regenerate_every):
            raise UsageError(
                f"--oracle={config.oracle}: an oracle corrects rollouts at every agent step, and "
                f"source.regenerate_every={every} makes them less often; choose "
                "--set source.regenerate_every=0"
            )

    @property
    def _num_blocks(self) -> int:
        """Blocks of `rollout.batch` transitions in the synthetic buffer."""
        return self.config.replay.synthetic // self.config.rollout.batch

    def init(self) -> ReplayBuffer:
        """Return an empty synthetic buffer."""
        return replay.init(
            self.config.replay.synthetic,
            self.spec.obs_dim,
            self.spec.action_dim,
            weighted=self.rule.uses_weights,
        )

    def start_shape(self) -> tuple[int, ...]:
        """Return the shape of the starts of one agent step's rollouts."""
        return (self.config.rollout.batch,)

    def position(self, shared: Shared, h: Array | int = 0) -> Array:
        """Return the slot where step `h` of this agent step's rollouts begins."""
        # The remainder first: the total number of transitions can exceed an int32.
        return (shared.blocks + h) % self._num_blocks * self.config.rollout.batch

    def _regenerates(self, shared: Shared) -> Array:
        """Return whether this agent step clears and refills the buffer."""
        learning_step = shared.step + 1 - self.config.random_steps
        return learning_step % self.config.source.regenerate_every == 0

    def blocks_after(self, shared: Shared) -> Int[Array, ""]:
        """Return the blocks in the synthetic buffer after this agent step."""
        length = horizon(self.config, shared.step)
        if not self.config.source.regenerate_every:
            return shared.blocks + length
        return jnp.where(self._regenerates(shared), length, shared.blocks)

    def prepare(
        self,
        learner: LearnerState,
        shared: Shared,
        model_env: ModelEnv,
        real: PackedTransitions,
        starts: Int[Array, "*shape"] | None,
        keys: SourceKeys,
    ) -> tuple[LearnerState, UpdateInputs, Metrics]:
        """Add rollouts to the synthetic buffer, and sample the U minibatches."""
        assert starts is not None
        length = horizon(self.config, shared.step)
        learner, metrics = self.add_rollouts(learner, shared, model_env, starts, length, keys)
        return learner, self.sample(learner, shared, real, keys.sample), metrics

    def add_rollouts(
        self,
        learner: LearnerState,
        shared: Shared,
        model_env: ModelEnv,
        starts: Int[Array, " B"],
        length: Array | int,
        keys: SourceKeys,
    ) -> tuple[LearnerState, Metrics]:
        """Return the learner with this agent step's rollouts in its buffer, and metrics."""
        if not self.config.source.regenerate_every:
            return self._roll_out(learner, shared, model_env, starts, length, keys.rollout)
        # Only the buffer's flags are cleared: invalid slots are never sampled.
        empty = shared._replace(blocks=jnp.zeros_like(shared.blocks))

        def regenerate(learner: LearnerState) -> LearnerState:
            buffer: ReplayBuffer = learner.synthetic
            buffer = dataclasses.replace(buffer, valid=jnp.zeros_like(buffer.valid))
            cleared = learner._replace(synthetic=buffer)
            return self._roll_out(cleared, empty, model_env, starts, length, keys.rollout)[0]

        learner = apply_if(self._regenerates(shared), regenerate, learner)
        return learner, self._metrics_of_buffer(learner.synthetic, self.blocks_after(shared))

    def _metrics_of_buffer(self, buffer: ReplayBuffer, blocks: Int[Array, ""]) -> Metrics:
        """Return the metrics of the last regeneration, whose steps the buffer begins with.

        Metrics are logged at evaluations, which are rarely agent steps that regenerate. A penalty is
        NaN, because it is stored in the rewards only.
        """
        size, longest = self.config.rollout.batch, max(self.config.rollout.horizon[-2:])
        kept = buffer.valid[: longest * size].reshape(longest, size).mean(1)
        sums = {"kept": kept} | dict.fromkeys(self.rule.metrics, jnp.full((), jnp.nan))
        if buffer.weight is not None:
            sums["weight"] = jnp.where(buffer.valid, buffer.weight, 0.0).sum()
        return rollout_metrics(self.rule, sums, size, blocks)

    def _roll_out(
        self,
        learner: LearnerState,
        shared: Shared,
        model_env: ModelEnv,
        starts: Int[Array, " B"],
        length: Array | int,
        key: Array,
    ) -> tuple[LearnerState, Metrics]:
        """Write rollouts of `length` steps into the synthetic buffer."""
        obs = replay.gather(learner.real_buffer, starts).unpack().obs

        def write(h: Array | int, buffer: ReplayBuffer, step: Minibatch) -> ReplayBuffer:
            block = replay.pack(step.data, step.valid, step.weight)
            return replay.insert(buffer, block, self.position(shared, h))

        trust, buffer, metrics = model_env.select_members().collect(
            learner.trust,
            obs,
            length,
            key,
            write,
            learner.synthetic,
            longest=max(self.config.rollout.horizon[-2:]),
        )
        return learner._replace(synthetic=buffer, trust=trust), metrics

    def sample(
        self,
        learner: LearnerState,
        shared: Shared,
        real: PackedTransitions,
        key: Array,
    ) -> UpdateInputs:
        """Sample the synthetic part of U minibatches from the buffer.

        Args:
          shared: the counters before this agent step, whose rollouts are in the buffer already.
        """
        buffer: ReplayBuffer = learner.synthetic
        config, size = self.config, self.config.rollout.batch
        filled = jnp.minimum(self.blocks_after(shared), self._num_blocks) * size
        request = Request(key, (config.learn.utd, config.synthetic_batch))
        synthetic = replay.gather(buffer, replay.sample_indices(buffer, filled, [request])[0])
        if self.config.separate:
            return UpdateInputs(real, synthetic)
        return UpdateInputs(jax.vmap(replay.concatenate)(real, synthetic))
