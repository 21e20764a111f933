"""Collect learning curves from run directories by task, and join runs that are seeds of one method."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dynajax.report.methods import method_changes
from dynajax.report.run import Run, label, model_free_label, read_run
from dynajax.types import UsageError

#: (frames (T,), returns (seeds, T)) of the evaluations of some seeds.
Evaluations = tuple[np.ndarray, np.ndarray]


class Curve(NamedTuple):
    """The seeds of one variant on one task."""

    task: str
    label: str
    run: Run  # the first, if several were joined
    frames: np.ndarray  # (T,) from the first to the last frame that every seed covers
    returns: np.ndarray  # (seeds, T), interpolated linearly by frames between a seed's evaluations
    seeds: tuple[int, ...]
    single: tuple[Evaluations, ...] = ()  # seeds, or parts of them, that are not in `returns`
    notes: tuple[str, ...] = ()

    @property
    def baseline(self) -> str:
        """The label of the curve that this one is compared with: the same agent, model-free."""
        return model_free_label(self.run)

    def at(self, frames: int) -> np.ndarray:
        """Return the finite returns (seeds,) at `frames`, interpolated between evaluations."""
        values = interpolate(self.frames, self.returns, np.array([frames]))[:, 0]
        return values[np.isfinite(values)]

    def until(self, frames: int) -> Evaluations:
        """Return the evaluations up to `frames`, the last of them interpolated if necessary.

        Seeds with a return that is not finite in one of them are left out.
        """
        grid = np.append(self.frames[self.frames < frames], frames)
        values = interpolate(self.frames, self.returns, grid)
        return grid, values[np.isfinite(values).all(1)]


#: Task -> label -> curve.
Tasks = dict[str, dict[str, Curve]]


class _Part(NamedTuple):
    """The seeds of one variant in one run directory."""

    run: Run
    variant: str

    @property
    def evaluations(self) -> Evaluations:
        return self.run.frames_of(self.variant), self.run.evals[self.variant]

    @property
    def end(self) -> int:
        """Frames of the last evaluation."""
        return int(self.run.frames_of(self.variant)[-1])

    def is_same_method(self, other: "_Part") -> bool:
        """Return whether both are of one method and have different seeds."""
        overlap = set(self.run.seeds) & set(other.run.seeds)
        return not overlap and not method_changes(self.run.config, other.run.config)


def interpolate(frames: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return values (seeds, X) at frames (X,), interpolated linearly between evaluations.

    Args:
      frames: (T,) of the evaluations, rising.
      values: (seeds, T).
      at: (X,).

    Returns:
      NaN before the first evaluation, after the last, and next to a value that is not finite.
    """
    after = np.minimum(np.searchsorted(frames, at), len(frames) - 1)
    before = np.where(frames[after] == at, after, np.maximum(after - 1, 0))
    step = np.where(after == before, 1, frames[after] - frames[before])
    share = (at - frames[before]) / step
    low, high = values[:, before], values[:, after]
    inside = (at >= frames[0]) & (at <= frames[-1])
    with np.errstate(invalid="ignore"):
        return np.where(inside, low + share * (high - low), np.nan)


def gather(folders: Sequence[Path]) -> Tasks:
    """Read the curves of run directories.

    Raises:
      UsageError: a folder is not a run directory, or its run has no evaluation yet.
    """
    runs = []
    for folder in dict.fromkeys(f.resolve() for f in folders):
        runs.append(read_run(folder))
        if not runs[-1].steps.size:
            raise UsageError(f"{folder}: the run has no evaluation yet")
    several_agents = len({run.config["agent_name"] for run in runs}) > 1
    tasks: dict[str, dict[str, list[_Part]]] = {}
    for run in runs:
        methods = tasks.setdefault(run.config["env"], {})
        for variant in run.evals:
            part = _Part(run, variant)
            methods.setdefault(_label(methods, part, several_agents), []).append(part)
    joined = {
        task: {name: _join(task, name, parts) for name, parts in methods.items()}
        for task, methods in tasks.items()
    }
    # Model-free runs, the baselines, come first; the others keep the order of the folders.
    return {
        task: dict(sorted(joined[task].items(), key=lambda item: _has_model(item[1])))
        for task in sorted(joined)
    }


def _has_model(curve: Curve) -> bool:
    return bool(curve.run.config["algo"] != "model-free")


def _label(methods: dict[str, list[_Part]], part: _Part, agent: bool) -> str:
    """Return the label of the method that a part belongs to, or a label that no method has.

    Args:
      methods: those of the part's task.
      agent: see `label`.
    """
    run, variant = part
    name = label(run, variant, agent=agent)
    if name not in methods:
        return name
    changed = method_changes(methods[name][0].run.config, run.config)
    suffixes = [(), *([changed] if 0 < len(changed) <= 2 else []), [run.folder.name]]
    for extra in suffixes:
        name = label(run, variant, agent=agent, extra=extra)
        if all(part.is_same_method(other) for other in methods.get(name, ())):
            return name
    return label(run, variant, agent=agent, extra=[str(run.folder)])


def _join(task: str, name: str, parts: Sequence[_Part]) -> Curve:
    """Join the seeds of one method on one task.

    Seeds that cover less than half of the frames of the longest one are left out. The others are
    joined over the frames that all of them cover. The rest is in `Curve.single`.
    """
    longest = max(part.end for part in parts)
    # A seed that ends before another one's first evaluation shares no frames with it.
    starts = [int(part.evaluations[0][0]) for part in parts if 2 * part.end >= longest]
    least = max(longest / 2, *starts)
    kept = [part for part in parts if part.end >= least]
    left_out = [part for part in parts if part.end < least]
    end = min(part.end for part in kept)
    grid = np.unique(np.concatenate([part.evaluations[0] for part in kept]))
    grid = grid[(grid >= max(starts)) & (grid <= end)]
    returns = np.concatenate([interpolate(*part.evaluations, grid) for part in kept])
    single = [part.evaluations for part in left_out]
    single += [_from(part.evaluations, end) for part in kept if part.end > end]
    notes = [
        f"{task}: {name}: {_seeds(part.run.seeds, 'covers', 'cover')} only {part.end:,} of "
        f"{longest:,} frames and {'is' if len(part.run.seeds) == 1 else 'are'} left out."
        for part in left_out
    ]
    if end < longest:
        short = [seed for part in kept if part.end == end for seed in part.run.seeds]
        notes.append(
            f"{task}: {name}: the mean ends at {end:,} of {longest:,} frames, where "
            f"{_seeds(short, 'ends', 'end')}."
        )
    seeds = tuple(seed for part in kept for seed in part.run.seeds)
    return Curve(task, name, kept[0].run, grid, returns, seeds, tuple(single), tuple(notes))


def _from(evaluations: Evaluations, frames: int) -> Evaluations:
    """Return the evaluations from `frames` on."""
    at, values = evaluations
    grid = np.append(frames, at[at > frames])
    return grid, interpolate(at, values, grid)


def _seeds(seeds: Sequence[int], verb: str, verb_of_several: str) -> str:
    """Return "seed 3 ends" or "seeds 3, 4 end"."""
    if len(seeds) == 1:
        return f"seed {seeds[0]} {verb}"
    return f"seeds {', '.join(map(str, seeds))} {verb_of_several}"
