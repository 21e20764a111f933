"""Play episodes with a trained policy, to measure returns or to show them on a display."""

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
from dynajax.envs.vector import VectorEnv, episode_seed
from dynajax.policy.policy import Policy
from dynajax.settings import make
from dynajax.types import EnvSpec, Evaluation, UsageError, reason
from dynajax.xla import backend

_PLAY_STREAM = 2**31 - 1  # folded into the PRNG key
#: Seconds to wait for the viewer's thread after its window was closed.
WINDOW_TIMEOUT = 10.0


def configure(
    policy: Policy, name: str | None, episodes: int, time_limit: int
) -> tuple[Config, EnvSpec]:
    """Return the configuration and specification of the task that a policy plays.

    Args:
      policy: policy to play.
      name: name of another task of the same sizes; None for the task of the policy.
      episodes: number of episodes.
      time_limit: see `envs.make`.

    Raises:
      UsageError: there is no such task, or its sizes differ.
    """
    env = name or policy.spec.name
    settings = {
        "eval.episodes": episodes,
        "task.repeat": policy.repeat,
        "host.time_limit": time_limit,
    }
    engine = "mjx" if envs.is_device_only(env) else "host"
    config = make(
        env,
        algo="model-free",
        preset="paper",
        agent="sac",
        settings=settings,
        engine=engine,
        # A task such as lqr-lqr_2_1 samples its dynamics by this seed when it is loaded.
        seed=policy.seed,
    )
    spec = envs.spec(env, **config.stepping)
    (obs_dim, action_dim), expected = ((s.obs_dim, s.action_dim) for s in (spec, policy.spec))
    if (obs_dim, action_dim) != expected:
        raise UsageError(
            f"--env={env}: it has {obs_dim} observation and {action_dim} action dimensions, but the "
            f"policy of {policy.spec.name} takes {expected[0]} and {expected[1]}"
        )
    return config, spec


def episodes(policy: Policy, config: Config, spec: EnvSpec, seed: int) -> Evaluation:
    """Play episodes that neither training nor its evaluations used; leaves (1, K, ...).

    They are played on the host, except for tasks that exist only on the device. If the run used its
    task's only instance for evaluations, one instance plays them one after the other.

    Args:
      policy: policy to play.
      config, spec: result of `configure`.
      seed: determines the episodes.
    """
    if config.engine == "mjx":
        return _on_device(policy, config, seed)
    with contextlib.ExitStack() as opened:
        only = None
        if policy.evaluate_on == "training":
            only = VectorEnv(spec.name, 1, seeds=[config.seed], **config.stepping)
            opened.callback(only.close)
        evaluator = Evaluator(
            config, spec, [seed], stream="play", training=only, task_seeds=[config.seed]
        )
        opened.callback(evaluator.close)
        return evaluator(policy.normalized_action, 0)


@backend.required_settings()
def _on_device(policy: Policy, config: Config, seed: int) -> Evaluation:
    task = mjx.make(config.env, repeat=config.task.repeat)

    @backend.jit
    def play(state: Any, keys: jax.Array) -> Evaluation:
        act = functools.partial(policy.agent.deterministic_action, state)
        begin = jax.vmap(task.reset)(keys)
        starts = jax.tree.map(lambda x: x[None], begin)
        played = on_device.run_episodes(task, act, jnp.full(1, config.learn.discount), starts)
        return played._replace(starts=starts.obs)

    # A training run with the same seed splits its keys from PRNGKey(seed), so these differ.
    key = jax.random.fold_in(jax.random.key(seed), _PLAY_STREAM)
    evaluation = jax.device_get(play(policy.state, jax.random.split(key, config.eval.episodes)))
    return evaluation._replace(returns=evaluation.returns.astype(np.float64))


def check_display() -> None:
    """Check that `view` can open a window.

    Raises:
      UsageError: there is no display, or it cannot be used.
    """
    if not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")):
        raise UsageError(
            "--view: there is no display (neither DISPLAY nor WAYLAND_DISPLAY is set); record "
            "a video with --video instead"
        )
    # Check here, because MuJoCo's viewer exits the process if it cannot open a window.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import glfw

            usable = glfw.init()
        except ImportError as error:
            raise UsageError(f"--view: no window can be opened ({reason(error)})") from None
    if not usable:
        why = "; ".join(str(warning.message) for warning in caught) or "GLFW gives no reason"
        raise UsageError(
            f"--view: the display cannot be used ({why}); record a video with --video instead"
        )


def view(policy: Policy, config: Config, seed: int) -> int:
    """Show episodes in MuJoCo's viewer in real time, until the last one ends or it is closed.

    Returns:
      The number of episodes that were started.

    Raises:
      UsageError: the task is not a MuJoCo task, or the viewer cannot be opened.
    """
    if config.engine == "mjx":
        raise UsageError(
            f"--view: only host environments can be shown, and {config.env} is not one of them; "
            "leave --view out"
        )
    env = envs.make(config.env, **config.stepping, seed=config.seed)
    with contextlib.closing(env):
        env.reset(seed=0)
        physics = env.mujoco
        if physics is None:
            raise UsageError(
                f"--view: {config.env} is not a MuJoCo task; record a video with --video instead"
            )
        fps = env.metadata.get("render_fps") or 30
        with _viewer(*physics) as viewer:
            for episode in range(config.eval.episodes):
                obs, _ = env.reset(seed=episode_seed(seed, "play", episode))
                done = False
                while not done:
                    if not viewer.is_running():
                        return episode + 1
                    begin = time.perf_counter()
                    obs, _, terminated, truncated, _ = env.step(policy.normalized_action(obs))
                    done = terminated or truncated or not np.isfinite(obs).all()
                    viewer.sync()
                    time.sleep(max(0.0, 1 / fps - (time.perf_counter() - begin)))
    return config.eval.episodes


@contextlib.contextmanager
def _viewer(model: Any, data: Any) -> Iterator[Any]:
    threads = set(threading.enumerate())
    try:
        import mujoco.viewer

        # The panels are hidden; Tab and Shift-Tab show them.
        handle = mujoco.viewer.launch_passive(model, data, show_left_ui=False, show_right_ui=False)
    except Exception as error:  # a window system may raise anything
        raise UsageError(f"--view: MuJoCo's viewer cannot be opened ({reason(error)})") from None
    window_threads = set(threading.enumerate()) - threads
    try:
        with handle as viewer:
            if model.ncam:
                # Use the camera of the videos, which follows moving robots.
                viewer.cam.type = mujoco.mjtCamera.mjCAMERA_FIXED
                viewer.cam.fixedcamid = 0
            yield viewer
    finally:
        # The viewer does not join its window thread, and the process crashes if it exits while that
        # thread still runs.
        for thread in window_threads:
            thread.join(WINDOW_TIMEOUT)
