"""Checkpoints of a run: atomic, verified by checksums, and readable with Orbax alone.

::

    folder/
      000007-step-3500/        one checkpoint: the files of Orbax, and meta.json
      replay/000007-3000-3500/ real transitions 3000 to 3499, in the same format
      partial/                 files that are being written; ignored until they are renamed

The training state can be read without dynajax, as nested dictionaries of numpy arrays::

    import orbax.checkpoint as ocp
    tree = ocp.PyTreeCheckpointer().restore("/absolute/folder/000007-step-3500")
    agent, model = tree["learners"]["agent"], tree["learners"]["model"]  # agent["actor"], leaves (S, ...)

A real transition never changes once it is in the replay buffer. The buffer is therefore stored in
pieces that several checkpoints share, and each checkpoint writes only the transitions since the
previous one. The first number of a folder name counts the saves. No number is used twice, so a
checkpoint never refers to a piece that an abandoned continuation of the run wrote.
"""

import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dynajax.runs import serialization
from dynajax.runs.serialization import Arrays, Damaged
from dynajax.runtime.sharding import host_shape, put, to_host
from dynajax.types import Array, TrainState, UsageError

_FORMAT = 6  # version of the checkpoint format
# Prefixes of leaf names.
_LEARNERS, _REAL_BUFFER, _HOST = "learners/", "learners/real_buffer/", "host/"


class Restored(NamedTuple):
    """Content of a checkpoint."""

    step: int
    state: TrainState
    host: Arrays
    meta: dict[str, Any]


class _Piece(NamedTuple):
    """Real transitions `start` to `stop - 1` of the run, stored in the folder `name`."""

    name: str
    start: int
    stop: int


class Checkpoints:
    """Save and restore the checkpoints of a run. Only `save` changes files.

    Args:
      folder: folder of the checkpoints, which need not exist.
      keep: number of checkpoints to keep, at least 1.
      num_learners: number of learners to store, by default all in the state. Further learners are
        padding, and are restored as copies of the last one.
    """

    def __init__(self, folder: Path, keep: int = 2, num_learners: int | None = None) -> None:
        self._folder = Path(folder).absolute()
        self._replay = self._folder / "replay"
        self._partial = self._folder / "partial"
        self._keep = keep
        self._num_learners = num_learners
        self._abandoned: set[Path] = set()
        # Checkpoints only refer to pieces that this object has written or verified.
        self._pieces: list[_Piece] = []

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint without verifying it, or None if there is none."""
        return next(reversed(serialization.list_steps(self._folder).values()), None)

    def save(
        self, step: int, state: TrainState, host: Mapping[str, np.ndarray], meta: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint to disk and delete the oldest ones beyond `keep`.

        Args:
          step: agent step of the checkpoint.
          state: training state of arrays; leaves of `state.learners.real_buffer` are (S, N, ...).
          host: arrays of any shape, which may be empty.
          meta: values that JSON can represent; tuples are restored as lists.

        Raises:
          UsageError: the disk is full or the folder cannot be written. Earlier checkpoints stay
            intact.
        """
        number = serialization.next_number(self._folder, self._replay)
        leaves = serialization.flatten(state)
        real = {n: leaf for n, leaf in leaves.items() if n.startswith(_REAL_BUFFER)}
        try:
            pieces = self._save_new_transitions(number, state, real)
            arrays = self._without_padding({n: x for n, x in leaves.items() if n not in real})
            arrays |= {_HOST + name: np.asarray(array) for name, array in host.items()}
            metadata = {"pieces": pieces, "layout": self._layout(state), "meta": dict(meta)}
            self._write(self._folder / f"{number:06d}-step-{step}", arrays, metadata)
            self._pieces = pieces
        except (OSError, ValueError) as error:
            self._raise_if_of_the_system(error)
            raise
        finally:
            self._prune()

    def _raise_if_of_the_system(self, error: Exception) -> None:
        """Raise a `UsageError` if the operating system refused to write."""
        if (reason := serialization.os_error_reason(error)) is not None:
            raise UsageError(
                f"{self._folder}: cannot save a checkpoint ({reason}); free some space or choose "
                "another --out, then start again to resume from the last checkpoint"
            ) from error

    def check_can_save(self, state: TrainState, host: Mapping[str, np.ndarray]) -> None:
        """Save and read back an initial state, so that a run that cannot be saved does not start.

        Each leaf is stored with its path and dtype but one element, so the size of a state does not
        matter. Nothing remains in the folder.

        Args:
          state: the training state.
          host: see `save`.

        Raises:
          UsageError: a leaf cannot be stored, or the folder cannot be written.
        """
        leaves = jax.tree_util.tree_leaves_with_path(state)
        stored: list[tuple[str, Any]] = [
            *((serialization.leaf_name(path), host_shape(leaf)) for path, leaf in leaves),
            *((_HOST + name, np.asarray(array)) for name, array in host.items()),
        ]
        arrays: Arrays = {}
        for name, leaf in stored:
            if name in arrays:
                raise UsageError(
                    f"the training state has two leaves with the path {name}, so it cannot be "
                    "saved; rename one of them"
                )
            arrays[name] = np.zeros([min(size, 1) for size in leaf.shape], leaf.dtype)
        try:
            self._write_and_read(arrays)
        except Exception as error:  # Orbax raises many kinds of errors for paths and dtypes
            self._raise_if_of_the_system(error)
            name = self._find_unsupported(list(arrays), arrays)
            raise UsageError(
                f"the training state has a leaf {name} of type {arrays[name].dtype}, which cannot "
                "be saved; use an array of bool, int32, uint32 or float32, or another name"
            ) from error
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _write_and_read(self, arrays: Arrays) -> None:
        """Write arrays below `partial`, and verify what is read back."""
        path = self._partial / "trial" / "state"
        self._write(path, arrays, {})
        serialization.read(path, serialization.read_meta(path))

    def _find_unsupported(self, names: list[str], arrays: Arrays) -> str:
        """Return one of the names, whose arrays together cannot be stored, that causes this."""
        while len(names) > 1:
            half = names[: len(names) // 2]
            try:
                self._write_and_read({name: arrays[name] for name in half})
                names = names[len(half) :]
            except Exception:
                names = half
        return names[0]

    def _save_new_transitions(
        self, number: int, state: TrainState, real: dict[str, Any]
    ) -> list[_Piece]:
        """Write the real transitions since the last checkpoint; return all pieces of the buffer."""
        count, capacity = int(state.shared.step), state.learners.real_buffer.valid.shape[1]
        pieces = self._pieces
        if pieces and pieces[-1].stop > count:
            pieces = []
        pieces = [piece for piece in pieces if piece.stop > count - capacity]
        start = pieces[-1].stop if pieces else max(0, count - capacity)
        if start == count:
            return pieces
        piece = _Piece(f"{number:06d}-{start}-{count}", start, count)
        transitions = _gather_slots(real, np.arange(start, count) % capacity)
        self._write(self._replay / piece.name, self._without_padding(transitions), {})
        return [*pieces, piece]

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, oldest first, without verifying them."""
        return list(serialization.list_steps(self._folder).values())

    def restore(self, template: TrainState, at_most: float = math.inf) -> Restored | None:
        """Return the newest intact checkpoint, or None if there is none.

        Damaged checkpoints are skipped with a warning, and the next save deletes them. The arrays
        of the restored state own their memory, so they can be donated.

        Args:
          template: state with the same configuration. Only its structure, shapes, dtypes and
            shardings are used.
          at_most: ignore checkpoints of later steps; the next save deletes them.

        Raises:
          UsageError: the newest checkpoint does not match `template`, or no checkpoint can be read.
        """
        damaged: list[str] = []
        checkpoints = serialization.list_steps(self._folder)
        for path, step in reversed(checkpoints.items()):
            if step > at_most:
                continue
            try:
                state, host, metadata = self._load(path, template)
            except Damaged as error:
                damaged.append(f"{path}: damaged checkpoint ({error})")
                continue
            for text in damaged:
                warnings.warn(f"{text}; resuming from step {step}", stacklevel=2)
            self._pieces = [_Piece(*piece) for piece in metadata["pieces"]]
            self._abandoned = {later for later in checkpoints if later > path}
            return Restored(step, state, host, metadata["meta"])
        if damaged:
            raise UsageError(
                f"{self._folder}: all checkpoints are damaged; choose another --out, or delete this "
                "folder to start a new run"
            )
        self._pieces, self._abandoned = [], set(checkpoints)
        return None

    def _without_padding(self, leaves: Mapping[str, Any]) -> Arrays:
        """Return leaves as numpy arrays, those of learners (S, ...) without the padding."""
        arrays = {name: to_host(leaf) for name, leaf in leaves.items()}
        return {
            name: array[: self._num_learners] if name.startswith(_LEARNERS) else array
            for name, array in arrays.items()
        }

    def _layout(self, state: TrainState) -> dict[str, tuple[str, list[int]]]:
        """Return dtype and shape of each leaf as stored, including the whole real buffer."""
        layout = {}
        for name, leaf in serialization.flatten(state).items():
            shape = list(leaf.shape)
            if name.startswith(_LEARNERS):
                shape[0] = self._num_learners or shape[0]
            # The dtype of typed PRNG keys names their implementation.
            layout[name] = str(leaf.dtype), shape
        return layout

    def _load(self, path: Path, template: TrainState) -> tuple[TrainState, Arrays, dict[str, Any]]:
        """Return the state, the host arrays and the metadata of a checkpoint."""
        metadata, layout = serialization.read_meta(path), self._layout(template)
        if (found := metadata.get("format")) != _FORMAT:
            raise UsageError(
                f"{path}: the checkpoint format is {found}, but must be {_FORMAT}; choose another "
                "--out"
            )
        _check_layout(path, metadata["layout"], layout)
        arrays = serialization.read(path, metadata)
        real = {
            name: np.zeros(shape, dtype)
            for name, (dtype, shape) in layout.items()
            if name.startswith(_REAL_BUFFER)
        }
        # Oldest piece first, because later transitions overwrite earlier ones in the buffer.
        for name, start, stop in metadata["pieces"]:
            piece = self._replay / name
            transitions = serialization.read(piece, serialization.read_meta(piece))
            slots = np.arange(start, stop) % template.learners.real_buffer.valid.shape[1]
            for leaf_name, leaf in real.items():
                leaf[:, slots] = transitions[leaf_name]
        leaves = arrays | real
        state = jax.tree_util.tree_map_with_path(
            lambda key, _: leaves[serialization.leaf_name(key)], template
        )
        host = {n.removeprefix(_HOST): a for n, a in arrays.items() if n.startswith(_HOST)}
        return put(state, template), host, metadata

    def _write(self, path: Path, arrays: Arrays, metadata: dict[str, Any]) -> None:
        serialization.write(path, self._partial, arrays, {"format": _FORMAT, **metadata})

    def _prune(self) -> None:
        """Delete everything that no restore needs. Failed deletions are retried at later saves."""
        shutil.rmtree(self._partial, ignore_errors=True)
        checkpoints = serialization.list_steps(self._folder)
        # This also runs after a failed save. No checkpoint was added then, so none of the previous
        # `keep` ones is deleted.
        kept = [path for path in checkpoints if path not in self._abandoned][-self._keep :]
        try:
            needed = {
                piece[0] for path in kept for piece in serialization.read_meta(path)["pieces"]
            }
        except (Damaged, KeyError):
            return
        # Delete checkpoints before their pieces: a checkpoint without its pieces looks damaged.
        for path in set(checkpoints) - set(kept):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._replay.glob("*"):
            if path.name not in needed:
                shutil.rmtree(path, ignore_errors=True)


def _check_layout(path: Path, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise a `UsageError` that names the first leaf whose dtype or shape differs."""
    for name in (*expected, *stored):
        there, here = (
            "{}{}".format(*layout[name]) if name in layout else "missing"
            for layout in (stored, expected)
        )
        if there != here:
            raise UsageError(
                f"{path}: the structure of the checkpoint differs from that of this run: {name} is "
                f"{there} in the checkpoint and {here} in the run; choose another --out"
            )


def _gather_slots(leaves: dict[str, Array], slots: np.ndarray) -> Mapping[str, Any]:
    """Return some slots of a replay buffer.

    They are gathered on the device, so that only these are copied to the host. A CPU shares its
    memory with numpy, and an operation of JAX would wait for a fit that was interrupted.
    """
    if all(device.platform == "cpu" for leaf in leaves.values() for device in leaf.devices()):
        return {name: np.asarray(leaf)[:, slots] for name, leaf in leaves.items()}
    return _gather_on_device(leaves, slots)


@jax.jit
def _gather_on_device(leaves: dict[str, Array], slots: Array) -> dict[str, Array]:
    return {name: leaf[:, slots] for name, leaf in leaves.items()}
