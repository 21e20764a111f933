"""Run an exported policy with NumPy alone. Copy this file to the machine that uses the policy."""

import json

import numpy as np


def flatten(obs, parts):
    """Return observations as an array (..., D), in the order of training.

    Args:
      obs: (..., D), or what the task returns, such as a dict or a tuple; leading axes are a batch.
      parts: for each part its keys, its shape, and the number of values and the first value of each
        of its entries that is one-hot in training.
    """
    several = bool(parts) and bool(parts[0][0])
    nested = (dict, tuple) if several and parts[0][0][0] == 0 else dict
    if not isinstance(obs, nested):
        obs = np.asarray(obs)
        if several or not parts:
            return obs.astype(np.float32)
        _, shape, options = parts[0]
        size = sum(n for n, _ in options) or int(np.prod(shape))
        is_own = obs.dtype.kind in "iu" if options else len(shape) > 1
        matches = obs.shape[max(0, obs.ndim - len(shape)) :] == tuple(shape)
        if obs.shape[-1:] == (size,) and not (is_own and matches):
            return obs.astype(np.float32)
    columns = []
    for keys, shape, options in parts:
        part = obs
        for key in keys:
            part = part[key]
        part = np.asarray(part)
        batch = part.shape[: max(0, part.ndim - len(shape))]
        if part.shape != (*batch, *shape):
            name = ".".join(map(str, keys)) or "obs"
            raise ValueError(f"{name} has the shape {part.shape}, but must end in {tuple(shape)}")
        part = part.reshape(*batch, int(np.prod(shape)))
        for i, (n, low) in enumerate(options):
            one_hot = part[..., i, None] == low + np.arange(n)
            if not one_hot.any(-1).all():
                raise ValueError(f"{part[..., i]} is not between {low} and {low + n - 1}")
            columns.append(one_hot)
        if not options:
            columns.append(part)
    return np.concatenate(columns, -1).astype(np.float32)


def load_policy(path):
    """Load a policy that `dynajax play --export=FILE.npz` wrote.

    Returns a function from observations, (..., D) or as the task returns them, to the task's
    actions within its bounds, (..., A) or (..., *shape of its actions).
    """
    with np.load(path) as file:
        data = dict(file)
    names = sorted(name for name in data if "." in name)
    layers = [
        (str(kind), [data[name] for name in names if name.startswith(f"{i}.")])
        for i, kind in enumerate(data["layers"])
    ]
    low, high = data["low"], data["high"]
    shape, parts = json.loads(str(data.get("shapes", f"[[{low.size}], []]")))

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
        x = residual = flatten(obs, parts)
        for kind, arrays in layers:
            if kind == "keep":
                residual = x
            elif kind == "add":
                x = x + residual
            else:
                x = functions[kind](x, *arrays)
        action = np.clip((low + high) / 2 + (high - low) / 2 * x, low, high)
        return action.astype(np.float32).reshape((*x.shape[:-1], *shape))

    return policy
