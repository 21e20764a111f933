"""Run a policy in the real simulator from given states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dynajax.envs.training_envs import all_finite
from dynajax.types import Array

#: Number of simulators that run at the same time.
_PARALLEL = 32
#: Sets a simulator to start state i and returns its observation (D,).
Begin = Callable[[Any, int], np.ndarray]
#: (obs (B, D), key) -> actions (B, A), log-densities (B,).
Act = Callable[[np.ndarray, Array], tuple[Array, Array]]


class Paths(NamedTuple):
    """Paths of a policy in the real simulator from B states, over L steps."""

    obs: np.ndarray  # (L+1, B, D)
    action: np.ndarray  # (L+1, B, A), of which the last is not executed
    log_prob: np.ndarray  # (L+1, B)
    reward: np.ndarray  # (L, B)
    alive: np.ndarray  # (L+1, B) bool: the episode had not terminated before
    terminated: np.ndarray  # (L, B) bool
    valid: np.ndarray  # (B,) bool: all observations and rewards were finite


def soft_returns(
    reward: np.ndarray,
    terminated: np.ndarray,
    log_prob: np.ndarray,
    last_value: np.ndarray,
    discount: float,
    temperature: float,
) -> np.ndarray:
    """Return the entropy-corrected returns of paths, r_0 + sum_k>0 gamma^k (r_k - alpha log pi_k).

    The sum ends where the episode terminated, else with `last_value` after the last step.

    Args:
      reward, terminated: (L, B).
      log_prob: (L+1, B), of the actions; the first action is given, so it has no entropy bonus.
      last_value: (B,) the critic's value of the last state and action.

    Returns:
      (B,)
    """
    value = np.asarray(last_value, float)
    for k in reversed(range(len(reward))):
        soft = value - temperature * log_prob[k + 1]
        value = reward[k] + discount * np.where(terminated[k], 0.0, soft)
    return value


def follow(
    make: Callable[[], Any], begin: Begin, count: int, act: Act, steps: int, seed: int
) -> Paths:
    """Run a policy from `count` states.

    Args:
      make: makes a simulator.
      begin: see `Begin`.
      act: the policy, see `Act`.
      steps: L. A time limit does not end a path if the simulator can be set to a state.
    """
    simulators = [make() for _ in range(min(count, _PARALLEL))]
    groups = []
    for first in range(0, count, _PARALLEL):
        index = list(range(first, min(count, first + _PARALLEL)))
        groups.append(_follow_group(simulators[: len(index)], index, begin, act, steps, seed))
    for simulator in simulators:
        simulator.close()
    return Paths(
        *(np.concatenate(x, axis=-1 if x[0].ndim < 3 else 1) for x in zip(*groups, strict=True))
    )


def _follow_group(
    simulators: list[Any], index: list[int], begin: Begin, act: Act, steps: int, seed: int
) -> Paths:
    """Run a policy in as many simulators as start states."""
    obs = np.array([begin(s, i) for s, i in zip(simulators, index, strict=True)], np.float32)
    alive, valid = np.ones(len(index), bool), np.ones(len(index), bool)
    key = jax.random.fold_in(jax.random.PRNGKey(seed), index[0])
    columns: list[list[np.ndarray]] = [[] for _ in range(6)]
    for k in range(steps + 1):
        # The batch size is constant, so that the policy is compiled once.
        padded = np.zeros((_PARALLEL, obs.shape[1]), np.float32)
        padded[: len(index)] = obs
        chosen = act(padded, jax.random.fold_in(key, k))
        action, log_prob = (np.asarray(x)[: len(index)] for x in chosen)
        for column, x in zip(columns, (obs, action, log_prob, alive), strict=False):
            column.append(x.copy())
        if k == steps:
            break
        next_obs, reward, ended = obs.copy(), np.zeros(len(index), np.float32), np.zeros_like(alive)
        for j in np.flatnonzero(alive & valid):
            simulator = simulators[j]
            next_obs[j], reward[j], ended[j], truncated, _ = simulator.step(action[j])
            valid[j] = all_finite(next_obs[j], reward[j])
            if not valid[j]:
                next_obs[j], reward[j] = obs[j], 0.0
            elif truncated and not ended[j] and can_restore(simulator):
                # Restoring the present state resets the time limit.
                simulator.restore(simulator.snapshot(), steps=0)
        columns[4].append(reward)
        columns[5].append(ended)
        alive = alive & ~ended
        obs = next_obs
    all_obs, action, log_prob, lasting, reward, terminated = (np.stack(c) for c in columns)
    return Paths(all_obs, action, log_prob, reward, lasting, terminated, valid)


def can_restore(env: Any) -> bool:
    """Return whether a simulator can be set to a stored state."""
    return getattr(env, "unrestorable", None) is None
