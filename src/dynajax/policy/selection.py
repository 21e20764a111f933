"""Select one learner of a run, and restore its trees."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from dynajax.policy import standalone
from dynajax.runs import serialization
from dynajax.runs.directory import expand_user, reading_config
from dynajax.runtime.sharding import from_host, host_shape
from dynajax.types import EnvSpec, UsageError


class Loaded:
    """Base class of the dataclasses that `load_policy` and `load_model` return."""

    noun: ClassVar[str]  # "policy" or "model", for error messages
    spec: EnvSpec
    variant: str
    seed: int
    step: int

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone, because cached jitted functions cannot be pickled or copied."""
        fields: Any = self
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(fields)}

    def __repr__(self) -> str:
        """Return one line, without the weights."""
        return (
            f"{type(self).__name__}({self.spec.name}: {self.spec.obs_dim} observation and "
            f"{self.spec.action_dim} action dimensions, variant {self.variant}, seed {self.seed}, "
            f"step {self.step:,})"
        )

    def _flatten(self, obs: Any) -> np.ndarray:
        """Return observations, flat or as the task returns them, as float32 (..., D).

        Raises:
          UsageError: they are not observations of the task.
        """
        size, parts = self.spec.obs_dim, self.spec.obs_parts
        found = str(obs.shape) if hasattr(obs, "shape") else type(obs).__name__
        try:
            flat = standalone.flatten(obs, parts)
            if flat.shape[-1:] == (size,):
                return flat
            found = str(flat.shape)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            if parts and not hasattr(obs, "shape"):
                found += f" ({type(error).__name__}: {' '.join(str(error).split())})"
        form = f"(..., {size})"
        if not parts:
            form += ", flattened in the order of spec.obs_names"
        elif any(part.keys or part.options or part.shape != (size,) for part in parts):
            form += " or as the task returns them"
        raise UsageError(
            f"the {self.noun} of {self.spec.name} takes observations {form}, but got {found}"
        )


class SelectedLearner(NamedTuple):
    """One learner of a run."""

    folder: Path
    config: dict[str, Any]  # configuration of the run, as in config.json
    num_processes: int  # of the run
    learner_index: int  # among all learners of the run
    variant: str
    seed: int


def learner_names(config: dict[str, Any]) -> list[tuple[str, int]]:
    """Return (variant, seed) of each of the S learners of a configuration from config.json."""
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    return [(variant, seed) for variant in config["variants"] for seed in seeds]


def select_learner(folder: str | Path, index: int) -> SelectedLearner:
    """Return a learner of the run in `folder`.

    Raises:
      UsageError: `folder` is not a run directory, or has no such learner.
    """
    path = expand_user(folder)
    with reading_config(path):
        info = json.loads((path / "config.json").read_text())
        config = info["config"]
        names = learner_names(config)
    if not isinstance(index, int | np.integer) or not 0 <= index < len(names):
        known = "; ".join(f"{i}: {variant}, seed {seed}" for i, (variant, seed) in enumerate(names))
        raise UsageError(f"learner={index}: {folder} has the learners {known}")
    return SelectedLearner(path, config, info.get("processes", 1), int(index), *names[index])


def unflatten(shapes: Any, leaves: dict[str, np.ndarray], folder: Path) -> Any:
    """Return named arrays as a tree with the structure and dtypes of `shapes`.

    Args:
      shapes: tree of shapes and dtypes.
      leaves: arrays by name; names that are not in `shapes` are ignored.
      folder: source of the arrays, for the error message.

    Raises:
      UsageError: an array is missing or has another shape.
    """

    def leaf(path: tuple[Any, ...], expected: Any) -> np.ndarray:
        name = serialization.leaf_name(path)
        if name not in leaves:
            raise UsageError(f"{folder}: {name} is missing")
        stored = host_shape(expected)
        if leaves[name].shape != stored.shape:
            raise UsageError(
                f"{folder}: {name} has shape {leaves[name].shape}, but must have {stored.shape}"
            )
        return from_host(leaves[name].astype(stored.dtype), expected)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def init_shapes(init: Callable[[jax.Array], Any]) -> Any:
    """Return the shapes and dtypes of what `init` returns for a PRNG key."""
    return jax.eval_shape(init, jax.eval_shape(lambda: jax.random.PRNGKey(0)))
