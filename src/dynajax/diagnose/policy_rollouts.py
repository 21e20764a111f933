"""What the policy does in the real simulator, from states where it is set down."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dynajax.envs.training_envs import all_finite
from dynajax.types import Array

#: Simulators beside each other.
_WAVE = 32


class Paths(NamedTuple):
    """What the policy did in the real simulator from B states, over L steps."""

    obs: np.ndarray  # (L+1, B, D)
    action: np.ndarray  # (L+1, B, A), the last one not taken
    log_prob: np.ndarray  # (L+1, B)
    reward: np.ndarray  # (L, B)
    alive: np.ndarray  # (L+1, B) bool: the episode had not terminated before
    terminated: np.ndarray  # (L, B) bool
    valid: np.ndarray  # (B,) bool: all numbers were finite


def soft_returns(
    reward: np.ndarray,
    terminated: np.ndarray,
    log_prob: np.ndarray,
    rest: np.ndarray,
    discount: float,
    temperature: float,
) -> np.ndarray:
    """SAC's returns, by what happened: r_0 + sum_k>0 gamma^k (r_k - alpha log pi_k), until the
    episode terminated, or with `rest` after the last step.

    Args:
      reward, terminated: (L, B).
      log_prob: (L+1, B), of the actions; the first was set, so it does not count.
      rest: (B,) the critic's value of the last action, in the last state.

    Returns:
      (B,)
    """
    value = np.asarray(rest, float)
    for k in reversed(range(len(reward))):
        soft = value - temperature * log_prob[k + 1]
        value = reward[k] + discount * np.where(terminated[k], 0.0, soft)
    return value


def follow(
    make: Callable[[], Any],
    begin: Callable[[Any, int], np.ndarray],
    count: int,
    act: Callable[[np.ndarray, Array], tuple[Array, Array]],
    steps: int,
    seed: int,
) -> Paths:
    """Lets a policy act from `count` states, in as many simulators as fit beside each other.

    Args:
      make: makes a simulator.
      begin: sets one to state i and gives back its observation (D,).
      act: (obs (B, D), key) -> actions (B, A), log-densities (B,).
      steps: L. A time limit on the way does not end a path where the simulator can be set to a
        state; elsewhere it does, as the last state with a `rest` of its own would.
    """
    simulators = [make() for _ in range(min(count, _WAVE))]
    waves = []
    for first in range(0, count, _WAVE):
        index = range(first, min(count, first + _WAVE))
        waves.append(_wave(simulators[: len(index)], list(index), begin, act, steps, seed))
    for simulator in simulators:
        simulator.close()
    return Paths(
        *(np.concatenate(x, axis=-1 if x[0].ndim < 3 else 1) for x in zip(*waves, strict=True))
    )


def _wave(
    simulators: list[Any],
    index: list[int],
    begin: Callable[[Any, int], np.ndarray],
    act: Callable[[np.ndarray, Array], tuple[Array, Array]],
    steps: int,
    seed: int,
) -> Paths:
    obs = np.array([begin(s, i) for s, i in zip(simulators, index, strict=True)], np.float32)
    alive, valid = np.ones(len(index), bool), np.ones(len(index), bool)
    key = jax.random.fold_in(jax.random.PRNGKey(seed), index[0])
    columns: list[list[np.ndarray]] = [[] for _ in range(6)]
    for k in range(steps + 1):
        # Always as many rows, so that the policy is compiled once.
        padded = np.zeros((_WAVE, obs.shape[1]), np.float32)
        padded[: len(index)] = obs
        chosen = act(padded, jax.random.fold_in(key, k))
        action, log_prob = (np.asarray(x)[: len(index)] for x in chosen)
        for column, x in zip(columns, (obs, action, log_prob, alive), strict=False):
            column.append(x.copy())
        if k == steps:
            break
        new, reward, ended = obs.copy(), np.zeros(len(index), np.float32), np.zeros_like(alive)
        for j in np.flatnonzero(alive & valid):
            simulator = simulators[j]
            new[j], reward[j], ended[j], truncated, _ = simulator.step(action[j])
            valid[j] = all_finite(new[j], reward[j])
            if not valid[j]:
                new[j], reward[j] = obs[j], 0.0
            elif truncated and not ended[j] and can_restore(simulator):
                # A time limit is none of the physics'.
                simulator.restore(simulator.snapshot(), steps=0)
        columns[4].append(reward)
        columns[5].append(ended)
        alive = alive & ~ended
        obs = new
    every, action, log_prob, lasting, reward, terminated = (np.stack(c) for c in columns)
    return Paths(every, action, log_prob, reward, lasting, terminated, valid)


def can_restore(env: Any) -> bool:
    """Whether a simulator can be set to a stored state."""
    return bool(getattr(env, "can_restore", True))
