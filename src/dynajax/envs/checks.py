"""What a task must be, and must return, to be learned from; each refusal is one line."""

import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gymnasium import spaces

from dynajax.types import UsageError

#: A bound this far out counts as none: dm_control puts it in place of infinity.
UNLIMITED = 1e10
_PIN = "mujoco is pinned to 3.17, because dm_control needs it"


def unlimited(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which actions (A,) have no bounds."""
    return (low <= -UNLIMITED) | (high >= UNLIMITED)


def reason(error: Exception) -> str:
    """What an exception says, in one line: its type, its text, and where an empty one was raised.

    Where the text is empty, or speaks of MuJoCo, the version that is installed may be the cause,
    and so it is named.
    """
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not text and frames:
        last = frames[-1]
        line += (
            f", raised without a message in {last.name}, {Path(last.filename).name}:{last.lineno}"
        )
    return f"{line}; {_PIN}" if not text or re.search(r"mujoco|mjcf|flex", text, re.I) else line


def leaves(space: spaces.Space, prefix: str = "") -> Iterator[tuple[str, spaces.Space]]:
    """(name, space) of the parts of a Dict or Tuple, in the order in which they are flattened."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces
        items = parts.items() if isinstance(parts, dict) else enumerate(parts)
        for key, part in items:
            yield from leaves(part, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix or "obs", space


def task(name: str, action: spaces.Space, observation: spaces.Space) -> None:
    """Refuses spaces that the algorithm cannot act in or learn from.

    Raises:
      UsageError: naming the task and what is wrong with it.
    """
    _actions(name, action)
    for part, space in leaves(observation):
        if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) >= 3:
            raise UsageError(
                f"--env={name}: its observation {part!r} is a picture {space.shape}; "
                "dynajax learns from state vectors"
            )
    if not observation.is_np_flattenable:
        raise UsageError(
            f"--env={name}: its observations, {type(observation).__name__}, have no fixed length; "
            "dynajax needs a Box, or a Dict or Tuple of boxes"
        )
    if not spaces.flatdim(observation):
        raise UsageError(
            f"--env={name}: its observations have no entries ({_short(observation)}); a policy "
            "needs something to see"
        )


def _actions(name: str, space: spaces.Space) -> None:
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise UsageError(
            f"--env={name}: its actions are {_short(space)}; "
            "dynajax needs continuous ones (a float Box)"
        )
    low, high = space.low.ravel(), space.high.ravel()
    if not low.size:
        raise UsageError(f"--env={name}: its actions have no entries ({_short(space)})")
    if np.isnan([low, high]).any() or unlimited(low, high).any():
        raise UsageError(
            f"--env={name}: its actions have infinite bounds (1e10 and more counts as infinite); "
            "wrap it so that they are finite (gymnasium.wrappers.RescaleAction, or ClipAction and "
            "a Box of your own)"
        )
    dead = np.flatnonzero(low >= high)
    if dead.size:
        at = dead[0]
        raise UsageError(
            f"--env={name}: its action {at} can only be {low[at]:g} (bounds {low[at]:g} and "
            f"{high[at]:g}), so nothing acts; an actuator of an MJCF needs a ctrlrange"
        )


def observation(name: str, space: spaces.Space, value: Any, part: str = "") -> None:
    """Refuses an observation that flattening would broadcast, cut or truncate.

    Args:
      name: the task.
      space: the observation space, of which `value` should be.
      part: which part of a Dict or Tuple it is.

    Raises:
      UsageError: naming shape or dtype, space and task.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.spaces
        items = list(parts.items() if isinstance(parts, dict) else enumerate(parts))
        for key, inner in items:
            try:
                entry = value[key]
            except (KeyError, IndexError, TypeError):
                _misfit(name, space, part, f"has no part {key!r}")
            observation(name, inner, entry, f"{part}.{key}" if part else str(key))
        if isinstance(space, spaces.Tuple) and len(value) != len(items):
            _misfit(name, space, part, f"has {len(value)} parts")
        return
    try:
        array = np.asarray(value)
    except ValueError:
        _misfit(name, space, part, "is no array")
    if array.shape != space.shape:
        _misfit(name, space, part, f"has the shape {array.shape}")
    dtype = np.dtype(space.dtype)
    if array.dtype == dtype and not isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return
    # Integers of any size will do for integers, as long as they are the same afterwards.
    kept = np.can_cast(array.dtype, dtype, "same_kind") or (
        array.dtype.kind in "biu" and np.array_equal(array.astype(dtype), array)
    )
    if not kept:
        _misfit(name, space, part, f"has the dtype {array.dtype}")
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) and not space.contains(
        array.astype(dtype)
    ):
        _misfit(name, space, part, f"is {_short(value)}")


def _misfit(name: str, space: spaces.Space, part: str, what: str) -> NoReturn:
    place = f" {part!r}" if part else ""
    raise UsageError(
        f"--env={name}: the task returned an observation{place} that {what}, but its space is "
        f"{_short(space)}; let the two agree"
    )


def _short(value: Any, most: int = 120) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[:most]}..."


def number(name: str, what: str, value: Any) -> float:
    """A reward or a flag as one number; an array of one entry is one.

    Args:
      what: "reward", "terminated" or "truncated".

    Raises:
      UsageError: it is something else.
    """
    if isinstance(value, float | int | np.bool_):
        return float(value)
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf":
        shape = f"an array of shape {array.shape}" if array.size != 1 else _short(repr(value))
        several = "; combine several into one (gymnasium.RewardWrapper)" if what == "reward" else ""
        raise UsageError(
            f"--env={name}: the task returned {shape} as its {what}; it must be one number{several}"
        )
    return float(array.item())


def is_old_api(error: Exception) -> bool:
    """Whether a `reset` or `step` failed because it is written for Gym's old API."""
    if isinstance(error, TypeError):
        text = r"reset\(\) got an unexpected keyword argument '(seed|options)'"
        return bool(re.search(text, str(error)))
    frames = traceback.extract_tb(error.__traceback__)
    line = (frames[-1].line or "") if frames else ""
    # By the line, for a task can fail to unpack something else.
    return "values to unpack" in str(error) and bool(re.search(r"\.(step|reset)\(", line))


def old_api(name: str) -> UsageError:
    """The refusal of a task that is written for Gym's old API."""
    return UsageError(
        f"--env={name}: it is written for the API of Gym before 0.26; Gymnasium's "
        "reset(seed=, options=) returns (observation, info), its step (observation, reward, "
        "terminated, truncated, info)"
    )
