"""Stick figures of real and imagined states, without a renderer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mujoco
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Heights that differ by less, in metres, are the same.
_FLAT = 1e-6


class Sticks(NamedTuple):
    """T poses of the bodies of a MuJoCo model, as line segments from a body to its parent.

    A body without a parent that can move has a segment of no length, which is drawn as a point.
    """

    real: np.ndarray  # (T, bones, 2, 3) metres
    imagined: np.ndarray  # (T, bones, 2, 3)


def shown_by(positions: np.ndarray, obs: np.ndarray) -> dict[int, int]:
    """Which generalised position is which channel of the observation, bit for bit.

    Args:
      positions: (T, Q) of the physics; obs: (T, D) of the same states.
    """
    channel = {}
    for j, values in enumerate(positions.astype(np.float32).T):
        same = np.flatnonzero((obs == values[:, None]).all(0))
        if same.size and np.ptp(values) > 0:
            channel[j] = int(same[0])
    return channel


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
    # Bodies that are welded to the world never move.
    bones = [
        (parent if model.body_weldid[parent] else body, body)
        for body, parent in enumerate(model.body_parentid)
        if model.body_weldid[body]
    ]

    def pose(qpos: np.ndarray) -> np.ndarray:
        data.qpos[:] = qpos
        mujoco.mj_kinematics(model, data)
        return data.xpos[bones]

    poses = []
    for t, qpos in enumerate(place):
        other = qpos.copy()
        for j, d in known.items():
            other[j] = imagined[t, d]
        poses.append((pose(qpos), pose(np.where(np.isfinite(other), other, qpos))))
    return Sticks(*(np.array(x) for x in zip(*poses, strict=True)))


def draw(
    axes: Sequence["Axes"], figure: Sticks, times: Sequence[int], colours: tuple[str, str]
) -> None:
    """Draws poses, one in each of the axes: real, imagined on top. They are seen from the side, or
    from above where nothing moves up or down."""
    sideways = np.ptp(figure.real[..., 2], axis=0).max() > _FLAT
    across, up = 0, 2 if sideways else 1
    every = np.concatenate([poses[list(times)] for poses in figure])[..., [across, up]]
    low, high = every.min((0, 1, 2)) - 0.1, every.max((0, 1, 2)) + 0.1
    # All pictures have one scale. A body that leaves its place is followed along the ground.
    half = max(np.ptp(figure.real[t][..., across]) for t in times) / 2 + 0.2
    follow = high[0] - low[0] > 4 * half
    for ax, t in zip(axes, times, strict=True):
        for poses, colour, width in zip(figure, colours, (3.0, 1.6), strict=True):
            look: dict[str, Any] = {
                "color": colour,
                "linewidth": width,
                "marker": "o",
                "markersize": 1.5 * width,
            }
            for bone in poses[t]:
                ax.plot(bone[:, across], bone[:, up], alpha=0.85, **look)
        if follow:
            place = figure.real[t][..., across]
            middle = (place.min() + place.max()) / 2
            ax.set_xlim(middle - half, middle + half)
        else:
            ax.set_xlim(low[0], high[0])
        ax.set_ylim(low[1], high[1])
        ax.set_aspect("equal")
        ax.axis("off")
        ax.set_title(f"{t} steps ahead" if t else "start", fontsize=9, fontweight="normal")
