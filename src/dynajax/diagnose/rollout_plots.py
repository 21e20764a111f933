"""Imagined paths beside real ones: channels along the steps, and poses where there is a body."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynajax import envs
from dynajax.config import Config
from dynajax.diagnose import skeleton
from dynajax.diagnose.online import Findings, Strip
from dynajax.report import figures, html
from dynajax.types import EnvSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Poses in a strip, and channels below them.
_POSES, _CHANNELS = 6, 6

_PATHS = """From one state of the replay, with the policy's actions: grey what the simulator does,
coloured what the model imagines when it is fed with its own predictions."""
_BODY = """On top the body, with the imagined joints (what is not observed, such as the place on the
ground, is the real one in both), from the side, or from above where all of it stays at one height."""
_WORST = "Below the channels that go wrong most."


def strips(last: Sequence[Findings], config: Config, spec: EnvSpec) -> list[str]:
    """HTML with a strip for every variant's first seed; empty if no path was imagined."""
    parts = []
    for variant in dict.fromkeys(f.variant for f in last):
        of_variant = (f for f in last if f.variant == variant and f.strip is not None)
        findings = next(of_variant, None)
        if findings is None or findings.strip is None:
            continue
        poses = _poses(findings.strip, config, findings.seed)
        image = figures.png(picture(findings.strip, poses, variant, spec))
        caption = " ".join([_PATHS, *([_BODY] if poses else []), _WORST])
        parts.append(html.picture(f"{variant}, seed {findings.seed}", image, caption))
    return ["<h2>Imagined against real</h2>", *parts] if parts else []


def _poses(strip: Strip, config: Config, seed: int) -> skeleton.Sticks | None:
    if strip.states is None:
        return None
    env: Any = envs.make(config.env, **config.stepping, seed=seed)
    poses = skeleton.sticks(env, strip.states, strip.real, strip.imagined)
    env.close()
    return poses


def picture(strip: Strip, poses: skeleton.Sticks | None, variant: str, spec: EnvSpec) -> "Figure":
    """One strip: the poses, if there are any, over the channels of the largest error."""
    colour = figures.styles([variant])[variant]["color"]
    length = len(strip.real)
    times = np.unique(np.linspace(0, length - 1, _POSES).astype(int)).tolist()
    scale = np.maximum(strip.real.std(0), 1e-6)
    error = np.nan_to_num(np.abs(strip.imagined - strip.real)).mean(0) / scale
    worst = np.argsort(-np.where(strip.real.std(0) > 1e-6, error, -1))[:_CHANNELS]
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
            axes.plot(strip.real[:, d], color="#999999", linewidth=2.4)
            axes.plot(strip.imagined[:, d], color=colour)
            low, high = strip.real[:, d].min(), strip.real[:, d].max()
            room = max(high - low, 1e-6)
            axes.set_ylim(low - room, high + room)
            axes.set_title(spec.obs_names[d], fontsize=9)
            axes.set_xlabel("steps ahead", fontsize=8)
        for axes in grid[len(worst) :]:
            axes.remove()
    return figure
