"""What the scripts beside_*.py share: other people's code under a later JAX, and a table."""

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
    """Modules of a clone that was written for an earlier JAX.

    Args:
      flag: that named the `folder`.
      marker: a folder that is in such a clone.
      needs: the packages to install for it.
      stand_ins: modules for those of theirs that are not needed here.
      names: of the modules.

    Raises:
      UsageError: it is no such clone, or a package that it needs is missing.
    """
    root = Path(folder).resolve()
    if not (root / marker).is_dir():
        raise UsageError(f"--{flag}={folder}: there is no {marker} in it; clone it there")
    sys.path.insert(0, str(root))
    sys.modules |= {module.__name__: module for module in stand_ins}
    if not hasattr(jax, "tree_map"):
        vars(jax)["tree_map"] = jax.tree.map
    try:
        # tensorflow-probability's JAX backend looks for it where it once was.
        old, core = (importlib.import_module(n) for n in ("jax.interpreters.xla", "jax._src.core"))
        vars(old).setdefault("pytype_aval_mappings", core.pytype_aval_mappings)
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise UsageError(
            f"--{flag}={folder}: their code did not load ({error}); it needs {needs}"
        ) from None


def line(env: str, rows: int, side: str, ratios: np.ndarray, name: str) -> dict[str, Any]:
    """A table's line: the median of some ratios (R,) under `name`, with its quartiles."""
    low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return {
        "device": device_name(),
        "jax": jax.__version__,
        "env": env,
        "rows": rows,
        "side": side,
        name: f"{ratio:.3f}",
        "low": f"{low:.3f}",
        "high": f"{high:.3f}",
    }


def write(out: str, name: str, lines: Sequence[dict[str, Any]]) -> None:
    """The table as `name` in a folder."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / name, lines)
