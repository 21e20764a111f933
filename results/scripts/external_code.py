"""Functions of the scripts compare_*.py and beside_*.py: load other code, write a table."""

import importlib
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dynajax import UsageError
from dynajax.runs.directory import device_name, git_commit, machine_name, write_csv


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


def interpreter(python: str) -> str:
    """Return the path of an interpreter that is given as a path, or as a name on PATH.

    Symbolic links are kept, by which an interpreter knows its environment.
    """
    return os.path.abspath(shutil.which(python) or python)


def versions(python: str, *packages: str) -> str:
    """Return the versions of packages in another environment, as "sbx-rl 0.28.0, jax 0.10.2".

    Raises:
      UsageError: the interpreter cannot be started, or does not have a package.
    """
    code = "import importlib.metadata, sys; [print(n, importlib.metadata.version(n)) for n in sys.argv[1:]]"
    try:
        found = subprocess.run(
            [python, "-c", code, *packages],
            env={**os.environ, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
    except OSError as error:
        raise UsageError(f"--python={python}: it cannot be started ({error.strerror})") from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().rpartition("\n")[2]
        raise UsageError(f"--python={python}: it needs {', '.join(packages)} ({last})") from None
    return ", ".join(found.stdout.split("\n")[:-1])


def origin() -> dict[str, Any]:
    """Return the version of dynajax and of JAX, and the machine, for a line of a table."""
    return {"commit": git_commit(), "jax": jax.__version__, "machine": machine_name()}


def write(out: str, name: str, lines: Sequence[dict[str, Any]]) -> None:
    """Write the table as the file `name` in a folder."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / name, lines)
