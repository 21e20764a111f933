"""A run read back from its checkpoints, and the physics states that its replay has passed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dynajax import envs, registry
from dynajax.config import Config
from dynajax.diagnose.data import Recording
from dynajax.envs import states as simulator_states
from dynajax.envs.vector import episode_seed
from dynajax.runs.checkpoint import Checkpoints
from dynajax.runs.directory import reading_config
from dynajax.runtime.program import build
from dynajax.settings import from_dict
from dynajax.types import EnvSpec, LearnerState, ReplayBuffer, Transition, UsageError


class Loaded(NamedTuple):
    """One checkpoint of a run."""

    config: Config
    spec: EnvSpec
    step: int
    stored: int  # real transitions stored so far, those that the ring has forgotten included
    rows: LearnerState  # leaves (S, ...), numpy
    host: dict[str, np.ndarray]  # the environments' progress, see `HostEnvs.progress`

    def row(self, index: int) -> LearnerState:
        """One row of it."""
        return jax.tree.map(lambda x: x[index], self.rows)


class Reader:
    """The checkpoints of a run's folder.

    Raises:
      UsageError: not a run's folder, or one without a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        with reading_config(folder):
            plain = json.loads((folder / "config.json").read_text())["config"]
            # A user's module may register fixes, so it is imported before they are read.
            registry.import_module("--env", plain["env"])
            self.config = from_dict(plain)
            self.spec = envs.spec(self.config.env, **self.config.stepping)
        self._checkpoints = Checkpoints(folder / "checkpoints")
        alone = build(self.config, self.spec, jax.local_devices()[:1])
        self._template = jax.eval_shape(alone.init)
        self.steps = self._checkpoints.steps()
        if not self.steps:
            raise UsageError(f"{folder}: the run has no checkpoint yet")

    def load(self, step: int) -> Loaded:
        """The checkpoint of one of `steps`."""
        restored = self._checkpoints.restore(self._template, at_most=step)
        assert restored is not None
        stored = int(restored.state.shared.step)
        rows = jax.tree.map(np.asarray, restored.state.learners)
        return Loaded(self.config, self.spec, restored.step, stored, rows, restored.host)


class Episode(NamedTuple):
    """Where one episode's transitions are in the order of the replay."""

    number: int  # its seed is `episode_seed(row seed, "train", number)`
    start: int
    stop: int


def in_order(real: ReplayBuffer, count: int) -> tuple[Transition, np.ndarray]:
    """A ring's transitions, oldest first, leaves (N, ...), and valid (N,)."""
    capacity = len(real.valid)
    slots = np.arange(max(0, count - capacity), count) % capacity
    return Transition(*(np.asarray(x)[slots] for x in real.unpack())), np.asarray(real.valid)[slots]


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether rows (..., D) of float32 are equal bit for bit: (...)."""
    a, b = (np.ascontiguousarray(x, np.float32).view(np.uint32) for x in (a, b))
    return (a == b).all(-1)


def episodes(
    data: Transition,
    valid: np.ndarray,
    time_limit: int,
    host: Mapping[str, Any] | None = None,
    row: int = 0,
) -> list[Episode]:
    """The episodes of a row's transitions in order, numbered back from the running one.

    Args:
      host: the environments' progress at the same time, with the transition that is not stored
        yet ("pending.obs", ...); without it episodes are numbered from 0.
    """
    if not len(valid):
        return []
    # A hole is the last step of the episode that it is in: nothing can be seen to follow it.
    follows = np.append(
        same_bits(data.next_obs[:-1], data.obs[1:]) | ~valid[1:],
        host is None
        or not host["pending.valid"][row]
        or bool(same_bits(data.next_obs[-1], host["pending.obs"][row])),
    )
    ends = ~valid | (data.discount == 0) | ~follows
    starts = [0]
    for t in range(len(valid)):
        if ends[t] or t + 1 - starts[-1] >= time_limit:
            starts.append(t + 1)
    ended = starts[-1] == len(valid)
    if ended:
        starts.pop()
    stops = [*starts[1:], len(valid)]
    first = 0
    if host is not None:
        # The transition that waits belongs to the running episode, unless it ended one.
        waiting = int(host["episode"][row]) - (1 if int(host["length"][row]) == 0 else 0)
        first = waiting - (1 if ended else 0) - len(starts) + 1
    return [Episode(first + i, *ends) for i, ends in enumerate(zip(starts, stops, strict=True))]


def recording(loaded: Loaded, row: int) -> Recording:
    """A row's replay as a recording, without what was dropped."""
    data, valid = in_order(loaded.row(row).real_buffer, loaded.stored)
    parts = episodes(data, valid, loaded.spec.time_limit)
    number = np.repeat(np.arange(len(parts)), [e.stop - e.start for e in parts])
    return Recording(Transition(*(x[valid] for x in data)), number[valid])


class Rebuilt(NamedTuple):
    """Physics states at some places of a replay."""

    places: np.ndarray  # (M,) rising
    states: np.ndarray  # (M, L), see `envs.states`
    steps: int  # transitions that were taken again
    differ: int  # of these, those from where on an episode did not repeat


def rebuild(
    loaded: Loaded, row: int, chosen: list[Episode], places: np.ndarray, data: Transition
) -> Rebuilt:
    """Takes a row's actions again from the seeds of its episodes, and keeps the states on the way.

    What does not repeat the stored observations and rewards bit for bit is left out and counted.

    Args:
      chosen: episodes that hold all `places`; one that the ring has cut is left out.
      places: where in the replay's order a state is wanted.
      data: the replay in order.
    """
    config = loaded.config
    _, seed = config.variant_seed_pairs[row]
    env: Any = envs.make(config.env, **config.stepping, seed=seed)
    wanted = set(places.tolist())
    kept: list[tuple[int, np.ndarray]] = []
    steps = differ = 0
    for episode in chosen:
        inside = [p for p in range(episode.start, episode.stop) if p in wanted]
        obs, _ = env.reset(seed=episode_seed(seed, "train", episode.number))
        for place in range(episode.start, inside[-1] + 1 if inside else episode.start):
            if not same_bits(obs, data.obs[place]):
                differ += inside[-1] + 1 - place
                break
            if place in wanted:
                kept.append((place, env.snapshot()))
            obs, reward, *_ = env.step(data.action[place])
            steps += 1
            if np.float32(reward) != data.reward[place] or not same_bits(obs, data.next_obs[place]):
                # The state before was right, but what it leads to is not what was stored.
                kept = [k for k in kept if k[0] != place]
                differ += inside[-1] + 1 - place
                break
    env.close()
    states = np.array([s for _, s in kept]) if kept else np.zeros((0, 1))
    return Rebuilt(np.array([p for p, _ in kept], int), states, steps, differ)


def restore_differs(
    env: Any, places: np.ndarray, states: Mapping[int, np.ndarray], data: Transition
) -> str | None:
    """Why states of a replay are not to be used: what the simulator does after one of them is
    restored is not the recorded transition, bit for bit. None where all are.

    MuJoCo's state need not be all: a task may draw a goal at a reset, a wrapper may stack frames.

    Args:
      env: the task; it is reset, to another episode than any of the replay.
      places: (M,) in the replay's order; states: place -> what `rebuild` kept.
      data: the replay in order.
    """
    env.reset(seed=0)
    for place in places.tolist():
        transition = Transition(*(x[place] for x in data))
        reason = simulator_states.verify(env, states[place], transition.action, transition, steps=0)
        if reason is not None:
            return reason
    return None
