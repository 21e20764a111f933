"""Trees of arrays as folders that Orbax opens by itself: whole or not there, and checked.

Orbax 0.12.8 leaves four things to do here:

- Of 25 bits flipped in the file of a tree's data it reads 24 as other numbers, in OCDBT with zarr 2
  or 3, compressed or not. So every leaf has a checksum.
- At the first failed request it closes its event loop, and each one still under way then prints a
  traceback (218 lines when 80 MB went to a disk of 60). So files have checksums too, compared
  before it reads them, and room on the disk is reserved before it writes.
- It refuses arrays without entries; those are in meta.json alone.
- With several processes each has its own checkpoints. `MultiprocessingOptions(active_processes)`
  makes Orbax wait for nobody, but still only process 0 writes numpy arrays, without an error in
  the others, and local arrays of JAX are refused. So there the tree is a plain `arrays.npz`.
"""

import contextlib
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
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

_PLAIN = "arrays.npz"
_NOISY = ("absl", "asyncio")

Arrays = dict[str, np.ndarray]


class Damaged(Exception):
    """A tree that cannot be trusted; its text says why in few words."""


def name(path: tuple[Any, ...]) -> str:
    """What a leaf is called, such as "learners/agent/actor/Dense_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves by name."""
    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def numbered(folder: Path, *others: Path) -> int:
    """A number above those that names in these folders begin with."""
    used = [path for f in (folder, *others) for path in f.glob("*-*")]
    return 1 + max((int(m[0]) for p in used if (m := re.match(r"\d+", p.name))), default=0)


def steps(folder: Path) -> dict[Path, int]:
    """The trees NUMBER-step-STEP of a folder with their steps, oldest first."""
    return {
        path: int(match[1])
        for path in sorted(folder.glob("*-step-*"))
        if (match := re.fullmatch(r"\d+-step-(\d+)", path.name))
    }


def write(path: Path, partial: Path, arrays: Arrays, content: dict[str, Any]) -> None:
    """Writes the folder `path`, which appears whole or not at all.

    Args:
      partial: where it is until then; what lies there is deleted.
      arrays: by name.
      content: what meta.json says beside dtypes, shapes and checksums.

    Raises:
      OSError, ValueError: see `fault`.
    """
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=partial) as room:
        # Orbax adds 350 bytes a leaf, and about twenty files.
        size = sum(array.nbytes + 1024 for array in arrays.values()) + 2**18
        os.posix_fallocate(room.fileno(), 0, size)
    folder = partial / path.name
    _write_arrays(folder, {name: array for name, array in arrays.items() if array.size})
    content = {
        "leaves": {name: _describe(array) for name, array in arrays.items()},
        "files": {
            str(file.relative_to(folder)): zlib.crc32(file.read_bytes())
            for file in folder.rglob("*")
            if file.is_file()
        },
        **content,
    }
    text = json.dumps(content)
    (folder / "meta.json").write_text(
        f'{{"crc32": {zlib.crc32(text.encode())}, "content":\n{text}}}\n', encoding="utf-8"
    )
    for inside in (*folder.rglob("*"), folder):
        _sync(inside)
    folder.rename(path)
    _sync(path.parent)


def fault(error: Exception) -> str | None:
    """What the operating system said in an error of `write`, in few words; None if it is not its
    fault."""
    if isinstance(error, OSError):
        return error.strerror or str(error).splitlines()[0]
    # TensorStore has the system's error number only in the text of a ValueError.
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(match[1])) if match else None


def read_meta(folder: Path) -> dict[str, Any]:
    """What meta.json says.

    Raises:
      Damaged: it cannot be read.
    """
    try:
        file = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        good = zlib.crc32(json.dumps(file["content"]).encode()) == file["crc32"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Damaged(f"{folder.name}/meta.json cannot be read") from None
    if not good:
        raise Damaged(f"{folder.name}/meta.json fails its checksum")
    return file["content"]


def read(
    folder: Path, content: dict[str, Any], wanted: Callable[[str], bool] | None = None
) -> Arrays:
    """The leaves by name, all of them checked.

    Args:
      content: what `read_meta` says.
      wanted: which leaves to read; all of them, and the files' checksums, by default.

    Raises:
      Damaged: one cannot be read, or is not what was written.
    """
    leaves = {n: leaf for n, leaf in content["leaves"].items() if wanted is None or wanted(n)}
    full = {n: leaf for n, leaf in leaves.items() if 0 not in leaf[1]}
    try:
        for file, checksum in content["files"].items():
            if wanted is None and zlib.crc32((folder / file).read_bytes()) != checksum:
                raise Damaged(f"{folder.name}/{file} fails its checksum")
        if (folder / _PLAIN).exists():
            stored = np.load(folder / _PLAIN)
            arrays = {n: stored[n] for n in full}
        else:
            arrays = _restore(folder, full, whole=wanted is None)
    except (Damaged, MemoryError):
        raise
    except Exception:  # Orbax and TensorStore raise whatever they like for a damaged file.
        raise Damaged(f"{folder.name} cannot be read") from None
    for leaf_name, leaf in leaves.items():
        dtype, shape, _ = leaf
        if 0 in shape:
            arrays[leaf_name] = np.empty(shape, dtype)
        if leaf_name not in arrays or _describe(arrays[leaf_name]) != leaf:
            raise Damaged(f"{leaf_name} in {folder.name} fails its checksum")
    return arrays


def _restore(folder: Path, leaves: dict[str, Any], whole: bool) -> Arrays:
    with _quiet() as checkpointer:
        if whole:
            return flatten(checkpointer.restore(folder))
        import orbax.checkpoint as ocp

        empty = {n: np.zeros(shape, dtype) for n, (dtype, shape, _) in leaves.items()}
        part = ocp.args.PyTreeRestore(unflatten_dict(empty, sep="/"), partial_restore=True)
        return flatten(checkpointer.restore(folder, args=part))


def _describe(array: np.ndarray) -> list[Any]:
    """Dtype, shape, and checksum."""
    data = np.asarray(array, order="C").reshape(-1).view(np.uint8).data
    return [array.dtype.name, list(array.shape), zlib.crc32(data)]


def _write_arrays(folder: Path, arrays: Arrays) -> None:
    if jax.process_count() > 1:
        folder.mkdir()
        np.savez(folder / _PLAIN, allow_pickle=False, **arrays)
        return
    with _quiet() as checkpointer:
        checkpointer.save(folder, unflatten_dict(arrays, sep="/"))


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Orbax's checkpointer, with its remarks kept from the terminal."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import orbax.checkpoint as ocp  # takes more than a second, and few commands need it

            handler = ocp.PyTreeCheckpointHandler(use_compression=False)
            with ocp.Checkpointer(handler) as checkpointer:
                yield checkpointer
    finally:
        for noisy, level in levels.items():
            logging.getLogger(noisy).setLevel(level)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
