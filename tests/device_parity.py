"""Compare steps and rewards of the device tasks with those of dm_control."""

import contextlib
import functools
import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from dynajax.actions import rescale
from dynajax.envs import dmc
from dynajax.envs.mjx import physics, suite
from dynajax.envs.mjx.physics import Physics


class Fields(NamedTuple):
    """The fields of either simulator's data that observations and rewards may read."""

    qpos: Any
    qvel: Any
    act: Any
    ctrl: Any
    xpos: Any
    xipos: Any
    xmat: Any
    site_xpos: Any
    geom_xpos: Any
    geom_xmat: Any
    sensordata: Any


class Steps(NamedTuple):
    """N control steps of C MuJoCo."""

    before: Physics  # float64
    action: np.ndarray  # (N, A)
    after: Physics
    fields: Fields  # after the step
    obs: np.ndarray  # (N, D), dm_control's, after the step
    reward: np.ndarray  # (N,), dm_control's
    contacts: np.ndarray  # (N,) number of contacts before the step


#: Distance, in float32 spacings, between states that a float32 simulator may not distinguish.
_SPACINGS = 4
# Standard deviations of the random velocities: fins are too light for 1, and the finger's body needs
# to spin faster.
_SPEEDS = {"fish": 0.05, "swimmer": 0.2, "finger": 10.0}


def fields(data: Any) -> Fields:
    """Read the fields from the data of C MuJoCo or MJX."""
    return Fields(*(getattr(data, name) for name in Fields._fields))


def _target(name: str, model: mujoco.MjModel) -> tuple[np.ndarray, list[int]]:
    """Return the array and the entries of dm_control's model that are drawn for each episode."""
    domain, _, task = name.partition("-")
    if domain == "finger" and task.startswith("turn"):
        return model.site("target").pos, [0, 2]
    if domain in ("reacher", "swimmer"):
        return model.geom("target").pos, [0, 1]
    if domain == "fish" and task == "swim":
        return model.geom("target").pos, [0, 1, 2]
    return np.zeros(0), []


def _state(name: str, env: Any) -> Physics:
    data = env.physics.data.ptr
    arrays = (data.qpos, data.qvel, data.act, data.qacc_warmstart)
    target, entries = _target(name, env.physics.model.ptr)
    return Physics(*map(np.copy, arrays), target[entries])


def _put(name: str, env: Any, state: Physics) -> None:
    """Set dm_control's `env` to a state, so that `_state` returns the same state."""
    model, data = env.physics.model.ptr, env.physics.data.ptr
    data.qpos[:], data.qvel[:], data.act[:], data.qacc_warmstart[:] = state[:4]
    target, entries = _target(name, model)
    target[entries] = state.params
    # dm_control ends a step with the first half of MuJoCo's next step.
    mujoco.mj_step1(model, data)
    env._step_count, env._reset_next_step = 0, False


def _stack(items: list) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)


def _move_to_target(name: str, env: Any, offset: np.ndarray) -> None:
    """Put the ball into the cup, or the target at the finger, which random states rarely do."""
    model, data = env.physics.model.ptr, env.physics.data.ptr
    mujoco.mj_kinematics(model, data)
    if name.startswith("ball_in_cup"):
        to_cup = data.site("target").xpos - data.body("ball").xpos
        data.qpos[[model.joint(j).qposadr[0] for j in ("ball_x", "ball_z")]] += to_cup[::2] + offset
    if name.startswith("reacher"):
        model.geom("target").pos[:2] = data.geom("finger").xpos[:2] + offset


def _take_step(name: str, env: Any, action: np.ndarray) -> tuple:
    """Take one step in dm_control's `env`, and return the fields of `Steps`."""
    data = env.physics.data.ptr
    before, contacts = _state(name, env), data.ncon
    timestep = env.step(rescale(action, *dmc.bounds(env)))
    parts = dmc._ordered_names(timestep.observation)
    obs = np.concatenate([np.ravel(timestep.observation[name]) for name in parts])
    read = jax.tree.map(np.copy, fields(data))
    return before, action, _state(name, env), read, obs, timestep.reward, contacts


@functools.cache
def _loaded(name: str) -> Any:
    """Return dm_control's environment after a reset."""
    env = dmc.load(name)
    env.reset()
    return env


def repeat_steps(name: str, before: Physics, action: np.ndarray) -> Steps:
    """Take control steps in dm_control from given states, with its default tolerance."""
    env = _loaded(name)
    taken = []
    for i, one_action in enumerate(action):
        _put(name, env, jax.tree.map(lambda x, i=i: x[i], before))
        taken.append(_take_step(name, env, one_action))
    return Steps(*_stack(taken))


def is_sensitive(name: str, given: Steps, qpos: float, obs: float, draws: int = 32) -> np.ndarray:
    """Return (N,) bool: whether float32 rounding changes a step of C MuJoCo beyond the bounds.

    Rounding decides whether a contact opens or closes, and a small component of a large force has
    the rounding error of the large force. float32 rounds the state and every intermediate result,
    so the step is taken from the rounded state and from neighbours a few float32 spacings away.

    Args:
      name: the task.
      given: the steps.
      qpos: bound of the error of `qpos` after the step, absolute and relative.
      obs: bound of the error of the observation.
      draws: number of neighbours.
    """
    random = np.random.RandomState(2)
    result = np.zeros(len(given.action), bool)
    for draw in range(draws + 1):

        def rounded(x: np.ndarray, ulps: int = _SPACINGS if draw else 0) -> np.ndarray:
            near = x.astype(np.float32)
            return near + ulps * np.spacing(near) * random.choice([-1, 0, 1], x.shape)

        moved = repeat_steps(name, jax.tree.map(rounded, given.before), given.action)
        pairs = (moved.after.qpos, given.after.qpos, qpos), (moved.obs, given.obs, obs)
        result |= ~np.all([close(*pair) for pair in pairs], axis=0)
    return result


def close(ours: np.ndarray, theirs: np.ndarray, most: float) -> np.ndarray:
    """Return (N,) bool: whether entries (N, ...) differ by at most `most`, absolute or relative."""
    return np.isclose(ours, theirs, rtol=most, atol=most).all(axis=1)


@functools.cache
def steps(name: str, count: int = 200, seed: int = 0, tolerance: float | None = None) -> Steps:
    """Take one control step in dm_control from each of `count` states.

    Half of the states are initial states with random velocities; a third of these are near the
    reference pose and the target, where rewards are. The others come from episodes of random
    actions; for every other one the episode runs until there is a contact.

    Args:
      name: the task.
      count: number of states.
      seed: of the states.
      tolerance: of the solver, by default dm_control's.
    """
    random = np.random.RandomState(seed)
    env = dmc.load(name, seed)
    model, data = env.physics.model.ptr, env.physics.data.ptr
    low, high = dmc.bounds(env)
    if tolerance is not None:
        model.opt.tolerance = tolerance

    def random_step() -> tuple:
        return _take_step(name, env, random.uniform(-1, 1, low.shape))

    taken = []
    speed = _SPEEDS.get(name.partition("-")[0], 1)
    for i in range(count // 2):
        env.reset()
        if i % 3 == 0:
            data.qpos[:] = model.qpos0 + 0.05 * random.normal(size=model.nq)
            _move_to_target(name, env, 0.02 * random.normal(size=2))
        data.qvel[:] = speed * random.normal(size=model.nv)
        env.physics.after_reset()
        taken.append(random_step())
    for i in range(count - len(taken)):
        if i % 20 == 0:
            env.reset()
        for waited in range(40):
            if waited % 4 == 0:
                action = random.uniform(low, high)
            env.step(action)
            if waited >= 4 and (data.ncon or i % 2):
                break
        taken.append(random_step())
    return Steps(*_stack(taken))


_last_precision = [False]


@contextlib.contextmanager
def precision(double: bool) -> Iterator[None]:
    """Use float64 in the `with` statement if `double`.

    JAX keeps traces of small functions across the switch, and drops some only when their callers
    are collected, so the caches are cleared and garbage is collected first.
    """
    if _last_precision[0] != double:
        jax.clear_caches()
        gc.collect()
        _last_precision[0] = double
    with jax.enable_x64(double):
        yield


@functools.cache
def parts(name: str, double: bool = False) -> suite.Parts:
    """Return the parts of a task, loaded in float32 or float64."""
    with precision(double):
        return suite.load_parts(name)


@functools.cache
def _program(domain: str, substeps: int, forces: bool, put: Any, double: bool) -> Any:
    def run(model, state, control):
        episode = put(model, state.params) if put else model
        after, data = physics.advance(episode, state, control, substeps, force_sensors=forces)
        return after, fields(data)

    return jax.jit(jax.vmap(run, in_axes=(None, 0, 0)))


_PUTS: dict = {}


def device(
    name: str, given: Steps, double: bool = False, tolerance: float | None = None
) -> tuple[Physics, Fields]:
    """Take the same steps in MJX; tasks of a domain share a program if their models allow it."""
    loaded = parts(name, double)
    functions, domain = loaded.functions, name.partition("-")[0]
    drawn = given.before.params.shape[1]
    put = _PUTS.setdefault((domain, drawn), functions.set_params) if drawn else None
    program = _program(domain, loaded.substeps, functions.force_sensors, put, double)
    with precision(double):
        dtype = jnp.float64 if double else jnp.float32
        before = jax.tree.map(lambda x: jnp.asarray(x, dtype), given.before)
        control = rescale(given.action, loaded.low, loaded.high)
        model = loaded.model
        if tolerance is not None:
            model = model.tree_replace({"opt.tolerance": jnp.asarray(tolerance, dtype)})
        return jax.device_get(program(model, before, jnp.asarray(control, dtype)))


def observations_and_rewards(
    name: str, read: Fields, double: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the observations (N, D) and rewards (N,) of a task from either simulator's data."""
    functions = parts(name, double).functions
    with precision(double):
        both = jax.jit(jax.vmap(lambda data: (functions.observation(data), functions.reward(data))))
        return jax.device_get(both(jax.tree.map(jnp.asarray, read)))


def is_reward_stable(name: str, given: Steps, rounding: float = 1e-4) -> np.ndarray:
    """Return (N,) bool: whether relative rounding errors leave the reward almost unchanged."""
    random = np.random.RandomState(1)
    result = np.ones(given.reward.shape, bool)
    for _ in range(8):
        noisy = jax.tree.map(
            lambda x: x + rounding * np.maximum(1, np.abs(x)) * random.choice([-1, 1], x.shape),
            given.fields,
        )
        result &= np.abs(observations_and_rewards(name, noisy)[1] - given.reward) < 0.05
    return result
