"""Checkpoints of a run: atomic, checked by checksums, and cheap however long the run is.

::

    folder/
      000007-step-3500/        one checkpoint: meta.json, and arrays/ written by Orbax
      replay/000007-3000-3500/ real transitions 3000 to 3499, in the same form
      partial/                 what is being written; it counts for nothing until it is renamed

A real transition never changes once it is in the ring, so the real replay is a row of pieces that
later checkpoints share, and a checkpoint writes only the transitions since the one before. The
first number of a name counts the saves of the folder. No number is used twice, so no checkpoint
can refer to a piece that another, abandoned continuation of the run wrote.
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynajax.runtime.placement import put
from dynajax.types import Array, Replay, TrainState, UsageError

_HOST = "host:"  # sets the host's arrays apart from the state's, whose paths begin with a dot
_PLAIN = "plain"  # the file of an array of bytes that Orbax did not write
_NOISY = ("absl", "asyncio")


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives."""

    step: int
    state: TrainState
    host: dict[str, np.ndarray]
    meta: dict[str, Any]


class _Piece(NamedTuple):
    """Real transitions `start` to `stop`, counted from the first of the run."""

    name: str
    start: int
    stop: int


class _Damaged(Exception):
    """A checkpoint or a piece that cannot be trusted; its text says why in few words."""


class Checkpoints:
    """The checkpoints of one run in one folder. Only `save` changes anything on the disk.

    Args:
      folder: need not exist yet.
      keep: how many checkpoints stay, from 1.
      rows: how many rows of a state are stored, all by default. Further ones are copies of the
        last, and come back as such.
    """

    def __init__(self, folder: Path, keep: int = 2, rows: int | None = None) -> None:
        self._folder = Path(folder).absolute()
        self._replay = self._folder / "replay"
        self._partial = self._folder / "partial"
        self._keep = keep
        self._rows = rows
        self._abandoned: set[Path] = set()
        # Only pieces that this object has written or verified are ever built upon.
        self._pieces: list[_Piece] = []

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, which is not checked; None if there is none."""
        found = self._checkpoints()
        return _step(found[-1]) if found else None

    def save(
        self, step: int, state: TrainState, host: Mapping[str, np.ndarray], meta: Mapping[str, Any]
    ) -> None:
        """Writes a checkpoint, waits until it is on the disk, and drops those too many.

        Args:
          step: the environment step it belongs to.
          state: leaves are arrays; those of `state.rows.real` are (S, N, ...).
          host: arrays of any shape, also with no entries.
          meta: what JSON can hold; tuples come back as lists.

        Raises:
          UsageError: the disk is full or the folder cannot be written. The checkpoints from
            before are whole.
        """
        count, capacity = int(state.shared.step), state.rows.real.valid.shape[1]
        pieces = self._pieces
        if pieces and pieces[-1].stop > count:
            pieces = []
        pieces = [p for p in pieces if p.stop > count - capacity]
        start = pieces[-1].stop if pieces else max(0, count - capacity)
        number = self._next_number()
        try:
            if start < count:
                new = _Piece(f"{number:06d}-{start}-{count}", start, count)
                slots = np.arange(start, count) % capacity
                block = self._stored(_take(state.rows.real, slots))
                self._write(self._replay / new.name, _flatten(block), {})
                pieces = [*pieces, new]
            rest = _without_real(state)
            arrays = _flatten(rest._replace(rows=self._stored(rest.rows)))
            arrays |= {_HOST + name: array for name, array in host.items()}
            record = {"pieces": pieces, "layout": self._layout(state), "meta": dict(meta)}
            self._write(self._folder / f"{number:06d}-step-{step}", arrays, record)
            self._pieces = pieces
        except (OSError, ValueError) as error:
            reason = _disk_fault(error)
            if reason is None:
                raise
            raise UsageError(
                f"{self._folder}: cannot save a checkpoint ({reason}); free some space or choose "
                "another --out, then start again to go on from the last one"
            ) from error
        finally:
            self._prune()

    def steps(self) -> list[int]:
        """The steps of all checkpoints, oldest first, which are not checked."""
        return [step for p in self._checkpoints() if (step := _step(p)) is not None]

    def restore(self, template: TrainState, at_most: float = math.inf) -> Restored | None:
        """The newest checkpoint that is whole, or None if there is none.

        A damaged checkpoint is passed over with a warning, and the next save deletes it.

        Args:
          template: a state of the same configuration; only its structure, shapes, dtypes and
            shardings are read. The arrays of the restored state own their memory, so they can
            be donated.
          at_most: no checkpoint of a later step is taken; the next save deletes those.

        Raises:
          UsageError: the newest checkpoint does not fit `template`, or none can be read.
        """
        damages: list[str] = []
        found = self._checkpoints()
        for path in reversed(found):
            if (_step(path) or 0) > at_most:
                continue
            try:
                restored, pieces = self._load(path, template)
            except _Damaged as damage:
                damages.append(f"{path}: damaged checkpoint ({damage})")
                continue
            for text in damages:
                warnings.warn(f"{text}; going on from step {restored.step}", stacklevel=2)
            self._pieces = pieces
            self._abandoned = set(found[found.index(path) + 1 :])
            return restored
        if damages:
            raise UsageError(
                f"{self._folder}: no checkpoint in it can be read; choose another --out, or "
                "delete this folder to start anew"
            )
        self._pieces, self._abandoned = [], set(found)
        return None

    def _stored(self, rows: Any) -> Any:
        """Leaves (S, ...) without the rows that are not stored."""
        there = self._rows
        return jax.tree.map(
            lambda x: x if there in (None, x.shape[0]) else np.asarray(x)[:there], rows
        )

    def _layout(self, state: TrainState) -> dict[str, str]:
        def kind(leaf: Any, *shape: int) -> str:
            return f"{jnp.dtype(leaf.dtype).name}{list(shape)}"

        shared = jax.tree.map(lambda x: kind(x, *x.shape), state.shared)
        rows = jax.tree.map(lambda x: kind(x, self._rows or x.shape[0], *x.shape[1:]), state.rows)
        return _flatten(TrainState(shared, rows))

    def _checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted(p for p in self._folder.glob("*-step-*") if _step(p) is not None)

    def _next_number(self) -> int:
        used = [*self._folder.glob("*-*"), *self._replay.glob("*-*")]
        return 1 + max((int(m[0]) for p in used if (m := re.match(r"\d+", p.name))), default=0)

    def _load(self, path: Path, template: TrainState) -> tuple[Restored, list[_Piece]]:
        content = _read_meta(path)
        try:
            layout, meta = content["layout"], content["meta"]
            pieces = [_Piece(*piece) for piece in content["pieces"]]
        except (KeyError, TypeError):
            raise UsageError(
                f"{path}: this checkpoint is from another version of dynajax; choose another --out"
            ) from None
        _check_layout(path, layout, self._layout(template))
        arrays = _read_arrays(path, content)

        # Oldest first, so that what a later piece overwrote in the ring is overwritten here too.
        replay = jax.tree.map(
            lambda leaf: np.zeros((self._rows or leaf.shape[0], *leaf.shape[1:]), leaf.dtype),
            template.rows.real,
        )
        capacity = replay.valid.shape[1]
        for piece in pieces:
            new = _read_arrays(folder := self._replay / piece.name, _read_meta(folder))
            slots = np.arange(piece.start, piece.stop) % capacity
            for leaf_path, leaf in _flatten(replay).items():
                leaf[:, slots] = new[leaf_path]

        state = jax.tree_util.tree_map_with_path(
            lambda key_path, leaf: arrays[jax.tree_util.keystr(key_path)], _without_real(template)
        )
        state = state._replace(rows=state.rows._replace(real=replay))
        host = {n.removeprefix(_HOST): a for n, a in arrays.items() if n.startswith(_HOST)}
        step = _step(path)
        assert step is not None
        return Restored(step, put(state, template), host, meta), pieces

    def _write(self, path: Path, arrays: Mapping[str, Any], content: dict[str, Any]) -> None:
        """Writes `path`, which appears whole or not at all.

        The arrays go to Orbax as one array of bytes: one file instead of hundreds, and Orbax's
        trouble with scalars and arrays without entries never comes up.
        """
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        path.parent.mkdir(exist_ok=True)
        data = np.empty(sum(array.nbytes for array in arrays.values()), np.uint8)
        leaves, end = {}, 0
        for name, array in arrays.items():
            start, end = end, end + array.nbytes
            data[start:end] = np.asarray(array, order="C").reshape(-1).view(np.uint8)
            leaves[name] = [array.dtype.name, list(array.shape), zlib.crc32(data[start:end].data)]
        _write_bytes(self._partial / "arrays", data)
        text = json.dumps(content | {"leaves": leaves})
        (self._partial / "meta.json").write_text(
            f'{{"crc32": {zlib.crc32(text.encode())}, "content":\n{text}}}\n', encoding="utf-8"
        )
        for inside in (*self._partial.rglob("*"), self._partial):
            _sync(inside)
        self._partial.rename(path)
        _sync(path.parent)

    def _prune(self) -> None:
        """Deletes what no later restore can need. What cannot be deleted now waits for later."""
        shutil.rmtree(self._partial, ignore_errors=True)
        found = self._checkpoints()
        # A failed save has added nothing, so the ones before it must still be there.
        line = [path for path in found if path not in self._abandoned]
        kept = line[-self._keep :]
        try:
            needed = {piece[0] for path in kept for piece in _read_meta(path)["pieces"]}
        except (_Damaged, KeyError):
            return
        # Checkpoints go first: one without its pieces would be found damaged.
        for path in set(found) - set(kept):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._replay.glob("*"):
            if path.name not in needed:
                shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"\d+-step-(\d+)", path.name)
    return int(match[1]) if match else None


def _without_real(state: TrainState) -> TrainState:
    rows: Any = state.rows
    return state._replace(rows=rows._replace(real=None))


def _flatten(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def _check_layout(folder: Path, old: dict[str, str], new: dict[str, str]) -> None:
    for path in (*new, *old):
        there, here = old.get(path, "missing"), new.get(path, "missing")
        if there != here:
            raise UsageError(
                f"{folder}: this checkpoint belongs to another configuration or version: "
                f"{path} is {there} there and {here} here; choose another --out"
            )


@jax.jit
def _take(replay: Replay, slots: Array) -> Replay:
    # On the device, so that only these slots travel to the host.
    return jax.tree.map(lambda leaf: leaf[:, slots], replay)


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        file = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        good = zlib.crc32(json.dumps(file["content"]).encode()) == file["crc32"]
    except (OSError, ValueError, KeyError, TypeError):
        raise _Damaged(f"{folder.name}/meta.json cannot be read") from None
    if not good:
        raise _Damaged(f"{folder.name}/meta.json fails its checksum")
    return file["content"]


def _read_arrays(folder: Path, content: dict[str, Any]) -> dict[str, np.ndarray]:
    try:
        data = _read_bytes(folder / "arrays")
    except MemoryError:
        raise
    except Exception:  # Orbax and TensorStore raise whatever they like for a damaged file.
        raise _Damaged(f"{folder.name}/arrays cannot be read") from None
    arrays, end = {}, 0
    for name, (kind, shape, checksum) in content["leaves"].items():
        dtype = jnp.dtype(kind)
        start, end = end, end + dtype.itemsize * int(np.prod(shape))
        if len(data) < end or zlib.crc32(data[start:end].data) != checksum:
            raise _Damaged(f"{folder.name}/arrays fails its checksum")
        arrays[name] = data[start:end].view(dtype).reshape(shape).copy()
    return arrays


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Orbax's checkpointer, with its remarks kept from the terminal."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import orbax.checkpoint as ocp  # takes more than a second, and few commands need it

            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
            with ocp.Checkpointer(handler) as checkpointer:
                yield checkpointer
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _write_bytes(path: Path, data: np.ndarray) -> None:
    if jax.process_count() > 1:
        # Orbax saves what all processes have in common: it waits for them at every save and
        # restore, and lets none but the first write numpy's arrays. These are of this one alone.
        path.mkdir()
        with open(path / _PLAIN, "wb") as file:
            file.write(data.data)
        return
    with _quiet() as checkpointer:
        import orbax.checkpoint as ocp

        checkpointer.save(path, args=ocp.args.PyTreeSave({"bytes": data}))


def _read_bytes(path: Path) -> np.ndarray:
    if (path / _PLAIN).exists():
        return np.fromfile(path / _PLAIN, np.uint8)
    with _quiet() as checkpointer:
        import orbax.checkpoint as ocp

        as_numpy = {"bytes": ocp.RestoreArgs(restore_type=np.ndarray)}
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        return checkpointer.restore(path, args=args)["bytes"]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_fault(error: Exception) -> str | None:
    """What the operating system said, in few words; None if it is not its fault."""
    if isinstance(error, OSError):
        return error.strerror or str(error).splitlines()[0]
    # TensorStore has the system's error number only in the text of a ValueError.
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(match[1])) if match else None
