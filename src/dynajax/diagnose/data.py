"""Collect the real transitions for a diagnosis before training, and split them."""

from typing import NamedTuple

import numpy as np

from dynajax import envs
from dynajax.envs.training_envs import all_finite
from dynajax.envs.vector import episode_seed
from dynajax.types import EnvSpec, Transition, UsageError

#: Share of the transitions that no fit uses, whole episodes at the end if possible: for multi-step
#: predictions, and for measures on new episodes.
NEW_EPISODES = 1 / 6
#: Episodes in a row without a finite transition after which a task is given up.
_TRIES = 100


class Recording(NamedTuple):
    """Transitions in the order in which they happened."""

    transitions: Transition  # leaves (N, ...) float32
    episode: np.ndarray  # (N,) int, rising

    def select(self, index: np.ndarray | slice) -> "Recording":
        """Return some of the transitions."""
        return Recording(Transition(*(x[index] for x in self.transitions)), self.episode[index])


def collect(spec: EnvSpec, count: int, seed: int, *, repeat: int = 1) -> Recording:
    """Record episodes of a random policy.

    Episodes alternate between white noise and noise that is correlated over ten steps. A
    transition that is not finite is left out and ends its episode.

    Args:
      count: number of transitions; the last episode may be cut.
      seed: of the episodes and of the noise.
      repeat: see `envs.make`.

    Raises:
      UsageError: the task does not return finite numbers.
    """
    env = envs.make(spec.name, repeat=repeat)
    rng = np.random.default_rng(seed)
    transitions: list[Transition] = []
    episodes: list[int] = []
    episode = tries = 0
    while len(transitions) < count:
        obs, _ = env.reset(seed=episode_seed(seed, "diagnose", episode))
        memory, noise, ended = 0.9 * (episode % 2), np.zeros(spec.action_dim), not all_finite(obs)
        start = len(transitions)
        while not ended and len(transitions) < count:
            innovation = rng.uniform(-1, 1, spec.action_dim)
            noise = memory * noise + np.sqrt(1 - memory**2) * innovation
            action = np.clip(noise, -1, 1).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            if not all_finite(next_obs, reward):
                break
            transitions.append(Transition(obs, action, reward, 1.0 - terminated, next_obs))
            episodes.append(episode)
            obs, ended = next_obs, terminated or truncated
        episode += 1
        tries = 0 if len(transitions) > start else tries + 1
        if tries == _TRIES:
            raise UsageError(
                f"--env={spec.name}: {_TRIES} episodes in a row began with an observation or a "
                "reward that is not finite; reset() and step() must return numbers"
            )
    env.close()
    leaves = (
        np.array([t[k] for t in transitions], np.float32) for k in range(len(Transition._fields))
    )
    return Recording(Transition(*leaves), np.array(episodes))


def shuffled(recording: Recording, seed: int) -> Transition:
    """Return the transitions in random order, so that each prefix is a sample of all of them."""
    order = np.random.default_rng(seed).permutation(len(recording.episode))
    return recording.select(order).transitions


def last(recording: Recording, most: int) -> Recording:
    """Return the newest transitions, at most `most`."""
    return recording.select(slice(max(0, len(recording.episode) - most), None))


def split(recording: Recording) -> tuple[Recording, Recording]:
    """Split off the share `NEW_EPISODES` at the end, which no fit may use.

    The cut is between two episodes if one ends between half and twice that share, else anywhere.
    """
    total = len(recording.episode)
    starts = np.flatnonzero(np.diff(recording.episode)) + 1
    wanted = total * (1 - NEW_EPISODES)
    near = (starts >= total * (1 - 2 * NEW_EPISODES)) & (starts <= total * (1 - NEW_EPISODES / 2))
    allowed = starts[near]
    cut = int(allowed[np.abs(allowed - wanted).argmin()]) if allowed.size else int(wanted)
    return recording.select(slice(cut)), recording.select(slice(cut, None))
