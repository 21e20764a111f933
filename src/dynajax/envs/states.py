"""A simulator set to a stored state, so that the same step can be taken again, or another one.

A state is one float64 vector: MuJoCo's integration state (positions, velocities, activations, the
solver's warm start), what an episode draws into the model (targets), and what a task keeps beside
both. `take` and `put` are exact: the transition that followed a state follows it again, bit for
bit. Tests hold them to that.

A task or a wrapper may keep more beside the simulator than anybody else can know of (a goal drawn at
reset, the last observations, running statistics). So nothing is believed: `probe` tries a task out
on itself, and `verify` a run's own transitions.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dynajax.envs.opengl import mujoco
from dynajax.types import Transition

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
    """Gymnasium's MuJoCo tasks, which step with `mj_step` alone.

    To be made before the first reset, for what a reset draws into the model is told by comparing.
    """

    def __init__(self, env: Any) -> None:
        self._env = env
        self._loaded = parameters(env.model)

    @functools.cached_property
    def _drawn(self) -> tuple[str, ...]:
        return drawn(self._loaded, self._env.model)

    def snapshot(self) -> np.ndarray:
        data = self._env.data
        stale = [np.ravel(getattr(data, name)) for name in _STALE]
        return np.concatenate([take(self._env.model, data, self._drawn), *stale])

    def restore(self, values: np.ndarray) -> None:
        data = self._env.data
        for name in reversed(_STALE):
            array = getattr(data, name)
            values, stale = values[: -array.size], values[-array.size :]
            array[...] = stale.reshape(array.shape)
        put(self._env.model, data, self._drawn, values)


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
    for layer in layers(env):
        if callable(_own(layer, "snapshot")) and callable(_own(layer, "restore")):
            # One of this package's own, wrapped once more, can do what its task can.
            return layer if getattr(layer, "setter", layer) is not None else None
    module = type(env.unwrapped).__module__
    if hasattr(env.unwrapped, "do_simulation") and hasattr(env.unwrapped, "model"):
        return MujocoTask(env.unwrapped)
    if module.startswith("gymnasium.envs.classic_control"):
        return ClassicTask(env.unwrapped)
    return None


def _own(layer: Any, name: str) -> Any:
    # Older wrappers hand unknown attributes to what they wrap.
    return getattr(type(layer), name, None) or layer.__dict__.get(name)


def layers(env: Any) -> Iterator[Any]:
    """The wrappers of a task, outermost first, and the task itself."""
    layer = env
    while layer is not None:
        yield layer
        layer = getattr(layer, "__dict__", {}).get("env")


def statistics(env: Any) -> tuple[str, ...]:
    """The wrappers that keep running statistics of what passes through them, by class name."""
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
    """Takes a recorded step again, and compares it bit for bit.

    Args:
      env: one of `envs.make`, after any reset; it is left one step after `snapshot`.
      snapshot: (L,) the state that the step began in.
      action: (A,) in [-1, 1], the recorded one.
      transition: what followed, float32 leaves without leading axes; its `obs` is not read.
      steps: see `restore` of `env`; the count that is used afterwards should be verified.

    Returns:
      None if all is the same; else what differs, in one line.
    """
    try:
        env.restore(np.asarray(snapshot, np.float64), steps=steps)
    except (ValueError, TypeError, IndexError) as error:
        return f"its stored state cannot be put back ({' '.join(str(error).split())})"
    obs, reward, terminated, _, _ = env.step(np.asarray(action, np.float32))
    names = [*(f"the observation's {name}" for name in env.obs_names), "the reward", "the discount"]
    with np.errstate(over="ignore"):
        again = np.array([*obs, reward, 1 - terminated], np.float32)
    recorded = np.array([*transition.next_obs, transition.reward, transition.discount], np.float32)
    if again.shape != recorded.shape:
        return f"its observation has {len(obs)} entries, and had {len(transition.next_obs)}"
    # As integers, for -0.0 equals 0.0.
    different = np.flatnonzero(again.view(np.uint32) != recorded.view(np.uint32))
    if not different.size:
        return None
    first = different[0]
    return (
        f"set to a stored state it takes another step than it took: {names[first]} is "
        f"{again[first]:g} and was {recorded[first]:g} ({different.size} of {len(names)} differ)"
    )


def probe(make: Callable[[], Any], *, episodes: int = 3, steps: int = 16) -> str | None:
    """Tries whether one simulator of a task goes on from the states of another one.

    The states come in another order than they were recorded in, to a simulator that is in an
    episode of its own: what a reset draws, and what has happened before, are then not the same by
    chance.

    Returns:
      None if every step was the same; else what differs, in one line.
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
                new, reward, terminated, truncated, _ = source.step(action)
                recorded.append((snapshot, Transition(obs, action, reward, 1 - terminated, new)))
                obs = new
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
