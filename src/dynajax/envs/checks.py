"""Check the spaces and return values of a task; each error is one line."""

import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
from gymnasium import spaces

from dynajax.types import EnvSpec, ObsPart, UsageError

#: Bounds of this magnitude count as infinite, because dm_control writes 1e10 for infinity.
UNBOUNDED = 1e10
#: Observations, rewards and actions that vary by less than this many units in the last place of
#: float32 have lost digits, as have observations that change by less than `_LEAST_CHANGE` in a step.
_LEAST_SPREAD = 1000
_LEAST_CHANGE = 10
#: Smaller variations, relative to the values, are rounding errors of a float64 simulator.
_DOUBLE_ROUNDING = 1000 * 2.0**-52
_MUJOCO_PIN = "mujoco is pinned to 3.17, because dm_control needs it"


def is_unbounded(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return a mask (A,) of the action dimensions without finite bounds."""
    return (low <= -UNBOUNDED) | (high >= UNBOUNDED)


def describe_error(error: Exception) -> str:
    """Return the type and message of an exception in one line.

    If the message is empty, the line names the place where the exception was raised. If it is
    empty or mentions MuJoCo, the line also names the pinned version, since an incompatible
    version is a common cause of such errors.
    """
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not text and frames:
        last = frames[-1]
        line += (
            f", raised without a message in {last.name}, {Path(last.filename).name}:{last.lineno}"
        )
    if not text or re.search(r"mujoco|mjcf|flex", text, re.I):
        return f"{line}; {_MUJOCO_PIN}"
    return line


def leaf_spaces(space: spaces.Space, prefix: str = "") -> Iterator[tuple[str, spaces.Space]]:
    """Yield (name, space) of each leaf of a Dict or Tuple, in the order of `spaces.flatten`."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces
        items = parts.items() if isinstance(parts, dict) else enumerate(parts)
        for key, part in items:
            yield from leaf_spaces(part, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix or "obs", space


def obs_parts(space: spaces.Space, keys: tuple[str | int, ...] = ()) -> tuple[ObsPart, ...]:
    """Return the parts of an observation space, in the order of `spaces.flatten`.

    The result is () if a part cannot be described, such as a text or a part with an unusual key.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces
        items: Any = parts.items() if isinstance(parts, dict) else enumerate(parts)
        inner = [
            obs_parts(part, (*keys, key)) if isinstance(key, str | int) else ()
            for key, part in items
        ]
        return tuple(part for parts in inner for part in parts) if all(inner) else ()
    options: tuple[tuple[int, int], ...] = ()
    if isinstance(space, spaces.Discrete):
        options = ((int(space.n), int(space.start)),)
    elif isinstance(space, spaces.MultiDiscrete):
        counts, starts = space.nvec.ravel().tolist(), space.start.ravel().tolist()
        options = tuple(zip(counts, starts, strict=True))
    elif not isinstance(space, spaces.Box | spaces.MultiBinary):
        return ()
    return (ObsPart(keys, tuple(map(int, space.shape or ())), options),)


def check_spaces(name: str, action: spaces.Space, observation: spaces.Space) -> None:
    """Check that the spaces of a task are supported.

    Raises:
      UsageError: an action or observation space is not supported.
    """
    _check_action_space(name, action)
    for part, space in leaf_spaces(observation):
        if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) >= 3:
            raise UsageError(
                f"--env={name}: its observation {part!r} is an image {space.shape}; "
                "dynajax learns from state vectors"
            )
    if not observation.is_np_flattenable:
        raise UsageError(
            f"--env={name}: its observations, {type(observation).__name__}, have no fixed length; "
            "dynajax needs a Box, or a Dict or Tuple of boxes"
        )
    if not spaces.flatdim(observation):
        raise UsageError(
            f"--env={name}: its observations are empty ({_short(observation)}); a policy needs at "
            "least one entry"
        )


def _check_action_space(name: str, space: spaces.Space) -> None:
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise UsageError(
            f"--env={name}: its actions are {_short(space)}; "
            "dynajax needs continuous actions (a Box of floats)"
        )
    low, high = space.low.ravel(), space.high.ravel()
    if not low.size:
        raise UsageError(
            f"--env={name}: its actions are empty ({_short(space)}); dynajax needs at least one "
            "action dimension"
        )
    if np.isnan([low, high]).any() or is_unbounded(low, high).any():
        raise UsageError(
            f"--env={name}: its actions have infinite bounds (1e10 and more counts as infinite); "
            "wrap the task to make them finite (gymnasium.wrappers.RescaleAction, or ClipAction "
            "and your own Box)"
        )
    constant = np.flatnonzero(low >= high)
    if constant.size:
        i = constant[0]
        raise UsageError(
            f"--env={name}: its action {i} can only be {low[i]:g} (bounds {low[i]:g} and "
            f"{high[i]:g}), so it has no effect; an MJCF actuator needs a ctrlrange"
        )


def double_space(space: spaces.Space) -> spaces.Space:
    """Return a space for `spaces.flatten` that keeps the digits of float64 observations."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict([(key, double_space(part)) for key, part in space.spaces.items()])
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([double_space(part) for part in space.spaces])
    if isinstance(space, spaces.Box):
        return spaces.Box(-np.inf, np.inf, space.shape, np.float64)
    return space


class ValueRanges:
    """Ranges of a task's first observations and rewards, before they are cast to float32.

    After `MEASURED` observations nothing more is recorded, so that later steps cost nothing.

    Attributes:
      open: whether more observations are recorded.
    """

    MEASURED: ClassVar[int] = 1000

    def __init__(self, obs_dim: int) -> None:
        self.open = True
        self._count = 0
        self._previous = np.full(obs_dim + 1, np.nan)
        self._low, self._high = (np.full(obs_dim + 1, x) for x in (np.inf, -np.inf))
        self._change = np.zeros(obs_dim + 1)

    def add(self, obs: np.ndarray, reward: float | None) -> None:
        """Record an observation (D,) and its reward, None for the first one of an episode."""
        if not self.open:
            return
        values = np.append(np.asarray(obs, np.float64), np.nan if reward is None else reward)
        values[~np.isfinite(values)] = np.nan
        self._low, self._high = np.fmin(self._low, values), np.fmax(self._high, values)
        if reward is not None:
            self._change = np.fmax(self._change, np.abs(values - self._previous))
        self._previous = values
        self._count += 1
        self.open = self._count < self.MEASURED

    def array(self) -> np.ndarray:
        """Return smallest and largest values, and largest changes in one step: (3, D + 1)."""
        return np.stack([self._low, self._high, self._change])


def precision_warning(name: str, obs_names: Sequence[str], ranges: np.ndarray) -> str | None:
    """Return a warning if float32 cannot resolve an observation or the reward, or None.

    Args:
      name: task name.
      obs_names: D names.
      ranges: (S, 3, D + 1) float64, see `ValueRanges`; the last entry is the reward.
    """
    low, high, change = ranges[:, 0].min(0), ranges[:, 1].max(0), ranges[:, 2].max(0)
    size = np.maximum(np.abs(low), np.abs(high))
    limits = np.finfo(np.float32)
    usable = (low <= high) & (size > limits.tiny) & (size < limits.max)
    low, high, change, size = (np.where(usable, x, 0.0) for x in (low, high, change, size))
    resolution = np.spacing(size.astype(np.float32)).astype(np.float64)
    spread = high - low
    # What a float64 simulator leaves in a constant is rounding, and lost without harm.
    rounding = _DOUBLE_ROUNDING * size
    # The reward is not predicted as a change, so only its spread counts.
    change[-1] = 0.0
    lost = ((spread > rounding) & (spread < _LEAST_SPREAD * resolution)) | (
        (change > rounding) & (change < _LEAST_CHANGE * resolution)
    )
    if not lost.any():
        return None
    first, more = np.flatnonzero(lost)[0], lost.sum() - 1
    label = f"observation {first} ({obs_names[first]})" if first < len(obs_names) else "the reward"
    others = f" ({more} more like this)" if more else ""
    offset = (low[first] + high[first]) / 2
    changes = f" and by at most {change[first]:.3g} in a step" if first < len(obs_names) else ""
    return (
        f"--env={name}: {label} is around {offset:.6g} and varies by {spread[first]:.3g}{changes}, "
        f"but float32 resolves only {resolution[first]:.2g} there{others}; subtract a constant such "
        f"as {offset:.6g} in the task, before it is cast"
    )


def bounds_warning(spec: EnvSpec) -> str | None:
    """Return a warning if float32 cannot resolve the range of an action, or None."""
    low, high = np.array(spec.bounds or ([], []), np.float64)
    size = np.maximum(np.abs(low), np.abs(high))
    resolution = np.spacing(size.astype(np.float32)).astype(np.float64)
    lost = np.flatnonzero(high - low < _LEAST_SPREAD * resolution)
    if not lost.size:
        return None
    i = lost[0]
    return (
        f"--env={spec.name}: action {i} is between {low[i]:.9g} and {high[i]:.9g}, but float32 "
        f"resolves only {resolution[i]:.2g} there; subtract a constant such as {low[i]:.6g} in the "
        "task, and add it to the actions"
    )


def check_observation(name: str, space: spaces.Space, value: Any, part: str = "") -> None:
    """Check that an observation belongs to its space, up to a lossless cast of its dtype.

    `spaces.flatten` would silently broadcast, cut or truncate an observation that does not.

    Args:
      name: task name.
      space: observation space.
      value: observation that the task returned.
      part: name of the part of a Dict or Tuple that is checked.

    Raises:
      UsageError: the structure, shape or dtype is not that of the space.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces
        items = list(parts.items() if isinstance(parts, dict) else enumerate(parts))
        for key, inner in items:
            try:
                entry = value[key]
            except (KeyError, IndexError, TypeError):
                _raise_mismatch(name, space, part, f"has no part {key!r}")
            check_observation(name, inner, entry, f"{part}.{key}" if part else str(key))
        if isinstance(space, spaces.Tuple) and len(value) != len(items):
            _raise_mismatch(name, space, part, f"has {len(value)} parts")
        return
    try:
        array = np.asarray(value)
    except ValueError:
        _raise_mismatch(name, space, part, "is not an array")
    if array.shape != space.shape:
        _raise_mismatch(name, space, part, f"has the shape {array.shape}")
    dtype = np.dtype(space.dtype)
    if array.dtype == dtype and not isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return
    # Any integer type is accepted for an integer space if the cast preserves the values.
    lossless = np.can_cast(array.dtype, dtype, "same_kind") or (
        array.dtype.kind in "biu" and np.array_equal(array.astype(dtype), array)
    )
    if not lossless:
        _raise_mismatch(name, space, part, f"has the dtype {array.dtype}")
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) and not space.contains(
        array.astype(dtype)
    ):
        _raise_mismatch(name, space, part, f"is {_short(value)}")


def _raise_mismatch(name: str, space: spaces.Space, part: str, problem: str) -> NoReturn:
    label = f" {part!r}" if part else ""
    raise UsageError(
        f"--env={name}: the task returned an observation{label} that {problem}, but its space is "
        f"{_short(space)}; change one to match the other"
    )


def _short(value: Any, max_length: int = 120) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= max_length else f"{text[:max_length]}..."


def to_scalar(name: str, field: str, value: Any) -> float:
    """Return a reward or flag as a float; an array of one entry is accepted.

    Args:
      name: task name.
      field: "reward", "terminated" or "truncated".
      value: what the task returned for the field.

    Raises:
      UsageError: the value is not a single number.
    """
    if isinstance(value, float | int | np.bool_):
        return float(value)
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf":
        shape = f"an array of shape {array.shape}" if array.size != 1 else _short(repr(value))
        remedy = (
            "; combine several rewards into one (gymnasium.RewardWrapper)"
            if field == "reward"
            else ""
        )
        raise UsageError(
            f"--env={name}: the task returned {shape} as its {field}; it must be one number{remedy}"
        )
    return float(array.item())


def is_old_api_error(error: Exception) -> bool:
    """Return True if `reset` or `step` failed because the task uses the API of Gym before 0.26."""
    if isinstance(error, TypeError):
        text = r"reset\(\) got an unexpected keyword argument '(seed|options)'"
        return bool(re.search(text, str(error)))
    frames = traceback.extract_tb(error.__traceback__)
    line = (frames[-1].line or "") if frames else ""
    # Look at the failing line too, because a task can fail to unpack something unrelated.
    return "values to unpack" in str(error) and bool(re.search(r"\.(step|reset)\(", line))


def old_api_error(name: str) -> UsageError:
    """Return the error for a task that uses the API of Gym before 0.26."""
    return UsageError(
        f"--env={name}: it uses the API of Gym before 0.26; in Gymnasium reset(seed=, options=) "
        "returns (observation, info) and step returns (observation, reward, terminated, truncated, "
        "info)"
    )
