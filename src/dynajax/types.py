"""The data that flow between the modules, and the letters that name their axes.

Axis letters of shape annotations (``Float[Array, "B D"]``) and docstrings of a learner:

==  =====================================================================
S   learners: every combination of a variant and a seed (one vmapped program)
N   slots of a replay buffer
B   transitions of a minibatch, or rollouts that run in parallel
E   members of the dynamics ensemble
K   elite members
D   dimensions of an observation
A   dimensions of an action
Z   targets of the dynamics model, D + 1: next state, then reward
U   gradient updates of one agent step
C   critics of an agent
H   steps of a rollout
Q   quantiles that a critic predicts
X   any width, as Y; O is the width of a network's output
==  =====================================================================

The algorithm is written for one learner; ``runtime/program.py`` maps it over S.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array
Params = Any
Metrics = dict[str, Array]
#: (observation (D,), action (A,), next observation (D,)) -> bool scalar, in pure JAX.
Termination = Callable[[Array, Array, Array], Array]

#: Streams that are folded into a learner's `seed_key`.
EXPLORE, HOLDOUT, EPISODES, EVALUATIONS, HOLD = range(5)


class UsageError(ValueError):
    """An error that the user can correct; its text is one line that says how."""


def reason(error: BaseException) -> str:
    """Return the first line of an error, or its class if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Transition(NamedTuple):
    """One step of an environment, or of a model of it; NumPy or JAX arrays with any leading axes."""

    obs: Any  # (..., D)
    action: Any  # (..., A), in [-1, 1]
    reward: Any  # (...)
    discount: Any  # (...), 0 after a termination, 1 otherwise (also at a time limit)
    next_obs: Any  # (..., D), the true successor, never the first state of a reset


class ObsPart(NamedTuple):
    """A part of the observations that a task returns, all of which are flattened in their order."""

    keys: tuple[str | int, ...]  # of the Dicts and Tuples around it; () if it is the only part
    shape: tuple[int, ...]
    #: Number of values and first value of each entry that becomes one-hot; () for plain numbers.
    options: tuple[tuple[int, int], ...] = ()


class EnvSpec(NamedTuple):
    """What the algorithm needs to know about a task."""

    name: str
    obs_dim: int
    action_dim: int
    time_limit: int  # agent steps
    obs_names: tuple[str, ...]  # D names such as "velocity[3]"
    termination: Termination | None  # None if it is not known
    #: The task's actions, A each, that -1 and 1 stand for; None if actions are in [-1, 1].
    bounds: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    action_shape: tuple[int, ...] | None = None  # of the task's actions; None if it is (A,)
    obs_parts: tuple[ObsPart, ...] = ()  # of the task's observations; () if they are flat


_packed = functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "valid", "weight"],
    meta_fields=["obs_dim", "action_dim"],
)


@_packed
@dataclass(frozen=True)
class PackedTransitions:
    """Transitions with all their parts side by side in one array.

    A packed transition is read and written in one piece; `unpack` gives its parts.
    """

    #: Observation, action, reward, discount, next observation, zeros (`replay.packed_size`).
    packed: Float[Array, "*batch P"]
    valid: Bool[Array, "*batch"]  # False marks a slot that must not be learned from
    weight: Float[Array, "*batch"] | None  # in the critic's loss; None if no trust rule sets it
    obs_dim: int
    action_dim: int

    def unpack(self) -> Transition:
        """Return the parts as separate arrays."""
        reward = self.obs_dim + self.action_dim
        after = reward + 2
        return Transition(
            obs=self.packed[..., : self.obs_dim],
            action=self.packed[..., self.obs_dim : reward],
            reward=self.packed[..., reward],
            discount=self.packed[..., reward + 1],
            next_obs=self.packed[..., after : after + self.obs_dim],
        )


@_packed
@dataclass(frozen=True)
class ReplayBuffer(PackedTransitions):
    """A ring of N packed transitions, leaves (N, ...).

    The caller keeps the write position: learners share it, and while it has no learner axis an
    insertion stays a slice update in place under `vmap`.
    """

    @property
    def capacity(self) -> int:
        """The number of slots, N."""
        return self.valid.shape[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Minibatch:
    """B transitions as the agent's losses read them, leaves (B, ...)."""

    data: Transition
    valid: Bool[Array, " B"]
    weight: Float[Array, " B"] | None  # in the critic's loss


class TargetTransform(NamedTuple):
    """The affine map from next state and reward to model targets, z = ([s' - k s, r] - m) / c."""

    skip: Float[Array, " D"]  # k
    shift: Float[Array, " Z"]  # m
    scale: Float[Array, " Z"]  # c
    exponent: Float[Array, ""]  # of the predicted variance that weights the NLL; 0 is the plain NLL


class DataStats(NamedTuple):
    """What a fit has read from the real transitions: the scales in which the model learns."""

    transform: TargetTransform
    input_mean: Float[Array, " D+A"]
    input_std: Float[Array, " D+A"]
    #: Of s' - s and of the reward, whatever k is; the unit of trust rules.
    change_std: Float[Array, " Z"]
    has_varied: Bool[Array, " Z"]  # next states and reward that were not constant so far


class ModelState(NamedTuple):
    """All of the dynamics ensemble that changes."""

    params: Params  # leaves (E, ...)
    opt_state: Any  # leaves (E, ...)
    stats: DataStats
    elites: Int[Array, " K"]  # members with the lowest holdout error, best first
    num_fits: Int[Array, ""]


class LearnerState(NamedTuple):
    """One learner: one seed of one variant."""

    config: Any  # config.Config whose traced fields are arrays
    variant: Int[Array, ""]  # index into config.variants
    key: Array
    seed_key: Array  # never changes; exploration and the holdout are folded from it
    agent: Any  # the agent's own state (agents/base.py)
    real_buffer: ReplayBuffer  # D_env
    model: ModelState  # None without a model; nothing reads it then
    synthetic: Any  # the source's own state (synthetic/base.py), such as the buffer D_model
    trust: Any  # the trust rule's own state (trust/base.py)


class Shared(NamedTuple):
    """Counters that all learners have in common."""

    step: Int[Array, ""]  # real transitions inserted so far
    blocks: Int[Array, ""]  # blocks of synthetic transitions inserted so far


class TrainState(NamedTuple):
    """Everything that changes on the device during training."""

    shared: Shared
    learners: LearnerState  # leaves (S, ...)


class Evaluation(NamedTuple):
    """Episodes of the deterministic policy, several for each of S learners."""

    returns: Any  # (S, episodes) float64, undiscounted; NaN if a transition was not finite
    lengths: Any  # (S, episodes) int, agent steps
    starts: Any = None  # (S, episodes, D), first observations
    discounted: Any = None  # (S, episodes), discounted returns
    values: Any = None  # (S, episodes), the critic's estimate at the first observations


def finite_statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (S,) of the finite values (S, X), NaN if there is none."""
    kept = [row[np.isfinite(row)] for row in values]
    mean, std = (
        np.array([statistic(row) if row.size else np.nan for row in kept])
        for statistic in (np.mean, np.std)
    )
    return mean, std


class TrainingInterval(NamedTuple):
    """What happened up to an evaluation or an interruption, for all learners."""

    step: int  # agent steps of the run at its end
    learn: Metrics  # (S,) metrics of the last agent step that learned; empty if none did
    fits: Sequence[tuple[int, Metrics]]  # agent step and metrics (S,) of each fit
    train_return: Any  # (S,) mean return of the episodes that ended, NaN if none did
    dropped: Any  # (S,) int, transitions of the run that were not finite
    frames: Any  # (S,) int, simulator steps of the run at its end
    seconds: Mapping[str, float]  # by stage
    evaluation: Evaluation | None  # None after an interruption
