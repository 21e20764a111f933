"""A film of what a policy does."""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dynajax import envs
from dynajax.agents import make_agent
from dynajax.config import Config, variant_config
from dynajax.envs.vector import episode_seed
from dynajax.types import TrainState, UsageError, reason


def _drawable(config: Config) -> tuple[envs.Env, np.ndarray]:
    """The task at the start of an episode, and that observation (D,), once it has drawn a picture.

    Raises:
      UsageError: there is no renderer on this machine, or the task draws no pictures.
    """
    if envs.is_device_only(config.env):
        raise UsageError(f"--video: the pictures come from the host, which has no {config.env}")
    env = envs.make(config.env, **config.stepping, seed=config.seed, render=True)
    obs, _ = env.reset(seed=episode_seed(config.seed, "evaluate", 0))
    try:
        env.render()
    except Exception as error:  # each of the renderers raises errors of its own
        env.close()
        raise UsageError(
            f"--video: no renderer was found ({reason(error)}); install EGL or OSMesa (Debian: libegl1 or "
            "libosmesa6) and set MUJOCO_GL to egl or osmesa, or leave --video out"
        ) from None
    return env, obs


def check(config: Config) -> None:
    """Refuses what `record` would refuse, before anything is trained.

    Raises:
      UsageError: as `record` does.
    """
    _drawable(config)[0].close()


def record(
    config: Config, folder: Path, state: TrainState, rows: range | None = None
) -> list[Path]:
    """Films an episode of each variant's first seed, with the deterministic policy.

    Args:
      rows: which of the run's rows the state holds, by default all; others are not filmed.

    Returns:
      The files, `video-VARIANT.mp4` in `folder`.

    Raises:
      UsageError: there is no renderer on this machine, or the task draws no pictures.
    """
    spec = envs.spec(config.env, **config.stepping)
    paths = []
    for index, variant in enumerate(config.variants):
        number = index * config.seeds
        if rows is not None and number not in rows:
            continue
        row = number if rows is None else rows.index(number)
        agent = make_agent(variant_config(config, variant), spec)
        policy = jax.tree.map(lambda x, row=row: x[row], agent.policy(state.learners.agent))
        paths.append(folder / f"video-{file_name(variant.name)}.mp4")
        film(config, functools.partial(jax.jit(agent.deterministic_action), policy), paths[-1])
    return paths


def file_name(variant: str) -> str:
    """A variant's name as part of a file's."""
    return variant.replace(";", "_").replace(",", "+")


def film(config: Config, act: Callable[[np.ndarray], Any], path: Path) -> None:
    """Films an episode of a configuration's task.

    Args:
      act: (D,) -> (A,) in [-1, 1].

    Raises:
      UsageError: there is no renderer on this machine, or the task draws no pictures.
    """
    env, obs = _drawable(config)
    with contextlib.closing(env):
        _film(env, obs, act, path)


def _film(env: envs.Env, obs: np.ndarray, act: Callable[[np.ndarray], Any], path: Path) -> None:
    import imageio

    writer: Any = imageio.get_writer

    frame = env.render()
    fps = min(60, max(1, int(env.metadata.get("render_fps") or 30)))
    partial = path.with_name(f".{path.name}")
    # The encoder is another program; it is executed at once, so JAX's threads are not in danger.
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    with writer(partial, format="FFMPEG", fps=fps, codec="libx264", macro_block_size=8) as film:
        over = False
        while not over:
            film.append_data(frame)
            obs, _, terminated, truncated, _ = env.step(np.asarray(act(obs)))
            over = terminated or truncated
            frame = env.render()
    os.replace(partial, path)
