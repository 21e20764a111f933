"""Serialization of named arrays: atomic writes and checksums around Orbax.

Orbax alone can read the folders. This module adds what Orbax 0.12.8 lacks:

- Orbax does not detect corruption. With one flipped bit in the data file it returned wrong numbers
  in 24 of 25 cases, with OCDBT and zarr 2 or 3, compressed or not. Every array therefore has a
  checksum.
- After the first failed request Orbax closes its event loop, and every pending request prints a
  traceback (218 lines for a write of 80 MB to a disk of 60 MB). Checksums of the files are therefore
  verified before Orbax reads them, and disk space is reserved before it writes.
- Orbax refuses empty arrays. They are stored in meta.json only.
- With several processes, each has its own checkpoints. With
  `MultiprocessingOptions(active_processes)` Orbax waits for no other process, but only process 0
  writes numpy arrays (the others report no error), and process-local JAX arrays are refused. Several
  processes therefore write plain `arrays.npz` files.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from dynajax.types import UsageError
from dynajax.xla import backend

_NPZ = "arrays.npz"
_NOISY_LOGGERS = ("absl", "asyncio")

# Errors of the system while a file is read that say nothing about its content.
_UNREADABLE = {
    errno.EACCES,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EPERM,
    errno.ESTALE,
    errno.ETIMEDOUT,
}

Arrays = dict[str, np.ndarray]


class Damaged(Exception):
    """Stored data are missing or corrupt; the message is a short reason."""


def leaf_name(path: tuple[Any, ...]) -> str:
    """Return the name of a leaf, such as "learners/agent/actor/Dense_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by name."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def next_number(*folders: Path) -> int:
    """Return a number greater than the leading number of every name in these folders."""
    used = [path for folder in folders for path in folder.glob("*-*")]
    return 1 + max((int(m[0]) for p in used if (m := re.match(r"\d+", p.name))), default=0)


def list_steps(folder: Path) -> dict[Path, int]:
    """Return the subfolders NUMBER-step-STEP and their steps, oldest first."""
    return {
        path: int(match[1])
        for path in sorted(folder.glob("*-step-*"))
        if (match := re.fullmatch(r"\d+-step-(\d+)", path.name))
    }


def write(path: Path, partial: Path, arrays: Arrays, metadata: dict[str, Any]) -> None:
    """Write arrays to the folder `path` atomically.

    Args:
      path: folder, which must not exist.
      partial: temporary folder on the same file system; its previous content is deleted.
      arrays: arrays by name.
      metadata: further content of meta.json, besides dtypes, shapes and checksums.

    Raises:
      OSError, ValueError: the files cannot be written; see `os_error_reason`.
    """
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=partial) as reserved:
        # Orbax adds about 350 bytes per leaf and twenty files.
        size = sum(array.nbytes + 1024 for array in arrays.values()) + 2**18
        os.posix_fallocate(reserved.fileno(), 0, size)
    folder = partial / path.name
    _write_arrays(folder, {name: array for name, array in arrays.items() if array.size})
    metadata = {
        "leaves": {name: _describe(array) for name, array in arrays.items()},
        "files": {
            str(file.relative_to(folder)): zlib.crc32(file.read_bytes())
            for file in folder.rglob("*")
            if file.is_file()
        },
        **metadata,
    }
    text = json.dumps(metadata)
    (folder / "meta.json").write_text(
        f'{{"crc32": {zlib.crc32(text.encode())}, "content":\n{text}}}\n', encoding="utf-8"
    )
    for written in (*folder.rglob("*"), folder):
        _sync(written)
    folder.rename(path)
    _sync(path.parent)


def os_error_reason(error: Exception) -> str | None:
    """Return the operating system's message for an error of `write`, or None if there is none."""
    if isinstance(error, OSError):
        return error.strerror or str(error).splitlines()[0]
    number = _error_number(error)
    return None if number is None else os.strerror(number)


def _error_number(error: Exception) -> int | None:
    """Return the operating system's number of an error, or None if it has none."""
    if isinstance(error, OSError):
        return error.errno
    # TensorStore raises a ValueError that has the error number only in its text.
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return int(match[1]) if match else None


def _refuse_unreadable(path: Path, error: Exception) -> None:
    """Raise an error if the system failed, so that an intact file is not taken for a damaged one.

    Raises:
      UsageError: one line with the reason and the remedy.
    """
    if (number := _error_number(error)) in _UNREADABLE:
        raise UsageError(
            f"{path}: it cannot be read now ({os.strerror(cast(int, number))}); nothing was changed, "
            "start again when it can be read"
        ) from error


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the content of meta.json.

    Raises:
      Damaged: the file is missing or fails its checksum.
      UsageError: the system cannot read it now.
    """
    try:
        file = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        intact = zlib.crc32(json.dumps(file["content"]).encode()) == file["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        _refuse_unreadable(folder / "meta.json", error)
        raise Damaged(f"{folder.name}/meta.json cannot be read") from None
    if not intact:
        raise Damaged(f"{folder.name}/meta.json fails its checksum")
    return file["content"]


def read(
    folder: Path, metadata: dict[str, Any], select: Callable[[str], bool] | None = None
) -> Arrays:
    """Read arrays and verify their checksums.

    Args:
      folder: folder that `write` wrote.
      metadata: result of `read_meta`.
      select: predicate of the names to read. By default all arrays are read, and the checksums of
        the files are verified as well.

    Returns:
      The arrays by name.

    Raises:
      Damaged: an array is missing, or differs from what was written.
      UsageError: the system cannot read it now, or JAX finds no device.
    """
    backend.check_devices()  # Orbax needs one, and its error would look like damage.
    leaves = {n: leaf for n, leaf in metadata["leaves"].items() if select is None or select(n)}
    nonempty = {n: leaf for n, leaf in leaves.items() if 0 not in leaf[1]}
    try:
        for file, checksum in metadata["files"].items():
            if select is None and zlib.crc32((folder / file).read_bytes()) != checksum:
                raise Damaged(f"{folder.name}/{file} fails its checksum")
        if (folder / _NPZ).exists():
            stored = np.load(folder / _NPZ)
            arrays = {n: stored[n] for n in nonempty}
        else:
            arrays = _read_with_orbax(folder, nonempty, partial=select is not None)
    except (Damaged, MemoryError):
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files.
        _refuse_unreadable(folder, error)
        raise Damaged(f"{folder.name} cannot be read") from None
    for name, leaf in leaves.items():
        dtype, shape, _ = leaf
        if 0 in shape:
            arrays[name] = np.empty(shape, dtype)
        if name not in arrays or _describe(arrays[name]) != leaf:
            raise Damaged(f"{name} in {folder.name} fails its checksum")
    return arrays


def _read_with_orbax(folder: Path, leaves: dict[str, Any], partial: bool) -> Arrays:
    with _quiet_checkpointer() as checkpointer:
        if not partial:
            return flatten(checkpointer.restore(folder))
        import orbax.checkpoint as ocp

        template = {n: np.zeros(shape, dtype) for n, (dtype, shape, _) in leaves.items()}
        args = ocp.args.PyTreeRestore(unflatten_dict(template, sep="/"), partial_restore=True)
        return flatten(checkpointer.restore(folder, args=args))


def _describe(array: np.ndarray) -> list[Any]:
    """Return dtype, shape and checksum of an array."""
    data = np.asarray(array, order="C").reshape(-1).view(np.uint8).data
    return [array.dtype.name, list(array.shape), zlib.crc32(data)]


def _write_arrays(folder: Path, arrays: Arrays) -> None:
    if jax.process_count() > 1:
        folder.mkdir()
        np.savez(folder / _NPZ, allow_pickle=False, **arrays)
        return
    with _quiet_checkpointer() as checkpointer:
        checkpointer.save(folder, unflatten_dict(arrays, sep="/"))


@contextlib.contextmanager
def _quiet_checkpointer() -> Iterator[Any]:
    """Yield an Orbax checkpointer, and suppress its log messages and warnings."""
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import orbax.checkpoint as ocp  # slow to import, and few commands need it

            handler = ocp.PyTreeCheckpointHandler(use_compression=False)
            with ocp.Checkpointer(handler) as checkpointer:
                yield checkpointer
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
