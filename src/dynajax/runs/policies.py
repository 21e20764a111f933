"""The policies of a run's rows, at each row's best evaluation and at the last one.

::

    folder/
      000007-step-3500/  what there was after the evaluation at step 3500: Orbax's files, meta.json
      partial/           what is being written; it counts for nothing until it is renamed

The tree has `best` and `last`, each with `step` (S,), `score` (S,), the evaluation's mean return, and
`policy`, what the agent acts by (`Agent.policy`), leaves (S, ...). meta.json has the task's sizes
and bounds, so a policy can be used where the task cannot be made. Which was best is in the
checkpoints too, so a run that goes on keeps it to the bit.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from dynajax.runs import serialization
from dynajax.runs.serialization import Arrays, Damaged
from dynajax.types import EnvSpec, UsageError

Which = Literal["best", "last"]

_FORMAT = 2
_PREFIX = "policies/"  # of what a checkpoint holds


class Stored(NamedTuple):
    """One row's policy as it was stored."""

    spec: EnvSpec  # without a termination
    step: int  # environment steps of training that it had
    score: float  # mean return of its evaluation
    leaves: Arrays  # of the policy, by name


class Policies:
    """The policies of all rows of one run in one folder.

    Args:
      folder: need not exist yet.
      spec: the task.
    """

    def __init__(self, folder: Path, spec: EnvSpec) -> None:
        self._folder = Path(folder).absolute()
        self._spec = spec._replace(termination=None)._asdict()
        self._best: Arrays = {}

    def add(self, step: int, policies: Any, scores: np.ndarray, write: bool = True) -> None:
        """Takes the policies of an evaluation, and writes the best and the last of each row.

        Args:
          step: environment steps done.
          policies: any tree with leaves (S, ...).
          scores: (S,) mean returns; one that is not a number is worse than any.
          write: False where another process of the run does.

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
                better.reshape(-1, *[1] * (new.ndim - 1)), new, self._best.get(name, new)
            )
            for name, new in last.items()
        }
        if write:
            self._write(step, last)

    def _write(self, step: int, last: Arrays) -> None:
        arrays = {
            f"{which}/{name}": array
            for which, arrays in (("best", self._best), ("last", last))
            for name, array in arrays.items()
        }
        path = self._folder / f"{serialization.numbered(self._folder):06d}-step-{step}"
        content = {"format": _FORMAT, "task": self._spec}
        try:
            serialization.write(path, self._folder / "partial", arrays, content)
        except (OSError, ValueError) as error:
            reason = serialization.fault(error)
            if reason is None:
                raise
            raise UsageError(
                f"{self._folder}: cannot save the policies ({reason}); free some space or choose "
                "another --out, then start again to go on from the last checkpoint"
            ) from error
        finally:
            shutil.rmtree(self._folder / "partial", ignore_errors=True)
        for old in set(serialization.steps(self._folder)) - {path}:
            shutil.rmtree(old, ignore_errors=True)

    def progress(self) -> Arrays:
        """All that it takes to go on from here."""
        return {_PREFIX + name: array for name, array in self._best.items()}

    def restore(self, progress: Mapping[str, np.ndarray]) -> None:
        """Goes back to an earlier `progress`; names of others' are passed over."""
        self._best = {
            name.removeprefix(_PREFIX): array
            for name, array in progress.items()
            if name.startswith(_PREFIX)
        }


def _newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest tree, and what its meta.json says."""
    newest = next(reversed(serialization.steps(folder)), None)
    if newest is None:
        raise UsageError(
            f"{folder}: the run has no policies; they are written from its first evaluation on"
        )
    try:
        content = serialization.read_meta(newest)
    except Damaged as damage:
        raise UsageError(f"{newest}: damaged policies ({damage})") from None
    if content.get("format") != _FORMAT:
        raise UsageError(f"{newest}: these policies are from another version of dynajax")
    return newest.absolute(), content


def _spec(plain: Mapping[str, Any]) -> EnvSpec:
    bounds = plain["bounds"] and tuple(tuple(bound) for bound in plain["bounds"])
    return EnvSpec(**{**plain, "obs_names": tuple(plain["obs_names"]), "bounds": bounds})


def task(folder: Path) -> EnvSpec:
    """What is known of the task without its packages, but for its termination.

    Raises:
      UsageError: see `read`.
    """
    return _spec(_newest(folder)[1]["task"])


def read(folder: Path, row: int, which: Which = "best") -> Stored:
    """A row's policy out of the folder of `Policies`.

    Raises:
      UsageError: there is none, or it cannot be read.
    """
    if which not in get_args(Which):
        raise UsageError(f"which={which}: choose one of {', '.join(get_args(Which))}")
    newest, content = _newest(folder)
    try:
        arrays = serialization.read(newest, content, lambda name: name.startswith(f"{which}/"))
    except Damaged as damage:
        raise UsageError(f"{newest}: damaged policies ({damage})") from None
    leaves = {name.removeprefix(f"{which}/"): x[row] for name, x in arrays.items()}
    score = float(leaves.pop("score"))
    return Stored(
        _spec(content["task"]),
        int(leaves.pop("step")),
        score if math.isfinite(score) else math.nan,
        {name.removeprefix("policy/"): x for name, x in leaves.items()},
    )
