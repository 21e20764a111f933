"""Read the checkpoints of a run, and rebuild the physics states of its replay buffer."""

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
    inserted: int  # real transitions inserted so far, including overwritten ones
    learners: LearnerState  # leaves (S, ...), numpy
    host: dict[str, np.ndarray]  # the progress of the environments, see `HostEngine.progress`

    def learner(self, index: int) -> LearnerState:
        """Return the state of one learner."""
        state: LearnerState = jax.tree.map(lambda x: x[index], self.learners)
        return state

    def frames(self, index: int) -> int:
        """Return the simulator steps of one learner."""
        return int(self.host["frames"][index])


class Reader:
    """Reads the checkpoints in a run directory.

    Raises:
      UsageError: the folder is not a run directory, or has no checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        with reading_config(folder):
            info = json.loads((folder / "config.json").read_text())
            plain, processes = info["config"], info.get("processes", 1)
            # The user's module may register fixes, so it is imported before the fixes are parsed.
            registry.import_module("--env", plain["env"])
            self.config = from_dict(plain)
        self.spec = envs.spec(self.config.env, **self.config.stepping)
        self._folder, self._checkpoints = folder, Checkpoints(folder / "checkpoints")
        program = build(self.config, self.spec, jax.local_devices()[:1])
        self._template = program.shapes()
        self.steps = self._checkpoints.steps()
        if not self.steps:
            several = "of several processes, which cannot be diagnosed"
            reason = several if processes > 1 else "without a checkpoint yet"
            raise UsageError(f"{folder}: it is a run {reason}")

    def load(self, step: int) -> Loaded:
        """Load the checkpoint of one of `steps`.

        Raises:
          UsageError: a run that is still training has deleted it.
        """
        restored = self._checkpoints.restore(self._template, at_most=step)
        if restored is None:
            raise UsageError(
                f"{self._folder}: the run is training and has replaced its checkpoint of step "
                f"{step:,}; run the command again, or wait for the end of the run"
            )
        inserted = int(restored.state.shared.step)
        learners = jax.tree.map(np.asarray, restored.state.learners)
        return Loaded(self.config, self.spec, restored.step, inserted, learners, restored.host)


class Episode(NamedTuple):
    """The transitions of one episode, by their index in the order of insertion."""

    number: int  # its seed is `episode_seed(seed of the learner, "train", number)`
    start: int
    stop: int


def in_order(real: ReplayBuffer, inserted: int) -> tuple[Transition, np.ndarray]:
    """Return the transitions of a ring buffer, oldest first: leaves (N, ...), and valid (N,)."""
    capacity = len(real.valid)
    slots = np.arange(max(0, inserted - capacity), inserted) % capacity
    return Transition(*(np.asarray(x)[slots] for x in real.unpack())), np.asarray(real.valid)[slots]


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return whether vectors (..., D) of float32 are equal bit for bit: (...)."""
    a, b = (np.ascontiguousarray(x, np.float32).view(np.uint32) for x in (a, b))
    return (a == b).all(-1)


def episodes(
    data: Transition,
    valid: np.ndarray,
    time_limit: int,
    host: Mapping[str, Any] | None = None,
    learner: int = 0,
) -> list[Episode]:
    """Find the episodes in a learner's transitions, which are in order.

    Episodes are numbered backwards from the running one.

    Args:
      host: the progress of the environments at the same time, including the transition that is not
        inserted yet ("pending.obs", ...); without it episodes are numbered from 0.
      learner: its index in `host`.
    """
    if not len(valid):
        return []
    # An invalid transition ends its episode, because its successor cannot be recognised.
    follows = np.append(
        same_bits(data.next_obs[:-1], data.obs[1:]) | ~valid[1:],
        host is None
        or not host["pending.valid"][learner]
        or bool(same_bits(data.next_obs[-1], host["pending.obs"][learner])),
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
        # The pending transition belongs to the running episode, unless it ended one.
        pending = int(host["episode"][learner]) - (1 if int(host["length"][learner]) == 0 else 0)
        first = pending - (1 if ended else 0) - len(starts) + 1
    return [Episode(first + i, *ends) for i, ends in enumerate(zip(starts, stops, strict=True))]


def recording(loaded: Loaded, index: int) -> Recording:
    """Return a learner's replay buffer as a recording, without invalid transitions."""
    data, valid = in_order(loaded.learner(index).real_buffer, loaded.inserted)
    parts = episodes(data, valid, loaded.spec.time_limit)
    number = np.repeat(np.arange(len(parts)), [e.stop - e.start for e in parts])
    return Recording(Transition(*(x[valid] for x in data)), number[valid])


class Rebuilt(NamedTuple):
    """Physics states at some indices of a replay buffer."""

    indices: np.ndarray  # (M,) rising
    states: np.ndarray  # (M, L), see `envs.states`
    steps: int  # transitions that were simulated again
    differ: int  # transitions that were wanted but not reproduced


def rebuild(
    loaded: Loaded, learner: int, chosen: list[Episode], indices: np.ndarray, data: Transition
) -> Rebuilt:
    """Simulate a learner's episodes again from their seeds and actions, to get physics states.

    States after a difference to the recorded observations or rewards, bit for bit, are left out
    and counted.

    Args:
      chosen: episodes that contain all `indices`, from their first step.
      indices: where states are wanted, in the order of insertion.
      data: the replay buffer in order.
    """
    config = loaded.config
    _, seed = config.variant_seed_pairs[learner]
    env: Any = envs.make(config.env, **config.stepping, seed=seed)
    wanted = set(indices.tolist())
    kept: dict[int, np.ndarray] = {}
    steps = differ = 0
    for episode in chosen:
        inside = [i for i in range(episode.start, episode.stop) if i in wanted]
        obs, _ = env.reset(seed=episode_seed(seed, "train", episode.number))
        for index in range(episode.start, inside[-1] + 1 if inside else episode.start):
            if not same_bits(obs, data.obs[index]):
                differ += inside[-1] + 1 - index
                break
            if index in wanted:
                kept[index] = env.snapshot()
            obs, reward, *_ = env.step(data.action[index])
            steps += 1
            same = np.float32(reward) == data.reward[index]
            if not same or not same_bits(obs, data.next_obs[index]):
                # The state is right, but its successor is not the recorded one.
                kept.pop(index, None)
                differ += inside[-1] + 1 - index
                break
    env.close()
    states = np.array(list(kept.values())) if kept else np.zeros((0, 1))
    return Rebuilt(np.array(list(kept), int), states, steps, differ)


def restore_differs(
    env: Any, indices: np.ndarray, states: Mapping[int, np.ndarray], data: Transition
) -> str | None:
    """Check that restored states lead to the recorded transitions, bit for bit.

    MuJoCo's state need not be complete: a task may draw a goal at each reset, and a wrapper may
    stack frames.

    Args:
      env: the task; it is reset to an episode that is not in the replay buffer.
      indices: (M,) in the order of insertion.
      states: index -> state, see `rebuild`.
      data: the replay buffer in order.

    Returns:
      Why the states must not be used, or None.
    """
    env.reset(seed=0)
    for index in indices.tolist():
        transition = Transition(*(x[index] for x in data))
        reason = simulator_states.verify(env, states[index], transition.action, transition, steps=0)
        if reason is not None:
            return reason
    return None
