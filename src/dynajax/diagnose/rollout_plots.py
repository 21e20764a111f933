"""Draw predicted paths over real ones: dimensions over steps, and poses of a MuJoCo body."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynajax import envs
from dynajax.config import Config
from dynajax.diagnose import measures, skeleton
from dynajax.diagnose.online import Findings, PredictedPath
from dynajax.report import figures, html
from dynajax.types import EnvSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Poses in a figure, and dimensions below them.
_POSES, _DIMS = 6, 6

_PATHS = """From one state of the replay buffer, with the actions of the policy: grey the simulator,
coloured the model, which continues from its own predictions."""
_BODY = """Top: the body with the predicted joints (positions that are not observed, such as the place
on the ground, are the real ones in both), from the side, or from above if its height does not
change."""
_WORST = "Bottom: the dimensions with the largest errors."


def path_images(findings: Sequence[Findings], config: Config, spec: EnvSpec) -> list[html.Image]:
    """Draw the path of the first seed of each variant that has one."""
    images = []
    for variant in dict.fromkeys(f.variant for f in findings):
        found = next((f for f in findings if f.variant == variant and f.path is not None), None)
        if found is None or found.path is None:
            continue
        poses = _poses(found.path, config, found.seed)
        data = figures.png(draw_path(found.path, poses, variant, spec))
        caption = " ".join([_PATHS, *([_BODY] if poses else []), _WORST])
        images.append(html.image(f"{variant}, seed {found.seed}", data, caption))
    return images


def _poses(path: PredictedPath, config: Config, seed: int) -> skeleton.Sticks | None:
    if path.states is None:
        return None
    env: Any = envs.make(config.env, **config.stepping, seed=seed)
    poses = skeleton.stick_figures(env, path.states, path.real, path.predicted)
    env.close()
    return poses


def draw_path(
    path: PredictedPath, poses: skeleton.Sticks | None, variant: str, spec: EnvSpec
) -> "Figure":
    """Draw the poses of a path, if there are any, above the dimensions with the largest errors."""
    colour = figures.styles([variant])[variant]["color"]
    length = len(path.real)
    times = np.unique(np.linspace(0, length - 1, _POSES).astype(int)).tolist()
    varies = measures.varies(path.real)
    scale = np.where(varies, path.real.std(0), 1.0)
    error = np.nan_to_num(np.abs(path.predicted - path.real)).mean(0) / scale
    worst = np.argsort(-np.where(varies, error, -1))[:_DIMS]
    with figures.house_style():
        figure = figures.blank(9.6, 3.4 + (1.8 if poses else 0))
        parts: Any = figure.subfigures(
            2 if poses else 1, 1, height_ratios=[1.1, 2] if poses else None
        )
        lower = parts[1] if poses else parts
        if poses:
            axes = parts[0].subplots(1, len(times))
            skeleton.draw(list(np.ravel(axes)), poses, times, ("#bbbbbb", colour))
        grid = np.ravel(lower.subplots(2, -(-len(worst) // 2), squeeze=False))
        for axes, d in zip(grid, worst, strict=False):
            axes.plot(path.real[:, d], color="#999999", linewidth=2.4)
            axes.plot(path.predicted[:, d], color=colour)
            low, high = path.real[:, d].min(), path.real[:, d].max()
            room = high - low if varies[d] else 1e-6
            axes.set_ylim(low - room, high + room)
            axes.set_title(spec.obs_names[d], fontsize=9)
            axes.set_xlabel("steps", fontsize=8)
        for axes in grid[len(worst) :]:
            axes.remove()
    return figure
