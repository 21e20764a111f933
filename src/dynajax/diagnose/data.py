"""Real transitions to diagnose with: of a random policy, or of a run's replay."""

from typing import NamedTuple

import numpy as np

from dynajax import envs
from dynajax.envs.training_envs import all_finite
from dynajax.types import EnvSpec, Transition, UsageError

#: Share of the transitions, at the end and as whole episodes where that is possible, that no fit
#: is shown in any part: for predictions over many steps, and for new episodes.
FRESH = 1 / 6
# Resets in a row, or episodes, that may give nothing before a task is given up.
_TRIES = 100


class Recording(NamedTuple):
    """Transitions in the order in which they happened."""

    transitions: Transition  # leaves (N, ...) float32
    episode: np.ndarray  # (N,) int, rising

    def part(self, chosen: np.ndarray | slice) -> "Recording":
        """Some of them."""
        return Recording(Transition(*(x[chosen] for x in self.transitions)), self.episode[chosen])


def collect(spec: EnvSpec, count: int, seed: int, *, time_limit: int = 1000) -> Recording:
    """Episodes whose actions are, in turn, white noise and noise correlated over ten steps.

    A transition that is not finite is left out and ends its episode.

    Args:
      count: transitions; the last episode may be cut.
      seed: of the episodes and of the noise.
      time_limit: see `envs.make`.

    Raises:
      UsageError: the task gives no numbers.
    """
    env, rng = envs.make(spec.name, time_limit=time_limit), np.random.default_rng(seed)
    rows: list[Transition] = []
    episodes: list[int] = []
    episode = tries = 0
    while len(rows) < count:
        obs, _ = env.reset(seed=1000 * seed + episode)
        memory, noise, ended = 0.9 * (episode % 2), np.zeros(spec.action_dim), not all_finite(obs)
        begin = len(rows)
        while not ended and len(rows) < count:
            fresh = rng.uniform(-1, 1, spec.action_dim)
            noise = memory * noise + np.sqrt(1 - memory**2) * fresh
            action = np.clip(noise, -1, 1).astype(np.float32)
            new, reward, terminated, truncated, _ = env.step(action)
            if not all_finite(new, reward):
                break
            rows.append(Transition(obs, action, reward, 1.0 - terminated, new))
            episodes.append(episode)
            obs, ended = new, terminated or truncated
        episode += 1
        tries = 0 if len(rows) > begin else tries + 1
        if tries == _TRIES:
            raise UsageError(
                f"--env={spec.name}: {_TRIES} episodes in a row began with an observation or a "
                "reward that is not finite; reset() and step() must return numbers"
            )
    env.close()
    leaves = (
        np.array([row[k] for row in rows], np.float32) for k in range(len(Transition._fields))
    )
    return Recording(Transition(*leaves), np.array(episodes))


def shuffled(recording: Recording, seed: int) -> Transition:
    """The transitions in random order, so that a prefix is a smaller replay of the same kind."""
    order = np.random.default_rng(seed).permutation(len(recording.episode))
    return recording.part(order).transitions


def last(recording: Recording, most: int) -> Recording:
    """The newest transitions."""
    return recording.part(slice(max(0, len(recording.episode) - most), None))


def parts(recording: Recording) -> tuple[Recording, Recording]:
    """What fits may use (and hold out transitions of), and what they never see: `FRESH` of all.

    Whole episodes where one ends between half and twice that share, else a cut anywhere.
    """
    total = len(recording.episode)
    starts = np.flatnonzero(np.diff(recording.episode)) + 1
    wanted = total * (1 - FRESH)
    allowed = starts[(starts >= total * (1 - 2 * FRESH)) & (starts <= total * (1 - FRESH / 2))]
    cut = int(allowed[np.abs(allowed - wanted).argmin()]) if allowed.size else int(wanted)
    return recording.part(slice(cut)), recording.part(slice(cut, None))
