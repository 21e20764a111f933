"""Run an exported policy with NumPy alone. Copy this file to the machine that uses the policy."""

import numpy as np


def load_policy(path):
    """Load a policy that `dynajax play --export=FILE.npz` wrote.

    Returns a function from observations (..., D) to actions (..., A) within the task's bounds.
    """
    with np.load(path) as file:
        data = dict(file)
    names = sorted(name for name in data if "." in name)
    layers = [
        (str(kind), [data[name] for name in names if name.startswith(f"{i}.")])
        for i, kind in enumerate(data["layers"])
    ]
    low, high = data["low"], data["high"]

    def norm(x, scale, bias):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * scale + bias

    functions: dict = {
        "standardise": lambda x, mean, scale, clip: np.clip((x - mean) / scale, -clip, clip),
        "dense": lambda x, kernel, bias: x @ kernel + bias,
        "norm": norm,
        "relu": lambda x: np.maximum(x, 0),
        "tanh": np.tanh,
    }

    def policy(obs):
        x = residual = np.asarray(obs, np.float32)
        for kind, arrays in layers:
            if kind == "keep":
                residual = x
            elif kind == "add":
                x = x + residual
            else:
                x = functions[kind](x, *arrays)
        return np.clip((low + high) / 2 + (high - low) / 2 * x, low, high).astype(np.float32)

    return policy
