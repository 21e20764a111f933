"""Read a run directory: the configuration, and what the run has logged so far."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynajax.algorithms import ALGORITHMS, Algorithm
from dynajax.config import GROUPS
from dynajax.runs.directory import reading_config
from dynajax.types import UsageError

#: Display names of the agents of this package; another agent keeps its registered name.
_AGENT_NAMES = {"sac": "SAC", "simba": "SimBa", "bro": "BRO"}
#: What reports need of a configuration, and its types.
_NEEDED = {
    "agent_name": str,
    "algo": str,
    "env": str,
    "preset": str,
    "steps": int,
    "task": dict,
    "trust_name": str,
    "variants": list,
}


#: The lowest and the highest return of an episode in most tasks of dm_control: the sum of 1,000
#: rewards from 0 to 1.
DM_CONTROL_RETURNS = (0.0, 1000.0)


class Run(NamedTuple):
    """The contents of a run directory."""

    folder: Path
    info: dict[str, Any]  # config.json
    steps: np.ndarray  # (T,) agent steps of the evaluations
    evals: dict[str, np.ndarray]  # variant -> return_mean (seeds, T), in the config's order
    seeds: tuple[int, ...]
    metrics: dict[str, list[dict[str, Any]]]  # "learn", "fit", "time", "diagnosis" -> lines
    counts: dict[str, np.ndarray]  # variant -> frames (seeds, T) of each learner

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, as in config.json."""
        config: dict[str, Any] = self.info["config"]
        return config

    @property
    def repeat(self) -> int:
        """Frames per agent step; the last step of an episode can have fewer."""
        return int(self.config["task"]["repeat"])

    @property
    def frames(self) -> np.ndarray:
        """(T,) frames (simulator steps) of the evaluations, mean over the learners."""
        return self.frames_of(*self.counts)

    def frames_of(self, *variants: str) -> np.ndarray:
        """Return the frames (T,) of the evaluations, mean over the seeds of some variants."""
        counts = [self.counts[v] for v in variants]
        means = np.concatenate(counts).mean(0) if counts else np.zeros(len(self.steps))
        return np.rint(means).astype(int)

    def frames_at(self, name: str, steps: np.ndarray) -> np.ndarray:
        """Return the frames (T,) at agent steps (T,) of a curve, see `interpolate_frames`.

        Args:
          name: a `curve_label`.
          steps: of lines in metrics.jsonl, such as those of fits.
        """
        by_label = {curve_label(self, v): v for v in self.counts}
        frames = self.frames_of(by_label[name]) if name in by_label else self.frames
        return interpolate_frames(self.steps, frames, steps, self.repeat)


def interpolate_frames(
    counted: np.ndarray, frames: np.ndarray, steps: np.ndarray, repeat: int
) -> np.ndarray:
    """Return the frames (X,) at agent steps (X,), linear between counts and after the last.

    Args:
      counted: (T,) agent steps with a count, rising.
      frames: (T,) the counts.
      steps: (X,).
      repeat: frames per step, if nothing was counted yet.
    """
    counted, frames = np.append(0, counted), np.append(0, frames)
    last = counted[-1]
    rate = frames[-1] / last if last else repeat
    inside = np.interp(steps, counted, frames)
    return np.where(steps > last, frames[-1] + rate * (steps - last), inside)


def read_run(folder: str | Path) -> Run:
    """Read a run that is finished, still running, or was killed while it wrote a line.

    A line counts once its newline is written, and an evaluation once every learner that has been
    logged has it. If a step was logged twice, the later line counts.

    Raises:
      UsageError: the folder does not exist or is not a run directory, or a file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder")
    with reading_config(folder):
        info = json.loads((folder / "config.json").read_text())
        config = info["config"]
        if not all(name in config for name in _NEEDED):
            raise UsageError(
                f"{folder}: config.json was written by an older version of dynajax; "
                "read the run with that version"
            )
        variants, repeat = config["variants"], int(config["task"]["repeat"])
        if not (
            all(isinstance(config[name], kind) for name, kind in _NEEDED.items())
            and all(isinstance(variant, str) for variant in variants)
            and all(isinstance(config.get(group) or {}, dict) for group in GROUPS)
        ):
            raise TypeError("a field has the wrong type")
    steps, evals, seeds, counts = _read_evaluations(folder / "eval.csv", variants, repeat)
    return Run(folder, info, steps, evals, seeds, _read_metrics(folder / "metrics.jsonl"), counts)


def _read_evaluations(
    path: Path, variants: list[str], repeat: int
) -> tuple[np.ndarray, dict[str, np.ndarray], tuple[int, ...], dict[str, np.ndarray]]:
    """Return the fields `steps`, `evals`, `seeds` and `counts` of `Run`."""
    returns: dict[tuple[str, int], dict[int, float]] = {}
    frames: dict[tuple[str, int], dict[int, int]] = {}
    for line in csv.DictReader(text for _, text in _lines(path)):
        try:
            learner, step = (line["variant"], int(line["seed"])), int(line["step"])
            returns.setdefault(learner, {})[step] = float(line["return_mean"] or "nan")
            # The logs of early versions have no frames.
            frames.setdefault(learner, {})[step] = int(line.get("frames") or repeat * step)
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path}: a line is damaged: {line}") from None
    steps = sorted(set.intersection(*map(set, returns.values())) if returns else ())
    seeds = sorted({seed for _, seed in returns})
    logged = {variant for variant, _ in returns}
    evals, counts = (
        {
            v: np.array([[values[v, s][t] for t in steps] for s in seeds if (v, s) in returns])
            for v in [*(v for v in variants if v in logged), *sorted(logged - set(variants))]
        }
        for values in (returns, frames)
    )
    return np.array(steps, int), evals, tuple(seeds), counts


def _read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    metrics: dict[str, list[dict[str, Any]]] = {"learn": [], "fit": [], "time": []}
    for number, text in _lines(path):
        try:
            entry = json.loads(text)
            metrics.setdefault(entry["kind"], []).append(entry)
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"{path}, line {number}: damaged, it is not one JSON object with a kind"
            ) from None
    return metrics


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines of a file that may be missing, without an incomplete last line."""
    if not path.exists():
        return
    complete = path.read_text(errors="replace").rpartition("\n")[0]
    yield from ((n, text) for n, text in enumerate(complete.split("\n"), 1) if text)


#: Domains of the DeepMind Control Suite, whose import would take longer than most reports.
_DOMAINS = {
    *("acrobot", "ball_in_cup", "cartpole", "cheetah", "dog", "finger", "fish", "hopper"),
    *("humanoid", "humanoid_CMU", "lqr", "manipulator", "pendulum", "point_mass", "quadruped"),
    *("reacher", "stacker", "swimmer", "walker"),
}


def is_dm_control(task: str) -> bool:
    """Return whether a task is one of the DeepMind Control Suite."""
    return task.partition("-")[0] in _DOMAINS


def return_bounds(task: str) -> tuple[float, float]:
    """Return the lowest and the highest possible return, infinite where they are not known."""
    # The costs of lqr are not limited.
    known = is_dm_control(task) and not task.startswith("lqr-")
    return DM_CONTROL_RETURNS if known else (-np.inf, np.inf)


def series(run: Run, kind: str, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return a metric over training, by the label of the variant's curve.

    Args:
      kind: of the lines, "learn", "fit" or "diagnosis".
      name: of the metric.

    Returns:
      (steps (T,), values (seeds, T)) by `curve_label`. Values that are null or missing are NaN,
      and a variant without any value is left out.
    """
    points: dict[str, dict[tuple[int, int], float]] = {}
    for line in run.metrics.get(kind, []):
        value = line.get(name)
        if value is not None:
            points.setdefault(line["variant"], {})[line["seed"], line["step"]] = float(value)
    curves = {}
    for variant in [v for v in run.config["variants"] if v in points]:
        at = points[variant]
        seeds, steps = (sorted(set(axis)) for axis in zip(*at, strict=True))
        values = np.array([[at.get((s, t), np.nan) for t in steps] for s in seeds])
        curves[curve_label(run, variant)] = (np.array(steps), values)
    return curves


def last_state_r2(run: Run) -> dict[str, np.ndarray]:
    """Return R² (seeds, D) of each state dimension on the holdout of the last fit.

    The keys are those of `series`. A dimension that did not vary is NaN, and a variant without
    the metric is left out.
    """
    newest: dict[str, dict[int, list[float | None]]] = {}
    for line in run.metrics["fit"]:
        if line.get("r2_state_dims"):
            newest.setdefault(line["variant"], {})[line["seed"]] = line["r2_state_dims"]
    return {
        curve_label(run, v): np.array([newest[v][s] for s in sorted(newest[v])], float)
        for v in run.config["variants"]
        if v in newest
    }


def label(
    run: Run, variant: str, *, agent: bool = False, extra: Sequence[str] = (), bare: bool = False
) -> str:
    """Return the name of a variant in comparisons of runs.

    A run is named after the algorithm whose settings it has, or after the one from which it differs
    in the fewest settings; those that differ are listed. Examples: "SimBa (model-free)", "MBPO",
    "MBPO + scale, target", "dynajax (real_fraction=0.9)", "MBPO + scale + trust m2ac".

    Args:
      agent: name the agent of a run with a model, to tell it from the same run of another agent.
      extra: what else distinguishes the run, such as "learn.utd=1".
      bare: leave out what distinguishes the variant: its fixes and values.
    """
    config, (fixes, *values) = run.config, variant.split(";")
    if config["algo"] == "model-free":
        base = model_free_label(run)
        own = [*([fixes] if fixes != "none" else []), *values]
        details = [*([] if bare else own), *extra]
        return f"{base.removesuffix(')')}, {', '.join(details)})" if details else base
    row, changed = _closest_algorithm(config)
    words = [row.title]
    if not bare and fixes != (row.fix or "none"):
        words.append("no fix" if fixes == "none" else fixes.replace(",", ", "))
    if config["trust_name"] != row.trust:
        words.append(f"trust {config['trust_name']}")
    if (oracle := config.get("oracle", "none")) != "none":
        words.append(f"oracle {oracle}")
    if len(changed) > 2:
        changed = [f"{len(changed)} settings of the algorithm changed"]
    name = config["agent_name"]
    details = [
        *([_AGENT_NAMES.get(name, name)] if agent else []),
        *changed,
        *([] if bare else values),
        *extra,
    ]
    return " + ".join(words) + (f" ({', '.join(details)})" if details else "")


def _closest_algorithm(config: Mapping[str, Any]) -> tuple[Algorithm, list[str]]:
    """Return the algorithm with the fewest settings that differ, and these, as "NAME=VALUE".

    Runs of older versions combined today's settings under another name.
    """
    rows = {name: row for name, row in ALGORITHMS.items() if name != "model-free"}
    # `min` returns the first of equals: the algorithm that the run was started with.
    names = [config["algo"], *(name for name in rows if name != config["algo"])]
    found = [(rows[name], _changed_settings(config, rows[name])) for name in names if name in rows]
    if not found:
        return Algorithm(str(config["algo"]), "", {}, config["trust_name"]), []
    row, changed = min(
        found, key=lambda item: len(item[1]) + (item[0].trust != config["trust_name"])
    )
    return row, changed


def _changed_settings(config: Mapping[str, Any], row: Algorithm) -> list[str]:
    """Return the settings of an algorithm that a configuration has, but with another value."""
    changed = []
    for path, value in row.settings.items():
        group, name = path.split(".")
        wanted = list(value) if isinstance(value, tuple) else value
        used = (config.get(group) or {}).get(name, wanted)
        if used != wanted:
            changed.append(f"{name}={','.join(map(str, used)) if isinstance(used, list) else used}")
    return changed


def model_free_label(run: Run) -> str:
    """Return the label of a model-free run of the same agent: the baseline in comparisons."""
    agent: str = run.config["agent_name"]
    return f"{_AGENT_NAMES.get(agent, agent)} (model-free)"


def curve_label(run: Run, variant: str) -> str:
    """Return the name of a variant among those of its run; a model-free run has its agent's."""
    model_free = run.config["algo"] == "model-free" and variant == "none"
    return model_free_label(run) if model_free else variant
