"""Set a simulator to a stored state, to repeat a step or to take another one from it.

A state is one float64 vector: MuJoCo's integration state (positions, velocities, activations, the
solver's warm start), the model parameters that a reset randomizes (for example targets), and any
further state of the task. `read_state` and `write_state` are exact: a step that is repeated from a
restored state has a bitwise equal result, which tests check.

A task or wrapper may have state that is not part of the vector (a goal sampled at reset, the last
observations, running statistics). `probe` therefore tests a task before its states are used, and
`verify` tests recorded transitions of a run.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dynajax.envs.opengl import mujoco
from dynajax.types import Transition

_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
#: Model parameters that some tasks randomize at every reset.
_RANDOMIZABLE = (
    "body_pos",
    "body_quat",
    "body_mass",
    "geom_pos",
    "geom_size",
    "geom_friction",
    "site_pos",
    "site_size",
    "dof_damping",
    "hfield_data",
    "wrap_prm",
)
#: Positions that Gymnasium's tasks read before a step. MuJoCo leaves them one substep behind the
#: state, so they cannot be computed from it.
_STALE = ("xpos", "xipos")


def copy_parameters(model: Any) -> dict[str, np.ndarray]:
    """Return copies of the model parameters that a reset may randomize."""
    return {name: np.array(getattr(model, name)) for name in _RANDOMIZABLE if hasattr(model, name)}


def changed_parameters(before: dict[str, np.ndarray], model: Any) -> tuple[str, ...]:
    """Return the names of the parameters that differ from `before`."""
    return tuple(n for n, x in before.items() if not np.array_equal(x, getattr(model, n)))


def read_state(model: Any, data: Any, names: tuple[str, ...]) -> np.ndarray:
    """Return MuJoCo's integration state, followed by the model parameters `names`."""
    state = np.empty(mujoco.mj_stateSize(model, _STATE))
    mujoco.mj_getState(model, data, state, _STATE)
    return np.concatenate([state, *(np.ravel(getattr(model, n)) for n in names)])


def write_state(model: Any, data: Any, names: tuple[str, ...], values: np.ndarray) -> None:
    """Write the result of `read_state` to a simulator, without updating derived quantities."""
    size = mujoco.mj_stateSize(model, _STATE)
    mujoco.mj_setState(model, data, np.ascontiguousarray(values[:size]), _STATE)
    for name in names:
        array = getattr(model, name)
        array[...] = values[size : size + array.size].reshape(array.shape)
        size += array.size


class MujocoTask:
    """Snapshot and restore for Gymnasium's MuJoCo tasks, which only call `mj_step`.

    Create it before the first reset: it compares the model before and after a reset to find the
    parameters that the reset randomizes.
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        self._loaded = copy_parameters(env.model)

    @functools.cached_property
    def _randomized(self) -> tuple[str, ...]:
        return changed_parameters(self._loaded, self._env.model)

    def snapshot(self) -> np.ndarray:
        """Return the task's state."""
        data = self._env.data
        stale = [np.ravel(getattr(data, name)) for name in _STALE]
        return np.concatenate([read_state(self._env.model, data, self._randomized), *stale])

    def restore(self, values: np.ndarray) -> None:
        """Set the task to a `snapshot`."""
        data = self._env.data
        for name in reversed(_STALE):
            array = getattr(data, name)
            values, stale = values[: -array.size], values[-array.size :]
            array[...] = stale.reshape(array.shape)
        write_state(self._env.model, data, self._randomized, values)


class ClassicTask:
    """Snapshot and restore for Gymnasium's classic control tasks, whose state is one array.

    The vector also stores the array's dtype, because in some tasks it changes during an episode.
    """

    def __init__(self, env: Any) -> None:
        self._env = env

    def snapshot(self) -> np.ndarray:
        """Return the task's state."""
        state = np.asarray(self._env.state)
        return np.append(state.astype(np.float64), state.dtype == np.float32)

    def restore(self, values: np.ndarray) -> None:
        """Set the task to a `snapshot`."""
        self._env.state = values[:-1].astype(np.float32 if values[-1] else np.float64)


def find_restorer(env: Any) -> Any:
    """Return the object with `snapshot()` and `restore(values)` for a Gymnasium task, or None.

    This is the outermost wrapper or environment that defines both methods, so a user's task only
    has to define them. Otherwise it is an adapter for Gymnasium's MuJoCo and classic control tasks.
    """
    for layer in layers(env):
        if callable(_get_own(layer, "snapshot")) and callable(_get_own(layer, "restore")):
            # A nested `GymnasiumEnv` defines both methods, but they need its own restorer.
            return layer if getattr(layer, "restorer", layer) is not None else None
    module = type(env.unwrapped).__module__
    if hasattr(env.unwrapped, "do_simulation") and hasattr(env.unwrapped, "model"):
        return MujocoTask(env.unwrapped)
    if module.startswith("gymnasium.envs.classic_control"):
        return ClassicTask(env.unwrapped)
    return None


def _get_own(layer: Any, name: str) -> Any:
    # Do not use getattr on the instance, because older wrappers forward unknown attributes.
    return getattr(type(layer), name, None) or layer.__dict__.get(name)


def layers(env: Any) -> Iterator[Any]:
    """Yield the wrappers of a task, outermost first, and then the task."""
    layer = env
    while layer is not None:
        yield layer
        layer = getattr(layer, "__dict__", {}).get("env")


def statistics_wrappers(env: Any) -> tuple[str, ...]:
    """Return the class names of the wrappers that keep running statistics (mean, var, count)."""
    return tuple(
        type(layer).__name__
        for layer in layers(env)
        if any(
            all(hasattr(value, name) for name in ("mean", "var", "count"))
            for value in vars(layer).values()
        )
    )


def verify(
    env: Any,
    snapshot: np.ndarray,
    action: np.ndarray,
    transition: Transition,
    *,
    steps: int | None = None,
) -> str | None:
    """Repeat a recorded step and compare the result bitwise.

    Args:
      env: an environment of `envs.make` that has been reset; the call leaves it one step after
        `snapshot`.
      snapshot: (L,) the state before the recorded step.
      action: (A,) the recorded action, in [-1, 1].
      transition: the recorded result, float32 leaves without leading axes; `obs` is not read.
      steps: see `restore` of `env`; pass the value that will be used with this task.

    Returns:
      None if the results are equal, else the difference in one line.
    """
    try:
        env.restore(np.asarray(snapshot, np.float64), steps=steps)
    except (ValueError, TypeError, IndexError) as error:
        return f"its stored state cannot be restored ({' '.join(str(error).split())})"
    obs, reward, terminated, _, _ = env.step(np.asarray(action, np.float32))
    names = [*(f"the observation's {name}" for name in env.obs_names), "the reward", "the discount"]
    with np.errstate(over="ignore"):
        repeated = np.array([*obs, reward, 1 - terminated], np.float32)
    recorded = np.array([*transition.next_obs, transition.reward, transition.discount], np.float32)
    if repeated.shape != recorded.shape:
        return f"its observation has {len(obs)} entries, and had {len(transition.next_obs)}"
    # Compare as integers, because -0.0 equals 0.0 as a float.
    different = np.flatnonzero(repeated.view(np.uint32) != recorded.view(np.uint32))
    if not different.size:
        return None
    first = different[0]
    return (
        f"a step from a stored state has a different result than before: {names[first]} is "
        f"{repeated[first]:g} and was {recorded[first]:g} ({different.size} of {len(names)} differ)"
    )


def probe(make: Callable[[], Any], *, episodes: int = 3, steps: int = 16) -> str | None:
    """Test whether one instance of a task reproduces the steps of another from its states.

    The states are restored in random order, in an instance that is in a different episode. Values
    sampled at reset and the preceding steps then differ, so hidden state cannot agree by chance.

    Args:
      make: makes an instance of the task.
      episodes: number of recorded episodes.
      steps: maximum number of recorded steps per episode.

    Returns:
      None if all steps were reproduced, else the first difference in one line.
    """
    source, target = make(), make()
    random = np.random.default_rng(0)
    recorded = []
    try:
        for episode in range(episodes):
            obs, _ = source.reset(seed=episode)
            for _ in range(steps):
                snapshot = source.snapshot()
                action = random.uniform(-1, 1, source.action_space.shape).astype(np.float32)
                next_obs, reward, terminated, truncated, _ = source.step(action)
                transition = Transition(obs, action, reward, 1 - terminated, next_obs)
                recorded.append((snapshot, transition))
                obs = next_obs
                if terminated or truncated:
                    break
        target.reset(seed=episodes)
        for i in random.permutation(len(recorded)):
            snapshot, transition = recorded[i]
            difference = verify(target, snapshot, transition.action, transition)
            if difference is not None:
                return difference
    finally:
        source.close()
        target.close()
    return None
