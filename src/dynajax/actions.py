"""Convert actions between [-1, 1], the range used throughout the package, and a task's bounds."""

import numpy as np


def rescale(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Map actions (..., A) from [-1, 1] to [low, high].

    With bounds of -1 and 1 the result is bitwise equal to the input.
    """
    scaled = (low + high) / 2 + (high - low) / 2 * np.asarray(action, np.float64)
    # `np.clip` takes four times as long for one action.
    return np.minimum(np.maximum(scaled, low), high)


def to_unit(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Map actions (..., A) from [low, high] to [-1, 1]; the inverse of `rescale`."""
    return (2 * np.asarray(action, np.float64) - (low + high)) / (high - low)
