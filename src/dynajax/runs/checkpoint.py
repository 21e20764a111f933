"""Checkpoints of a run: trees that Orbax opens by itself, atomic, checked, cheap however long the run is.

::

    folder/
      000007-step-3500/        one checkpoint: Orbax's files, and meta.json beside them
      replay/000007-3000-3500/ real transitions 3000 to 3499, in the same form
      partial/                 what is being written; it counts for nothing until it is renamed

What training has learned comes back without dynajax, as dictionaries of numpy arrays by field name::

    import orbax.checkpoint as ocp
    tree = ocp.PyTreeCheckpointer().restore("/absolute/folder/000007-step-3500")
    agent, model = tree["learners"]["agent"], tree["learners"]["model"]  # agent["actor"], leaves (S, ...)

A real transition never changes once it is in the ring, so the real replay is a row of pieces that
later checkpoints share, and a checkpoint writes only the transitions since the one before. The
first number of a name counts the saves of the folder. No number is used twice, so no checkpoint
can refer to a piece that another, abandoned continuation of the run wrote.
"""

import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dynajax.runs import serialization
from dynajax.runs.serialization import Arrays, Damaged
from dynajax.runtime.sharding import put
from dynajax.types import Array, TrainState, UsageError

_FORMAT = 5  # of a checkpoint
_ROWS, _REAL, _HOST = "learners/", "learners/real_buffer/", "host/"  # how the names of leaves begin


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives."""

    step: int
    state: TrainState
    host: Arrays
    meta: dict[str, Any]


class _Piece(NamedTuple):
    """Real transitions `start` to `stop`, counted from the first of the run."""

    name: str
    start: int
    stop: int


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
        return next(reversed(serialization.steps(self._folder).values()), None)

    def save(
        self, step: int, state: TrainState, host: Mapping[str, np.ndarray], meta: Mapping[str, Any]
    ) -> None:
        """Writes a checkpoint, waits until it is on the disk, and drops those too many.

        Args:
          step: the environment step it belongs to.
          state: leaves are arrays; those of `state.learners.real_buffer` are (S, N, ...).
          host: arrays of any shape, also with no entries.
          meta: what JSON can hold; tuples come back as lists.

        Raises:
          UsageError: the disk is full or the folder cannot be written. The checkpoints from
            before are whole.
        """
        count, capacity = int(state.shared.step), state.learners.real_buffer.valid.shape[1]
        pieces = self._pieces
        if pieces and pieces[-1].stop > count:
            pieces = []
        pieces = [p for p in pieces if p.stop > count - capacity]
        start = pieces[-1].stop if pieces else max(0, count - capacity)
        number = serialization.numbered(self._folder, self._replay)
        leaves = serialization.flatten(state)
        real = {name: leaf for name, leaf in leaves.items() if name.startswith(_REAL)}
        try:
            if start < count:
                piece = _Piece(f"{number:06d}-{start}-{count}", start, count)
                block = _take(real, np.arange(start, count) % capacity)
                self._write(self._replay / piece.name, self._stored(block), {})
                pieces = [*pieces, piece]
            arrays = self._stored({n: leaf for n, leaf in leaves.items() if n not in real})
            arrays |= {_HOST + name: np.asarray(array) for name, array in host.items()}
            content = {"pieces": pieces, "layout": self._layout(state), "meta": dict(meta)}
            self._write(self._folder / f"{number:06d}-step-{step}", arrays, content)
            self._pieces = pieces
        except (OSError, ValueError) as error:
            reason = serialization.fault(error)
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
        return list(serialization.steps(self._folder).values())

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
        checkpoints = serialization.steps(self._folder)
        for path, step in reversed(checkpoints.items()):
            if step > at_most:
                continue
            try:
                state, host, content = self._load(path, template)
            except Damaged as damage:
                damages.append(f"{path}: damaged checkpoint ({damage})")
                continue
            for text in damages:
                warnings.warn(f"{text}; going on from step {step}", stacklevel=2)
            self._pieces = [_Piece(*piece) for piece in content["pieces"]]
            self._abandoned = {later for later in checkpoints if later > path}
            return Restored(step, state, host, content["meta"])
        if damages:
            raise UsageError(
                f"{self._folder}: no checkpoint in it can be read; choose another --out, or "
                "delete this folder to start anew"
            )
        self._pieces, self._abandoned = [], set(checkpoints)
        return None

    def _stored(self, leaves: Mapping[str, Any]) -> Arrays:
        """Leaves (S, ...) without the rows that are not stored; others as they are."""
        arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        return {n: a[: self._rows] if n.startswith(_ROWS) else a for n, a in arrays.items()}

    def _layout(self, state: TrainState) -> dict[str, tuple[str, list[int]]]:
        """Dtype and shape of each leaf as it is stored, the whole ring included."""
        layout = {}
        for name, leaf in serialization.flatten(state).items():
            shape = list(leaf.shape)
            if name.startswith(_ROWS):
                shape[0] = self._rows or shape[0]
            layout[name] = jnp.dtype(leaf.dtype).name, shape
        return layout

    def _load(self, path: Path, template: TrainState) -> tuple[TrainState, Arrays, dict[str, Any]]:
        """State, host's arrays, and what meta.json holds."""
        content, layout = serialization.read_meta(path), self._layout(template)
        if content.get("format") != _FORMAT:
            raise UsageError(
                f"{path}: this checkpoint is from another version of dynajax; choose another --out"
            )
        _check_layout(path, content["layout"], layout)
        arrays = serialization.read(path, content)
        ring = {
            name: np.zeros(shape, dtype)
            for name, (dtype, shape) in layout.items()
            if name.startswith(_REAL)
        }
        # Oldest first, so that what a later piece overwrote in the ring is overwritten here too.
        for piece, start, stop in content["pieces"]:
            block = serialization.read(
                self._replay / piece, serialization.read_meta(self._replay / piece)
            )
            slots = np.arange(start, stop) % template.learners.real_buffer.valid.shape[1]
            for name, leaf in ring.items():
                leaf[:, slots] = block[name]
        leaves = arrays | ring
        state = jax.tree_util.tree_map_with_path(
            lambda key, _: leaves[serialization.name(key)], template
        )
        host = {n.removeprefix(_HOST): a for n, a in arrays.items() if n.startswith(_HOST)}
        return put(state, template), host, content

    def _write(self, path: Path, arrays: Arrays, content: dict[str, Any]) -> None:
        serialization.write(path, self._partial, arrays, {"format": _FORMAT, **content})

    def _prune(self) -> None:
        """Deletes what no later restore can need. What cannot be deleted now waits for later."""
        shutil.rmtree(self._partial, ignore_errors=True)
        checkpoints = serialization.steps(self._folder)
        # A failed save has added nothing, so the ones before it must still be there.
        kept = [path for path in checkpoints if path not in self._abandoned][-self._keep :]
        try:
            needed = {
                piece[0] for path in kept for piece in serialization.read_meta(path)["pieces"]
            }
        except (Damaged, KeyError):
            return
        # Checkpoints go first: one without its pieces would be found damaged.
        for path in set(checkpoints) - set(kept):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._replay.glob("*"):
            if path.name not in needed:
                shutil.rmtree(path, ignore_errors=True)


def _check_layout(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in (*new, *old):
        there, here = (
            "{}{}".format(*layout[name]) if name in layout else "missing" for layout in (old, new)
        )
        if there != here:
            raise UsageError(
                f"{folder}: this checkpoint belongs to another configuration or version: "
                f"{name} is {there} there and {here} here; choose another --out"
            )


@jax.jit
def _take(leaves: dict[str, Array], slots: Array) -> dict[str, Array]:
    # On the device, so that only these slots travel to the host.
    return {name: leaf[:, slots] for name, leaf in leaves.items()}
