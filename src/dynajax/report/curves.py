"""Collect learning curves from run directories by task; join runs that differ only in seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynajax import config
from dynajax.report.run import Run, label, model_free_label, read_run
from dynajax.types import UsageError

#: Settings in which runs of one method may differ.
_IGNORED = ("seed", "seeds", "variants", "steps", "env", "host")


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
        return self.run.frames[np.isin(self.run.steps, self.steps)]

    @property
    def baseline(self) -> str:
        """The label of the curve that this one is compared with: the same agent, model-free."""
        return model_free_label(self.run)

    def at(self, frames: int) -> np.ndarray:
        """Return the finite returns (seeds,) of the evaluation at `frames`."""
        values = self.returns[:, self.frames.tolist().index(frames)]
        return values[np.isfinite(values)]

    def until(self, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the evaluations up to `frames`: their frames (T,) and returns (seeds, T).

        Seeds with a return that is not finite in one of them are left out.
        """
        kept = self.frames <= frames
        values = self.returns[:, kept]
        return self.frames[kept], values[np.isfinite(values).all(1)]


#: Task -> label -> curve.
Tasks = dict[str, dict[str, Curve]]


def gather(folders: Sequence[Path]) -> Tasks:
    """Read the curves of run directories.

    Raises:
      UsageError: a folder is not a run directory, or its run has no evaluation yet.
    """
    tasks: Tasks = {}
    for folder in dict.fromkeys(f.resolve() for f in folders):
        run = read_run(folder)
        if not run.steps.size:
            raise UsageError(f"{folder}: the run has no evaluation yet")
        curves = tasks.setdefault(run.config["env"], {})
        for variant, returns in run.evals.items():
            new = Curve(run.config["env"], label(run, variant), run, run.steps, returns, run.seeds)
            _add(curves, new)
    # Model-free runs, the baselines, come first; the others keep the order of the folders.
    return {
        task: dict(sorted(tasks[task].items(), key=lambda item: _has_model(item[1])))
        for task in sorted(tasks)
    }


def _has_model(curve: Curve) -> bool:
    return bool(curve.run.config["algo"] != "model-free")


def _add(curves: dict[str, Curve], new: Curve) -> None:
    """Join a curve with one of the same method, or add it under a distinct label."""
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
    has_suffix = new.label.endswith(")") and not new.label.endswith("(model-free)")
    if not changed or len(changed) > 2 or has_suffix:
        suffix = new.run.folder.name
    _add(curves, new._replace(label=_with_suffix(new.label, suffix)))


def _with_suffix(label: str, suffix: str) -> str:
    """Return "MBPO scale (SUFFIX)" or "SAC (model-free, SUFFIX)"."""
    if label.endswith(" (model-free)"):
        return f"{label.removesuffix(')')}, {suffix})"
    return f"{label} ({suffix})"


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the settings of `new` that differ from those of `old`, as "learn.utd=1"."""
    parts = (line.split(": ", 1) for line in config.difference(old, new))
    return [
        f"{path}={change.rsplit(' -> ', 1)[1]}"
        for path, change in parts
        if path.split(".")[0] not in _IGNORED
    ]
