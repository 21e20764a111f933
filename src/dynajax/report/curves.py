"""Learning curves of many runs, by task: those that differ in their seeds only are joined."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynajax import config
from dynajax.report.run import Run, label, model_free, read_run
from dynajax.types import UsageError

#: Differences between runs that do not make them different methods.
_SEEDS = ("seed", "seeds", "variants", "steps", "env", "host")


class Curve(NamedTuple):
    """All seeds of one variant on one task."""

    task: str
    label: str
    run: Run  # the first, if several were joined
    steps: np.ndarray  # (T,)
    returns: np.ndarray  # (seeds, T)
    seeds: tuple[int, ...]

    @property
    def frames(self) -> np.ndarray:
        """(T,) frames of the evaluations."""
        return self.steps * self.run.repeat

    @property
    def base(self) -> str:
        """The label of the curve that this one is measured by."""
        return model_free(self.run)

    def at(self, frames: int) -> np.ndarray:
        """Finite returns (seeds,) of the evaluation at `frames`."""
        values = self.returns[:, self.frames.tolist().index(frames)]
        return values[np.isfinite(values)]

    def until(self, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames (T,) of the evaluations up to `frames`, and returns (seeds, T) of the seeds that
        are finite in all of them."""
        kept = self.frames <= frames
        values = self.returns[:, kept]
        return self.frames[kept], values[np.isfinite(values).all(1)]


#: Task -> label -> curve.
Tasks = dict[str, dict[str, Curve]]


def gather(folders: Sequence[Path]) -> Tasks:
    """The curves of some runs' folders.

    Raises:
      UsageError: a folder that is no run's, or that has no evaluation yet.
    """
    tasks: Tasks = {}
    for folder in dict.fromkeys(f.resolve() for f in folders):
        run = read_run(folder)
        if not run.steps.size:
            raise UsageError(f"{folder}: the run has no evaluation yet")
        curves = tasks.setdefault(run.config["env"], {})
        for variant, returns in run.evals.items():
            new = Curve(run.config["env"], label(run, variant), run, run.steps, returns, run.seeds)
            _place(curves, new)
    # Agents without a model, the measure, come first; the others stay in the order of the folders.
    return {
        task: dict(sorted(tasks[task].items(), key=lambda item: _has_model(item[1])))
        for task in sorted(tasks)
    }


def _has_model(curve: Curve) -> bool:
    return bool(curve.run.config["algo"] != "model-free")


def _place(curves: dict[str, Curve], new: Curve) -> None:
    """Adds a curve: joined with one of the same method, else under a name that tells it apart."""
    old = curves.get(new.label)
    if old is None:
        curves[new.label] = new
        return
    changed = _changes(old.run.config, new.run.config)
    common = np.intersect1d(old.steps, new.steps)
    if not changed and common.size and not set(old.seeds) & set(new.seeds):
        parts = [c.returns[:, np.isin(c.steps, common)] for c in (old, new)]
        joined = old._replace(
            steps=common, returns=np.concatenate(parts), seeds=old.seeds + new.seeds
        )
        curves[new.label] = joined
        return
    suffix = ", ".join(changed)
    if not changed or len(changed) > 2 or new.label.endswith(")"):
        suffix = new.run.folder.name
    _place(curves, new._replace(label=f"{new.label} ({suffix})"))


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings of `new` that differ from `old`'s, as "learn.utd=1"."""
    parts = (line.split(": ", 1) for line in config.difference(old, new))
    return [
        f"{path}={change.rsplit(' -> ', 1)[1]}"
        for path, change in parts
        if path.split(".")[0] not in _SEEDS
    ]
