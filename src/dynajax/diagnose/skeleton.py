"""Draw stick figures of real and predicted states without a renderer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mujoco
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Differences in height below this share of the figure's extent count as none.
_FLAT = 1e-6


class Sticks(NamedTuple):
    """T poses of the bodies of a MuJoCo model, as line segments from each body to its parent.

    A body without a movable parent has a segment of length zero, which is drawn as a point.
    """

    real: np.ndarray  # (T, bones, 2, 3) metres
    predicted: np.ndarray  # (T, bones, 2, 3)


def observed_positions(positions: np.ndarray, obs: np.ndarray) -> dict[int, int]:
    """Return which generalised position equals which dimension of the observation, bit for bit.

    Args:
      positions: (T, Q) of the physics.
      obs: (T, D) of the same states.
    """
    dims = {}
    for j, values in enumerate(positions.astype(np.float32).T):
        same = np.flatnonzero((obs == values[:, None]).all(0))
        if same.size and np.ptp(values) > 0:
            dims[j] = int(same[0])
    return dims


def stick_figures(
    env: Any, states: np.ndarray, real: np.ndarray, predicted: np.ndarray
) -> Sticks | None:
    """Return poses along a path, or None if less than half of the positions are observed.

    Positions that are not observed, such as the place on the ground, are the real ones in both.

    Args:
      env: a simulator that can be set to the states (T, L).
      real, predicted: observations (T, D).
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
    real_positions = np.array(positions)
    observed = observed_positions(real_positions, real)
    if not observed or 2 * len(observed) < model.nq:
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
    for t, qpos in enumerate(real_positions):
        other = qpos.copy()
        for j, d in observed.items():
            other[j] = predicted[t, d]
        poses.append((pose(qpos), pose(np.where(np.isfinite(other), other, qpos))))
    return Sticks(*(np.array(x) for x in zip(*poses, strict=True)))


def draw(
    axes: Sequence["Axes"], sticks: Sticks, times: Sequence[int], colours: tuple[str, str]
) -> None:
    """Draw one pose in each of the axes: the real one, and the predicted one on top.

    The view is from the side, or from above if nothing moves up or down.
    """
    extent = np.ptp(sticks.real, axis=(0, 1, 2)).max()
    sideways = np.ptp(sticks.real[..., 2], axis=0).max() > _FLAT * extent
    across, up = 0, 2 if sideways else 1
    shown = np.concatenate([poses[list(times)] for poses in sticks])[..., [across, up]]
    # 0.1 m around a figure of a metre or more, and less around a smaller one.
    margin = 0.1 * min(extent, 1.0) or 0.1
    low, high = shown.min((0, 1, 2)) - margin, shown.max((0, 1, 2)) + margin
    # All axes have the same scale, and follow a body that moves far along the ground.
    half = max(np.ptp(sticks.real[t][..., across]) for t in times) / 2 + 2 * margin
    follow = high[0] - low[0] > 4 * half
    for ax, t in zip(axes, times, strict=True):
        for poses, colour, width in zip(sticks, colours, (3.0, 1.6), strict=True):
            look: dict[str, Any] = {
                "color": colour,
                "linewidth": width,
                "marker": "o",
                "markersize": 1.5 * width,
            }
            for bone in poses[t]:
                ax.plot(bone[:, across], bone[:, up], alpha=0.85, **look)
        if follow:
            place = sticks.real[t][..., across]
            middle = (place.min() + place.max()) / 2
            ax.set_xlim(middle - half, middle + half)
        else:
            ax.set_xlim(low[0], high[0])
        ax.set_ylim(low[1], high[1])
        ax.set_aspect("equal")
        ax.axis("off")
        ax.set_title(f"step {t}" if t else "start", fontsize=9, fontweight="normal")
