"""A simulator set to a stored state, so that the same step can be taken again, or another one.

A state is one float64 vector: MuJoCo's integration state (positions, velocities, activations, the
solver's warm start), what an episode draws into the model (targets), and what a task keeps beside
both. `take` and `put` are exact: the transition that followed a state follows it again, bit for
bit. Tests hold them to that.
"""

from typing import Any

import mujoco
import numpy as np

_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
#: Parts of a model that some tasks draw anew at every reset.
_DRAWABLE = (
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
#: Positions that Gymnasium's tasks read before a step: MuJoCo leaves them one substep behind the
#: state, so they are no function of it.
_STALE = ("xpos", "xipos")


def parameters(model: Any) -> dict[str, np.ndarray]:
    """Copies of what an episode may draw into the model."""
    return {name: np.array(getattr(model, name)) for name in _DRAWABLE if hasattr(model, name)}


def drawn(before: dict[str, np.ndarray], model: Any) -> tuple[str, ...]:
    """The parameters that a reset has changed."""
    return tuple(n for n, x in before.items() if not np.array_equal(x, getattr(model, n)))


def take(model: Any, data: Any, names: tuple[str, ...]) -> np.ndarray:
    """The state of MuJoCo's structs, and the model's parameters of these names."""
    state = np.empty(mujoco.mj_stateSize(model, _STATE))
    mujoco.mj_getState(model, data, state, _STATE)
    return np.concatenate([state, *(np.ravel(getattr(model, n)) for n in names)])


def put(model: Any, data: Any, names: tuple[str, ...], values: np.ndarray) -> None:
    """The inverse of `take`. Nothing that is derived from the state is computed yet."""
    size = mujoco.mj_stateSize(model, _STATE)
    mujoco.mj_setState(model, data, np.ascontiguousarray(values[:size]), _STATE)
    for name in names:
        array = getattr(model, name)
        array[...] = values[size : size + array.size].reshape(array.shape)
        size += array.size


class MujocoTask:
    """Gymnasium's MuJoCo tasks, which step with `mj_step` alone."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def snapshot(self) -> np.ndarray:
        data = self._env.data
        stale = [np.ravel(getattr(data, name)) for name in _STALE]
        return np.concatenate([take(self._env.model, data, ()), *stale])

    def restore(self, values: np.ndarray) -> None:
        data = self._env.data
        for name in reversed(_STALE):
            array = getattr(data, name)
            values, stale = values[: -array.size], values[-array.size :]
            array[...] = stale.reshape(array.shape)
        put(self._env.model, data, (), values)


class ClassicTask:
    """Gymnasium's classic control tasks, whose state is one array (some let its type change)."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def snapshot(self) -> np.ndarray:
        state = np.asarray(self._env.state)
        return np.append(state.astype(np.float64), state.dtype == np.float32)

    def restore(self, values: np.ndarray) -> None:
        self._env.state = values[:-1].astype(np.float32 if values[-1] else np.float64)


def setter(env: Any) -> Any:
    """What has `snapshot()` and `restore(values)` for a Gymnasium task; None if nothing has.

    The outermost wrapper or environment that offers both methods itself is taken, so a task of
    one's own needs no more than to define them.
    """
    layer = env
    while layer is not None:
        if callable(_own(layer, "snapshot")) and callable(_own(layer, "restore")):
            return layer if getattr(layer, "can_restore", True) else None
        layer = layer.__dict__.get("env")
    module = type(env.unwrapped).__module__
    if hasattr(env.unwrapped, "do_simulation") and hasattr(env.unwrapped, "model"):
        return MujocoTask(env.unwrapped)
    if module.startswith("gymnasium.envs.classic_control"):
        return ClassicTask(env.unwrapped)
    return None


def _own(layer: Any, name: str) -> Any:
    # Older wrappers hand unknown attributes to what they wrap.
    return getattr(type(layer), name, None) or layer.__dict__.get(name)
