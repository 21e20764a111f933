"""Stick figures of real and imagined states, without a renderer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mujoco
import numpy as np


class Sticks(NamedTuple):
    """T poses of the bodies of a MuJoCo model, as line segments."""

    real: np.ndarray  # (T, bones, 2, 3) metres
    imagined: np.ndarray  # (T, bones, 2, 3)


def shown_by(positions: np.ndarray, obs: np.ndarray) -> dict[int, int]:
    """Which generalised position is which channel of the observation, bit for bit.

    Args:
      positions: (T, Q) of the physics; obs: (T, D) of the same states.
    """
    found = {}
    for j, values in enumerate(positions.astype(np.float32).T):
        same = np.flatnonzero((obs == values[:, None]).all(0))
        if same.size and np.ptp(values) > 0:
            found[j] = int(same[0])
    return found


def sticks(env: Any, states: np.ndarray, real: np.ndarray, imagined: np.ndarray) -> Sticks | None:
    """Poses along a path, or None where less than half of the positions are observed.

    What is not observed, such as the place on the ground, is the real one in both.

    Args:
      env: a simulator that can be set to the states (T, L).
      real, imagined: observations (T, D).
    """
    pair = getattr(env, "mujoco", None)
    if pair is None:
        return None
    model, data = pair
    positions = []
    env.reset(seed=0)
    for state in states:
        env.restore(state)
        positions.append(np.array(data.qpos))
    place = np.array(positions)
    known = shown_by(place, real)
    if not known or 2 * len(known) < model.nq:
        return None
    bones = [b for b in range(1, model.nbody) if model.body_parentid[b] > 0]

    def pose(qpos: np.ndarray) -> np.ndarray:
        data.qpos[:] = qpos
        mujoco.mj_kinematics(model, data)
        return np.array([[data.xpos[model.body_parentid[b]], data.xpos[b]] for b in bones])

    poses = []
    for t, qpos in enumerate(place):
        other = qpos.copy()
        for j, d in known.items():
            other[j] = imagined[t, d]
        poses.append((pose(qpos), pose(np.where(np.isfinite(other), other, qpos))))
    return Sticks(*(np.array(x) for x in zip(*poses, strict=True)))


def draw(
    axes: Sequence[Any], figure: Sticks, times: Sequence[int], colours: tuple[str, str]
) -> None:
    """Draws poses seen from the side, one in each of the axes: real, imagined on top."""
    every = np.concatenate([poses[list(times)] for poses in figure]).reshape(-1, 3)
    low, high = every.min(0) - 0.1, every.max(0) + 0.1
    # All pictures have one scale, and follow the body along the ground.
    half = max(np.ptp(figure.real[t][..., 0]) for t in times) / 2 + 0.2
    for ax, t in zip(axes, times, strict=True):
        for poses, colour, width in zip(figure, colours, (3.0, 1.6), strict=True):
            for bone in poses[t]:
                ax.plot(bone[:, 0], bone[:, 2], color=colour, linewidth=width, alpha=0.85)
        middle = (figure.real[t][..., 0].min() + figure.real[t][..., 0].max()) / 2
        ax.set_xlim(middle - half, middle + half)
        ax.set_ylim(low[2], high[2])
        ax.set_aspect("equal")
        ax.axis("off")
        ax.set_title(f"{t} steps ahead" if t else "start", fontsize=9, fontweight="normal")
