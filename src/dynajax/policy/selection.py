"""The rows of a run, as someone who wants one of them names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dynajax.runs import serialization
from dynajax.runs.directory import reading
from dynajax.types import UsageError


class Chosen(NamedTuple):
    """One row of a run."""

    folder: Path
    plain: dict[str, Any]  # the configuration as JSON has it
    parts: int  # processes that the run has
    number: int
    variant: str
    seed: int


def rows(plain: dict[str, Any]) -> list[tuple[str, int]]:
    """(variant, seed) of each of the S rows."""
    seeds = range(plain["seed"], plain["seed"] + plain["seeds"])
    return [(variant, seed) for variant in plain["variants"] for seed in seeds]


def choose(folder: str | Path, row: int) -> Chosen:
    """Row number `row` of the run in `folder`.

    Raises:
      UsageError: not a run's folder, or one without such a row.
    """
    path = Path(folder).expanduser()
    with reading(path):
        info = json.loads((path / "config.json").read_text())
        plain = info["config"]
        names = rows(plain)
    if not isinstance(row, int | np.integer) or not 0 <= row < len(names):
        known = "; ".join(f"{i}: {variant}, seed {seed}" for i, (variant, seed) in enumerate(names))
        raise UsageError(f"row={row}: {folder} has the rows {known}")
    return Chosen(path, plain, info.get("processes", 1), int(row), *names[row])


def filled(shapes: Any, leaves: dict[str, np.ndarray], place: Path) -> Any:
    """Arrays by name as the tree that `shapes` has.

    Raises:
      UsageError: one is missing, or has another shape.
    """

    def leaf(path: tuple[Any, ...], like: Any) -> np.ndarray:
        name = serialization.name(path)
        if name not in leaves or leaves[name].shape != like.shape:
            raise UsageError(
                f"{place}: {name} does not fit this version of dynajax or of the agent"
            )
        return leaves[name].astype(like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def shapes(make: Callable[[jax.Array], Any]) -> Any:
    """The shapes of what is made from a key."""
    return jax.eval_shape(make, jax.eval_shape(lambda: jax.random.PRNGKey(0)))
