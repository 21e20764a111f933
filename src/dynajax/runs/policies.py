"""Policies of all learners, at each learner's best evaluation and at the last one.

::

    folder/
      000007-step-3500/  policies after the evaluation at step 3500: the files of Orbax, and meta.json
      partial/           files that are being written; ignored until they are renamed

The stored tree has the subtrees `best` and `last`. Each contains `step` (S,), `score` (S,), which is
the mean return of the evaluation, and `policy`, the result of `Agent.policy` with leaves (S, ...).
meta.json contains the sizes and bounds of the task, so that a policy can be used where the task
cannot be created. Checkpoints also contain the best policies, so that a resumed run continues with
exactly the same ones.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from dynajax.runs import serialization
from dynajax.runs.serialization import Arrays, Damaged
from dynajax.types import EnvSpec, ObsPart, UsageError

Which = Literal["best", "last"]

_FORMAT = 2
_PREFIX = "policies/"  # prefix of the array names in a checkpoint


class StoredPolicy(NamedTuple):
    """Policy of one learner."""

    spec: EnvSpec  # without the termination function
    step: int  # agent steps of training
    score: float  # mean return of the evaluation, NaN if it was not finite
    leaves: Arrays  # leaves of the policy by name


class Policies:
    """Save the policies of all learners of a run.

    Args:
      folder: folder of the policies, which need not exist.
      spec: specification of the task.
    """

    def __init__(self, folder: Path, spec: EnvSpec) -> None:
        self._folder = Path(folder).absolute()
        self._spec = spec._replace(termination=None)._asdict()
        self._best: Arrays = {}

    def add(self, step: int, policies: Any, scores: np.ndarray, write: bool = True) -> None:
        """Add the policies of an evaluation, and write each learner's best and last policy.

        Args:
          step: agent steps done so far.
          policies: tree with leaves (S, ...).
          scores: (S,) mean returns; a value that is not finite is worse than any other.
          write: whether to write files; False in processes that leave this to another one.

        Raises:
          UsageError: the disk is full or the folder cannot be written.
        """
        scores = np.where(np.isfinite(scores), scores, -np.inf)
        last = {
            "step": np.full(len(scores), step),
            "score": scores,
            **{
                f"policy/{name}": np.asarray(x)
                for name, x in serialization.flatten(policies).items()
            },
        }
        better = scores > self._best["score"] if self._best else np.ones(len(scores), bool)
        self._best = {
            name: np.where(
                better.reshape(-1, *[1] * (array.ndim - 1)), array, self._best.get(name, array)
            )
            for name, array in last.items()
        }
        if write:
            self._write(step, last)

    def _write(self, step: int, last: Arrays) -> None:
        arrays = {
            f"{which}/{name}": array
            for which, arrays in (("best", self._best), ("last", last))
            for name, array in arrays.items()
        }
        path = self._folder / f"{serialization.next_number(self._folder):06d}-step-{step}"
        metadata = {"format": _FORMAT, "task": self._spec}
        try:
            serialization.write(path, self._folder / "partial", arrays, metadata)
        except (OSError, ValueError) as error:
            reason = serialization.os_error_reason(error)
            if reason is None:
                raise
            raise UsageError(
                f"{self._folder}: cannot save the policies ({reason}); free some space or choose "
                "another --out, then start again to resume from the last checkpoint"
            ) from error
        finally:
            shutil.rmtree(self._folder / "partial", ignore_errors=True)
        for old in set(serialization.list_steps(self._folder)) - {path}:
            shutil.rmtree(old, ignore_errors=True)

    def checkpoint_arrays(self) -> Arrays:
        """Return the arrays that a checkpoint must contain to resume from here."""
        return {_PREFIX + name: array for name, array in self._best.items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore the result of `checkpoint_arrays`; other names are ignored."""
        self._best = {
            name.removeprefix(_PREFIX): array
            for name, array in arrays.items()
            if name.startswith(_PREFIX)
        }


def _newest(folder: Path) -> Path:
    """Return the newest policies' folder."""
    newest = next(reversed(serialization.list_steps(folder)), None)
    if newest is None:
        raise UsageError(
            f"{folder}: the run has no policies yet; they are written at each evaluation"
        )
    return newest.absolute()


def _read_newest(
    folder: Path, select: Callable[[str], bool] | None
) -> tuple[dict[str, Any], Arrays]:
    """Return the content of the newest policies' meta.json, and their arrays.

    Args:
      folder: folder of the policies.
      select: predicate of the names of the arrays; None reads none.
    """
    newest = _newest(folder)
    while True:
        try:
            metadata = serialization.read_meta(newest)
            if (found := metadata.get("format")) != _FORMAT:
                raise UsageError(
                    f"{newest}: the format of the policies is {found}, but must be {_FORMAT}"
                )
            arrays = {} if select is None else serialization.read(newest, metadata, select)
            return metadata, arrays
        except Damaged as error:
            # A run that is training deletes the policies once it has written newer ones.
            damaged, newest = newest, _newest(folder)
            if newest == damaged:
                raise UsageError(f"{newest}: damaged policies ({error})") from None


def _spec_from_json(fields: Mapping[str, Any]) -> EnvSpec:
    bounds = fields["bounds"] and tuple(tuple(bound) for bound in fields["bounds"])
    shape = fields.get("action_shape")
    parts = tuple(
        ObsPart(tuple(keys), tuple(shape), tuple(tuple(option) for option in options))
        for keys, shape, options in fields.get("obs_parts", ())
    )
    tuples = {
        "obs_names": tuple(fields["obs_names"]),
        "bounds": bounds,
        "action_shape": None if shape is None else tuple(shape),
        "obs_parts": parts,
    }
    return EnvSpec(**{**fields, **tuples})


def read_spec(folder: Path) -> EnvSpec:
    """Return the specification of the task, without its termination function.

    The packages of the task need not be installed.

    Raises:
      UsageError: see `read`.
    """
    return _spec_from_json(_read_newest(folder, None)[0]["task"])


def read(folder: Path, learner: int, which: Which = "best") -> StoredPolicy:
    """Read the policy of one learner from the folder of `Policies`.

    Args:
      folder: folder of the policies.
      learner: its index.
      which: "best" or "last".

    Raises:
      UsageError: there are no policies, or they cannot be read.
    """
    if which not in get_args(Which):
        raise UsageError(f"which={which}: choose one of {', '.join(get_args(Which))}")
    metadata, arrays = _read_newest(folder, lambda name: name.startswith(f"{which}/"))
    leaves = {name.removeprefix(f"{which}/"): array[learner] for name, array in arrays.items()}
    step, score = int(leaves.pop("step")), float(leaves.pop("score"))
    return StoredPolicy(
        _spec_from_json(metadata["task"]),
        step,
        score if math.isfinite(score) else math.nan,
        {name.removeprefix("policy/"): leaf for name, leaf in leaves.items()},
    )
