"""dm_control's own states, steps and rewards beside those of the device tasks."""

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
    """What observations and rewards may read of either simulator's data."""

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
    """Control steps of C MuJoCo, N of them."""

    before: Physics  # float64
    action: np.ndarray  # (N, A)
    after: Physics
    fields: Fields  # of the state after
    obs: np.ndarray  # (N, D), dm_control's, after
    reward: np.ndarray  # (N,), dm_control's
    contacts: np.ndarray  # (N,) how many there were before


#: How far apart, in float32's own spacings, two states are that a float32 simulator may confuse.
_SPACINGS = 4
# Standard deviations of the random velocities: fins too light for more, a body to be spun faster.
_SPEEDS = {"fish": 0.05, "swimmer": 0.2, "finger": 10.0}


def fields(data: Any) -> Fields:
    """Those of C MuJoCo's or MJX's data."""
    return Fields(*(getattr(data, name) for name in Fields._fields))


def _target(name: str, model: mujoco.MjModel) -> tuple[np.ndarray, list[int]]:
    """The array of dm_control's model that holds what an episode drew, and which entries of it."""
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
    """Sets dm_control's `env` to a state, of which `_state` reads the same."""
    model, data = env.physics.model.ptr, env.physics.data.ptr
    data.qpos[:], data.qvel[:], data.act[:], data.qacc_warmstart[:] = state[:4]
    target, entries = _target(name, model)
    target[entries] = state.params
    # dm_control ends a step with the first half of the next one.
    mujoco.mj_step1(model, data)
    env._step_count, env._reset_next_step = 0, False


def _stack(items: list) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)


def _bring_together(name: str, env: Any, apart: np.ndarray) -> None:
    """Puts the ball into the cup, or the target at the finger, which chance does too rarely."""
    model, data = env.physics.model.ptr, env.physics.data.ptr
    mujoco.mj_kinematics(model, data)
    if name.startswith("ball_in_cup"):
        to_cup = data.site("target").xpos - data.body("ball").xpos
        data.qpos[[model.joint(j).qposadr[0] for j in ("ball_x", "ball_z")]] += to_cup[::2] + apart
    if name.startswith("reacher"):
        model.geom("target").pos[:2] = data.geom("finger").xpos[:2] + apart


def _one(name: str, env: Any, action: np.ndarray) -> tuple:
    """The fields of one of `Steps`, which dm_control's `env` takes."""
    data = env.physics.data.ptr
    before, contacts = _state(name, env), data.ncon
    timestep = env.step(rescale(action, *dmc.bounds(env)))
    obs = np.concatenate([np.ravel(a) for _, a in dmc._ordered_items(timestep.observation)])
    read = jax.tree.map(np.copy, fields(data))
    return before, action, _state(name, env), read, obs, timestep.reward, contacts


@functools.cache
def _loaded(name: str) -> Any:
    """dm_control's environment, after a reset."""
    env = dmc.load(name)
    env.reset()
    return env


def again(name: str, before: Physics, action: np.ndarray) -> Steps:
    """Control steps of dm_control itself from given states, its tolerance its own."""
    env = _loaded(name)
    taken = []
    for i, chosen in enumerate(action):
        _put(name, env, jax.tree.map(lambda x, i=i: x[i], before))
        taken.append(_one(name, env, chosen))
    return Steps(*_stack(taken))


def sensitive(name: str, given: Steps, qpos: float, obs: float, draws: int = 32) -> np.ndarray:
    """(N,) bool: whether rounding moves a step of C MuJoCo itself by more than the bounds.

    Where a contact opens or closes, float32 decides, and a small component of a large force takes
    its rounding. It rounds the state, and one after another all that is computed from it; so the
    step is taken from the rounded state, and from neighbours a few of its spacings away.

    Args:
      qpos: the bound of `qpos` after the step, absolute and relative.
      obs: that of the observation.
      draws: of neighbours.
    """
    random = np.random.RandomState(2)
    result = np.zeros(len(given.action), bool)
    for draw in range(draws + 1):

        def rounded(x: np.ndarray, ulps: int = _SPACINGS if draw else 0) -> np.ndarray:
            near = x.astype(np.float32)
            return near + ulps * np.spacing(near) * random.choice([-1, 0, 1], x.shape)

        moved = again(name, jax.tree.map(rounded, given.before), given.action)
        pairs = (moved.after.qpos, given.after.qpos, qpos), (moved.obs, given.obs, obs)
        result |= ~np.all([close(*pair) for pair in pairs], axis=0)
    return result


def close(ours: np.ndarray, theirs: np.ndarray, most: float) -> np.ndarray:
    """(N,) bool: whether rows (N, ...) differ by no more than `most`, absolute and relative."""
    return np.isclose(ours, theirs, rtol=most, atol=most).all(axis=1)


@functools.cache
def steps(name: str, count: int = 200, seed: int = 0, tolerance: float | None = None) -> Steps:
    """`count` control steps from as many states, by dm_control itself.

    The solver's tolerance is dm_control's own if it is not given.

    Half start where an episode could, or for every third of them near the reference pose and the
    target (where rewards are), with random velocities put in; half lie along episodes of random
    actions, every other one waiting for a contact.
    """
    random = np.random.RandomState(seed)
    env = dmc.load(name, seed)
    model, data = env.physics.model.ptr, env.physics.data.ptr
    low, high = dmc.bounds(env)
    if tolerance is not None:
        model.opt.tolerance = tolerance

    def one() -> tuple:
        return _one(name, env, random.uniform(-1, 1, low.shape))

    taken = []
    speed = _SPEEDS.get(name.partition("-")[0], 1)
    for i in range(count // 2):
        env.reset()
        if i % 3 == 0:
            data.qpos[:] = model.qpos0 + 0.05 * random.normal(size=model.nq)
            _bring_together(name, env, 0.02 * random.normal(size=2))
        data.qvel[:] = speed * random.normal(size=model.nv)
        env.physics.after_reset()
        taken.append(one())
    for i in range(count - len(taken)):
        if i % 20 == 0:
            env.reset()
        for waited in range(40):
            if waited % 4 == 0:
                action = random.uniform(low, high)
            env.step(action)
            if waited >= 4 and (data.ncon or i % 2):
                break
        taken.append(one())
    return Steps(*_stack(taken))


_last = [False]


@contextlib.contextmanager
def precision(double: bool) -> Iterator[None]:
    """float64 within, where `double`; jax keeps traces of small functions over the switch, and
    forgets some only when what asked for them is gone."""
    if _last[0] != double:
        jax.clear_caches()
        gc.collect()
        _last[0] = double
    with jax.enable_x64(double):
        yield


@functools.cache
def parts(name: str, double: bool = False) -> suite.Parts:
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
    """The same steps on MJX; tasks of one domain share a program where their models allow it."""
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


def judged(name: str, read: Fields, double: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Observations (N, D) and rewards (N,) that a task's rules read from data of either kind."""
    functions = parts(name, double).functions
    with precision(double):
        both = jax.jit(jax.vmap(lambda data: (functions.observation(data), functions.reward(data))))
        return jax.device_get(both(jax.tree.map(jnp.asarray, read)))


def steady(name: str, given: Steps, rounding: float = 1e-4) -> np.ndarray:
    """(N,) bool: whether the reward is no nearer to a hard threshold than this, relative."""
    random = np.random.RandomState(1)
    result = np.ones(given.reward.shape, bool)
    for _ in range(8):
        noisy = jax.tree.map(
            lambda x: x + rounding * np.maximum(1, np.abs(x)) * random.choice([-1, 1], x.shape),
            given.fields,
        )
        result &= np.abs(judged(name, noisy)[1] - given.reward) < 0.05
    return result
