"""Episodes with a trained policy, in numbers or on the screen."""

import contextlib
import functools
import os
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynajax import envs
from dynajax.config import Config
from dynajax.engines import device as on_device
from dynajax.engines.evaluate import Evaluator
from dynajax.envs import mjx
from dynajax.envs.vector import episode_seed
from dynajax.policy.policy import Policy
from dynajax.settings import make
from dynajax.types import EnvSpec, Evaluation, UsageError, reason
from dynajax.xla import backend

_PLAY = 2**31 - 1
#: Seconds that a closed window is waited for.
CLOSING = 10.0


def task(
    policy: Policy, name: str | None, episodes: int, time_limit: int
) -> tuple[Config, EnvSpec]:
    """Where a policy is to play: its own task, or another one of the same shapes.

    Args:
      name: the other task's.
      episodes: how many.
      time_limit: see `envs.make`.

    Raises:
      UsageError: there is no such task, or its shapes are others.
    """
    chosen = name or policy.spec.name
    settings = {
        "eval.episodes": episodes,
        "task.repeat": policy.repeat,
        "host.time_limit": time_limit,
    }
    engine = "mjx" if envs.is_device_only(chosen) else "host"
    config = make(
        chosen, algo="model-free", preset="paper", agent="sac", settings=settings, engine=engine
    )
    spec = envs.spec(chosen, **config.stepping)
    shapes = [(s.obs_dim, s.action_dim) for s in (spec, policy.spec)]
    if shapes[0] != shapes[1]:
        (a, b), (c, d) = shapes
        raise UsageError(
            f"--env={chosen}: it has {a} observations and {b} actions, and a policy of "
            f"{policy.spec.name} takes {c} and {d}"
        )
    return config, spec


def episodes(policy: Policy, config: Config, spec: EnvSpec, seed: int) -> Evaluation:
    """Episodes that neither training nor its evaluations have seen: leaves (1, K, ...).

    They are on the host, but for a task that is on the device alone.

    Args:
      config, spec: of `task`.
      seed: fixes the episodes.
    """
    if config.engine == "mjx":
        return _on_device(policy, config, seed)
    with contextlib.closing(Evaluator(config, spec, [seed], stream="play")) as evaluator:
        return evaluator(policy.unit, 0)


def _on_device(policy: Policy, config: Config, seed: int) -> Evaluation:
    task = mjx.make(config.env, repeat=config.task.repeat)

    @backend.jit
    def play(state: Any, keys: jax.Array) -> Evaluation:
        act = functools.partial(policy.agent.deterministic_action, state)
        begin = jax.vmap(task.reset)(keys)
        starts = jax.tree.map(lambda x: x[None], begin)
        played = on_device.run_episodes(task, act, jnp.full(1, config.learn.discount), starts)
        return played._replace(starts=starts.obs)

    # Not the keys of a run of the same seed, which are split from PRNGKey(seed).
    key = jax.random.fold_in(jax.random.key(seed), _PLAY)
    played = jax.device_get(play(policy.state, jax.random.split(key, config.eval.episodes)))
    return played._replace(returns=played.returns.astype(np.float64))


def check_display() -> None:
    """Refuses what `view` would refuse for want of a screen.

    Raises:
      UsageError: there is no display, or it cannot be used.
    """
    if not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")):
        raise UsageError(
            "--view: there is no display (neither DISPLAY nor WAYLAND_DISPLAY is set); --video "
            "makes a film instead"
        )
    # Asked here, because MuJoCo's viewer ends the process where it is refused.
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        try:
            import glfw

            usable = glfw.init()
        except ImportError as error:
            raise UsageError(f"--view: no window can be opened ({reason(error)})") from None
    if not usable:
        why = "; ".join(str(remark.message) for remark in remarks) or "GLFW does not say why"
        raise UsageError(
            f"--view: the display cannot be used ({why}); --video makes a film instead"
        )


def view(policy: Policy, config: Config, seed: int) -> int:
    """Shows episodes in MuJoCo's viewer in real time, until they are over or its window is closed.

    Returns:
      How many episodes began.

    Raises:
      UsageError: the task has no physics of MuJoCo, or the viewer cannot be opened.
    """
    if config.engine == "mjx":
        raise UsageError(f"--view: {config.env} is on the device alone, and has nothing to show")
    env = envs.make(config.env, **config.stepping)
    with contextlib.closing(env):
        env.reset(seed=0)
        physics = env.mujoco
        if physics is None:
            raise UsageError(f"--view: {config.env} is no task of MuJoCo's; --video makes a film")
        fps = env.metadata.get("render_fps") or 30
        with _viewer(*physics) as viewer:
            for episode in range(config.eval.episodes):
                obs, _ = env.reset(seed=episode_seed(seed, "play", episode))
                over = False
                while not over:
                    if not viewer.is_running():
                        return episode + 1
                    begin = time.perf_counter()
                    obs, _, terminated, truncated, _ = env.step(policy.unit(obs))
                    over = terminated or truncated or not np.isfinite(obs).all()
                    viewer.sync()
                    time.sleep(max(0.0, 1 / fps - (time.perf_counter() - begin)))
    return config.eval.episodes


@contextlib.contextmanager
def _viewer(model: Any, data: Any) -> Iterator[Any]:
    before = set(threading.enumerate())
    try:
        import mujoco.viewer

        # Tab and Shift-Tab bring the panels.
        opened = mujoco.viewer.launch_passive(model, data, show_left_ui=False, show_right_ui=False)
    except Exception as error:  # whatever a window system raises
        raise UsageError(f"--view: MuJoCo's viewer cannot be opened ({reason(error)})") from None
    window = set(threading.enumerate()) - before
    try:
        with opened as viewer:
            if model.ncam:
                # The films' camera, which goes along with what runs away.
                viewer.cam.type = mujoco.mjtCamera.mjCAMERA_FIXED
                viewer.cam.fixedcamid = 0
            yield viewer
    finally:
        # Nobody waits for the window's own thread, and a process that ends meanwhile dies in it.
        for thread in window:
            thread.join(CLOSING)
