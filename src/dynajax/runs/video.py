"""Videos of policies."""

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


def _make_rendering_env(config: Config) -> tuple[envs.Env, np.ndarray]:
    """Return the environment at the start of an episode, and its observation (D,).

    Raises:
      UsageError: this machine has no renderer, or the task cannot be rendered.
    """
    if envs.is_device_only(config.env):
        raise UsageError(
            f"--video: only host environments can be rendered, and {config.env} is not one of them; "
            "leave --video out"
        )
    if config.host.evaluate_on == "training":
        raise UsageError(
            f"--video: it needs an instance of {config.env} of its own, and with --set "
            "host.evaluate_on=training there is none; leave --video out"
        )
    if not os.path.isdir(os.environ.get("XDG_RUNTIME_DIR", "")):
        # Images need no display. SDL, which renders Gymnasium's simple tasks, looks for one anyway,
        # and then prints "error: XDG_RUNTIME_DIR is invalid or not set" although nothing fails.
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    env = envs.make(config.env, **config.stepping, seed=config.seed, render=True)
    obs, _ = env.reset(seed=episode_seed(config.seed, "evaluate", 0))
    try:
        env.render()
    except Exception as error:  # every renderer raises its own kinds of errors
        env.close()
        raise UsageError(
            f"--video: cannot render ({reason(error)}); install EGL or OSMesa (Debian: libegl1 or "
            "libosmesa6) and set MUJOCO_GL to egl or osmesa, or leave --video out"
        ) from None
    return env, obs


def check(config: Config) -> None:
    """Check before training that `record` will work.

    Raises:
      UsageError: see `record`.
    """
    _make_rendering_env(config)[0].close()


def record(
    config: Config, folder: Path, state: TrainState, learners: range | None = None
) -> list[Path]:
    """Record an episode of each variant's first seed, with the deterministic policy.

    Args:
      config: configuration of the run.
      folder: folder of the videos.
      state: training state.
      learners: indices of the learners in `state`, by default all of the run. Other learners are
        skipped.

    Returns:
      The files, `video-VARIANT.mp4` in `folder`.

    Raises:
      UsageError: this machine has no renderer, or the task cannot be rendered.
    """
    spec = envs.spec(config.env, **config.stepping)
    paths = []
    for number, variant in enumerate(config.variants):
        learner = number * config.seeds
        if learners is not None and learner not in learners:
            continue
        index = learner if learners is None else learners.index(learner)
        agent = make_agent(variant_config(config, variant), spec)
        policy = jax.tree.map(lambda x, i=index: x[i], agent.policy(state.learners.agent))
        act = functools.partial(jax.jit(agent.deterministic_action), policy)
        paths.append(folder / f"video-{variant_file_name(variant.name)}.mp4")
        record_episode(config, act, paths[-1])
    return paths


def variant_file_name(variant: str) -> str:
    """Return the name of a variant without characters that are inconvenient in file names."""
    return variant.replace(";", "_").replace(",", "+")


def record_episode(config: Config, act: Callable[[np.ndarray], Any], path: Path) -> None:
    """Record an episode of a configuration's task.

    Args:
      config: configuration with the task.
      act: policy, (D,) -> (A,) in [-1, 1].
      path: file to write.

    Raises:
      UsageError: this machine has no renderer, or the task cannot be rendered.
    """
    env, obs = _make_rendering_env(config)
    with contextlib.closing(env):
        _write_video(env, obs, act, path)


def _write_video(
    env: envs.Env, obs: np.ndarray, act: Callable[[np.ndarray], Any], path: Path
) -> None:
    import imageio

    get_writer: Any = imageio.get_writer

    frame = env.render()
    fps = min(60, max(1, int(env.metadata.get("render_fps") or 30)))
    partial = path.with_name(f".{path.name}")
    # The warning about os.fork does not apply: the child process immediately executes the encoder.
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    try:
        with get_writer(
            partial, format="FFMPEG", fps=fps, codec="libx264", macro_block_size=8
        ) as video:
            done = False
            while not done:
                video.append_data(frame)
                obs, _, terminated, truncated, _ = env.step(np.asarray(act(obs)))
                done = terminated or truncated
                frame = env.render()
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(
            f"--video: {path.name} cannot be written into {path.parent} ({reason(error)}); free some "
            "space or make the folder writable, then record it with dynajax play --video"
        ) from None
    finally:
        # An encoder that failed leaves a part of the video; after a success there is none.
        with contextlib.suppress(OSError):
            partial.unlink()
