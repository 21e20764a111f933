"""Actions in a task's own bounds, and in the [-1, 1] that everything here acts in."""

import numpy as np


def rescale(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Actions (..., A) from [-1, 1] to [low, high]; with bounds -1 and 1 it changes no bit."""
    scaled = (low + high) / 2 + (high - low) / 2 * np.asarray(action, np.float64)
    return np.clip(scaled, low, high)


def to_unit(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The inverse of `rescale`: actions (..., A) from [low, high] to [-1, 1]."""
    return (2 * np.asarray(action, np.float64) - (low + high)) / (high - low)
