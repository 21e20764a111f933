"""The data that flow between the modules, and the letters that name their axes.

Axis letters, used in every docstring:

==  =====================================================================
S   rows: every combination of a variant and a seed (one vmapped program)
N   slots of a replay buffer
B   transitions of a minibatch, or starts of a rollout
E   members of the dynamics ensemble
K   elite members
D   entries of an observation
A   entries of an action
U   gradient updates of one environment step
C   critics of an agent
H   steps of a rollout
==  =====================================================================

Functions of the algorithm are written for one row; ``runtime/program.py`` maps them over S.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

Array = jax.Array
Params = Any
Metrics = dict[str, Array]
#: (observation (D,), action (A,), next observation (D,)) -> bool scalar, in pure JAX.
Termination = Callable[[Array, Array, Array], Array]

#: What is folded into a row's `seed_key`, in the algorithm and where environments run.
EXPLORE, HOLDOUT, EPISODES, EVALUATIONS = range(4)


class UsageError(ValueError):
    """Something that the user can put right; its text is one line that says how."""


def reason(error: Exception) -> str:
    """An error's first line, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Transition(NamedTuple):
    """One step of an environment, or of a model of it. Any leading axes."""

    obs: Any  # (..., D)
    action: Any  # (..., A), in [-1, 1]
    reward: Any  # (...)
    discount: Any  # (...), 0 where the episode truly ended, 1 at a time limit
    next_obs: Any  # (..., D), the true successor, never that of a reset


class EnvSpec(NamedTuple):
    """What the algorithm has to know of a task."""

    name: str
    obs_dim: int
    action_dim: int
    time_limit: int  # environment steps
    obs_names: tuple[str, ...]  # D names such as "velocity[3]"
    termination: Termination | None  # None: not known
    #: Actions of the task, A each, that -1 and 1 stand for; None: themselves.
    bounds: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "valid", "weight"],
    meta_fields=["obs_dim", "action_dim"],
)
@dataclass(frozen=True)
class Replay:
    """Transitions as a ring or a minibatch has them: each lies in a row of one array.

    So one is written and looked up in one piece. A ring's write position is the caller's, so that
    it can be unbatched. Leaves (N, ...) or with any other leading axes.
    """

    #: (N, P): observation, action, reward, discount, next observation, zeros (`replay.columns`)
    packed: Array
    valid: Array  # (N,) bool: the slot holds a transition that may be drawn
    weight: Array | None  # (N,) in the critic's loss; None where no rule of trust weighs
    obs_dim: int  # D
    action_dim: int  # A

    @property
    def data(self) -> Transition:
        """The transitions, leaves (N, ...)."""
        reward = self.obs_dim + self.action_dim
        after = reward + 2
        return Transition(
            obs=self.packed[..., : self.obs_dim],
            action=self.packed[..., self.obs_dim : reward],
            reward=self.packed[..., reward],
            discount=self.packed[..., reward + 1],
            next_obs=self.packed[..., after : after + self.obs_dim],
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Minibatch:
    """Transitions that are learned from, each array alone, as networks read them. Leaves (B, ...)."""

    data: Transition
    valid: Array  # (B,) bool
    weight: Array | None  # (B,) in the critic's loss


class TargetTransform(NamedTuple):
    """The affine code of the model's targets, z = ([s' - k s, r] - m) / c."""

    skip: Array  # k (D,)
    shift: Array  # m (D+1,)
    scale: Array  # c (D+1,)
    exponent: Array  # () power of the predicted variance that weighs the NLL; 0 is the plain NLL


class ModelState(NamedTuple):
    """All of the dynamics ensemble that changes."""

    params: Params  # leaves (E, ...)
    optimiser: Any
    code: TargetTransform
    input_mean: Array  # (D+A,)
    input_std: Array  # (D+A,)
    unit: Array  # (D+1,) standard deviations of the raw targets, for rules of trust
    varied: Array  # (D+1,) bool: next states and reward that have varied in a fit's data
    elites: Array  # (K,) int, best first
    fits: Array  # () int, how many fits there have been


class LearnerState(NamedTuple):
    """One seed of one variant."""

    config: Any  # config.Config, its traced fields being arrays
    variant: Array  # () int, the index into config.variants
    key: Array  # PRNG key of the learner
    seed_key: Array  # PRNG key that never changes: exploration and the holdout are folded from it
    agent: Any  # what the agent learns, a pytree of its own (agents/base.py)
    real_buffer: Replay
    model: ModelState | None  # None without a model, and so are the next two
    synthetic_buffer: Replay | None
    trust: Any  # what the rule of trust remembers, a pytree of its own (models/trust)


class Shared(NamedTuple):
    """Counters that all rows have in common; unbatched, so ring inserts stay slice updates."""

    step: Array  # () int, real transitions inserted so far
    blocks: Array  # () int, blocks of synthetic transitions inserted so far


class TrainState(NamedTuple):
    """Everything that changes on the device during training."""

    shared: Shared
    learners: LearnerState  # leaves (S, ...)


class Evaluation(NamedTuple):
    """K episodes of each of S rows with the deterministic policy."""

    returns: Any  # (S, K) float64, undiscounted
    lengths: Any  # (S, K) int, environment steps
    starts: Any = None  # (S, K, D), first observations
    discounted: Any = None  # (S, K), the returns discounted
    values: Any = None  # (S, K), what the critic says of the starts


class TrainingInterval(NamedTuple):
    """What happened until an evaluation or an interruption, of all rows."""

    step: int  # environment steps of the run at its end
    learn: Metrics  # (S,) figures of the last environment step that learned; empty if none did
    fits: Sequence[tuple[int, Metrics]]  # environment step and figures (S,) of each fit
    train_return: Any  # (S,) mean return of the episodes that ended, NaN where none did
    dropped: Any  # (S,) int, transitions of the run that were not finite
    seconds: Mapping[str, float]  # by stage
    evaluation: Evaluation | None  # None after an interruption
