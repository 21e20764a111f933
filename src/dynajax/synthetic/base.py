"""What a source of synthetic data is: where the agent's synthetic transitions come from.

`prepare` runs once per agent step, before the U gradient updates, and `minibatches` in each of
them. The base class is the source `none`: minibatches of real transitions only. To add a source,
subclass `Source` in one file and add it to `SOURCES`, or name it as
`--set rollout.source=module:name`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dynajax import replay
from dynajax.config import Config, NoFields
from dynajax.models.model_env import ModelEnv, StepNoise
from dynajax.trust import TrustRule
from dynajax.types import (
    EnvSpec,
    LearnerState,
    Metrics,
    Minibatch,
    PackedTransitions,
    Shared,
)


class SourceKeys(NamedTuple):
    """PRNG keys of one agent step."""

    starts: Array  # of the real states where rollouts start
    rollout: Array
    sample: Array  # of minibatches from a synthetic buffer


class RolloutStarts(NamedTuple):
    """Where the rollouts of one update start."""

    obs: Float[Array, "B D"]
    noise: StepNoise  # of all steps, leaves (H, ...)


class UpdateInputs(NamedTuple):
    """What U gradient updates learn from, leaves (U, B, ...)."""

    real: PackedTransitions
    synthetic: PackedTransitions | None = None
    starts: RolloutStarts | None = None  # of rollouts inside the updates


@dataclass(frozen=True)
class Source:
    """A source of one learner, as pure functions; this one gives real transitions only.

    Attributes:
      config: the learner's configuration; the source's own settings are `config.source`, a
        `Fields`, set as `--set source.FIELD`.
      spec: the task.
      rule: the trust rule, for `config.num_parallel_rollouts` rollouts at a time.
    """

    config: Config
    spec: EnvSpec
    rule: TrustRule

    #: A dataclass decorated with `config.fields`, with a default for every field.
    Fields: ClassVar[type] = NoFields

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a configuration that the source cannot work with.

        Raises:
          UsageError: one line that names the setting and the remedy.
        """

    def init(self) -> Any:
        """Return the source's own state, `learner.synthetic`: any pytree, such as a buffer."""
        return None

    def split_keys(self, rollout_key: Array, sample_key: Array) -> SourceKeys:
        """Return the keys of one agent step."""
        starts, rollout = jax.random.split(rollout_key)
        return SourceKeys(starts, rollout, sample_key)

    def start_shape(self) -> tuple[int, ...] | None:
        """Return the shape of the real states that rollouts start from, or None without rollouts."""
        return None

    def blocks_after(self, shared: Shared) -> Int[Array, ""]:
        """Return the blocks in the synthetic buffer after this agent step, see `Shared.blocks`."""
        return shared.blocks + 0

    def prepare(
        self,
        learner: LearnerState,
        shared: Shared,
        model_env: ModelEnv,
        real: PackedTransitions,
        starts: Int[Array, "*shape"] | None,
        keys: SourceKeys,
    ) -> tuple[LearnerState, UpdateInputs, Metrics]:
        """Return the learner, what the U updates learn from, and metrics.

        Args:
          shared: the counters before this agent step.
          real: real transitions of the U minibatches, leaves (U, B, ...).
          starts: slots of the real buffer of shape `start_shape`, None without rollouts.
        """
        return learner, UpdateInputs(real), {}

    def minibatches(
        self, model_env: ModelEnv, trust: Any, inputs: UpdateInputs
    ) -> tuple[Any, list[Minibatch], Metrics]:
        """Return the minibatches of one update: one, or a real and a synthetic one.

        There are two if `rollout.mixing` is separate.

        Args:
          model_env: with the agent's present policy.
          trust: the trust rule's state.
          inputs: of this update, leaves (B, ...).

        Returns:
          The trust rule's state, the minibatches, and metrics.
        """
        real = replay.to_minibatch(inputs.real)
        if inputs.synthetic is None:
            return trust, [real], {}
        synthetic = replay.to_minibatch(inputs.synthetic)
        if self.config.separate:
            return trust, [real, synthetic], {}
        return trust, [replay.concatenate(real, synthetic)], {}


def reward_means(inputs: UpdateInputs, real_batch: int) -> Metrics:
    """Return the mean reward of the real and of the synthetic transitions of U minibatches.

    Both come from one reduction, because each alone is two kernels of a GPU.

    Args:
      real_batch: real transitions of each minibatch, which come first.
    """
    parts = [x for x in (inputs.real, inputs.synthetic) if x is not None]
    rewards = jnp.concatenate([x.unpack().reward for x in parts], 1)
    counts = np.array([real_batch, rewards.shape[1] - real_batch])
    selected = (np.arange(rewards.shape[1]) < real_batch) == np.array([[[True]], [[False]]])
    means = jnp.where(selected, rewards, 0.0).sum((1, 2)) / (len(rewards) * counts)
    names = "real_reward_mean", "synthetic_reward_mean"
    return {name: mean for name, mean, count in zip(names, means, counts, strict=True) if count}
