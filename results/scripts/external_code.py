"""Functions of the scripts compare_*.py: load code written for an earlier JAX, write a table."""

import importlib
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dynajax import UsageError
from dynajax.runs.directory import device_name, write_csv


def load(
    flag: str,
    folder: str,
    marker: str,
    needs: str,
    stand_ins: Sequence[types.ModuleType],
    *names: str,
) -> list[Any]:
    """Import modules of a clone that was written for an earlier JAX.

    Args:
      flag: the flag that names `folder`.
      folder: the clone.
      marker: a folder that every such clone has.
      needs: the packages that it needs.
      stand_ins: modules that replace those of the clone's modules that are not needed here.
      names: the modules to import.

    Raises:
      UsageError: the folder is not such a clone, or a package that it needs is missing.
    """
    root = Path(folder).resolve()
    if not (root / marker).is_dir():
        raise UsageError(f"--{flag}={folder}: there is no {marker} in it; clone it there")
    sys.path.insert(0, str(root))
    sys.modules |= {module.__name__: module for module in stand_ins}
    if not hasattr(jax, "tree_map"):
        vars(jax)["tree_map"] = jax.tree.map
    try:
        # The JAX backend of tensorflow-probability expects this name in its former module.
        old, core = (importlib.import_module(n) for n in ("jax.interpreters.xla", "jax._src.core"))
        vars(old).setdefault("pytype_aval_mappings", core.pytype_aval_mappings)
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise UsageError(
            f"--{flag}={folder}: their code did not load ({error}); it needs {needs}"
        ) from None


def line(env: str, learners: int, side: str, ratios: np.ndarray, name: str) -> dict[str, Any]:
    """Return a line of the table: the median of some ratios (R,) as `name`, and their quartiles."""
    low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return {
        "device": device_name(),
        "jax": jax.__version__,
        "env": env,
        "learners": learners,
        "side": side,
        name: f"{ratio:.3f}",
        "low": f"{low:.3f}",
        "high": f"{high:.3f}",
    }


def write(out: str, name: str, lines: Sequence[dict[str, Any]]) -> None:
    """Write the table as the file `name` in a folder."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / name, lines)
