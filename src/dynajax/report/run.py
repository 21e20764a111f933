"""A run's folder, read back: what it was told to do, and what it has written so far."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynajax.runs.directory import reading_config
from dynajax.types import UsageError

#: Fields of a model that older folders do not have, as their runs were.
_MODEL = {"reward_from": "inputs", "epochs": 0.0}
#: What the group `sac` of older folders held that is now any agent's, with later fields' defaults.
_LEARN = {"utd": 20, "batch": 256, "discount": 0.99, "reset_every": 0, "reset_at": []}


class Run(NamedTuple):
    """What a run has written so far."""

    folder: Path
    info: dict[str, Any]  # config.json
    steps: np.ndarray  # (T,) environment steps of the evaluations
    evals: dict[str, np.ndarray]  # variant -> return_mean (seeds, T), in the config's order
    seeds: tuple[int, ...]
    metrics: dict[str, list[dict[str, Any]]]  # "learn", "fit", "time" -> lines

    @property
    def config(self) -> dict[str, Any]:
        """The configuration; one of an older folder as it would be written today."""
        return current(self.info["config"])

    @property
    def repeat(self) -> int:
        """Frames of an environment step."""
        return int(self.config["task"]["repeat"])

    @property
    def frames(self) -> np.ndarray:
        """(T,) frames, the simulator's steps, of the evaluations."""
        return self.steps * self.repeat


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration out of any version's config.json, with the names and groups of today."""
    new = dict(config)
    if "sac" in new:
        fields = dict(new.pop("sac"))
        new["learn"] = {name: fields.pop(name, default) for name, default in _LEARN.items()}
        new["agent"] = fields
    if new.get("model"):
        new["model"] = _MODEL | new["model"]
    return {"agent_name": "sac", "trust_name": "none", "trust": None, "task": {"repeat": 1}} | new


def read_run(folder: str | Path) -> Run:
    """Reads a run that is finished, under way, or was killed in the middle of a line.

    A line counts once its newline is written, and an evaluation once every seed of every variant
    has it; of a step logged twice the later one counts.

    Raises:
      UsageError: no such folder, not a run's folder, or a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder")
    with reading_config(folder):
        info = json.loads((folder / "config.json").read_text())
        variants = list(current(info["config"])["variants"])

    returns: dict[tuple[str, int], dict[int, float]] = {}
    for line in csv.DictReader(text for _, text in _lines(folder / "eval.csv")):
        try:
            row = returns.setdefault((line["variant"], int(line["seed"])), {})
            row[int(line["step"])] = float(line["return_mean"] or "nan")
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{folder / 'eval.csv'}: a line is damaged: {line}") from None
    steps = sorted(set.intersection(*(set(row) for row in returns.values())) if returns else ())
    seeds = sorted({seed for _, seed in returns})
    seen = {variant for variant, _ in returns}
    evals = {
        v: np.array([[returns[v, s][t] for t in steps] for s in seeds if (v, s) in returns])
        for v in [*(v for v in variants if v in seen), *sorted(seen - set(variants))]
    }

    metrics: dict[str, list[dict[str, Any]]] = {"learn": [], "fit": [], "time": []}
    for number, text in _lines(folder / "metrics.jsonl"):
        try:
            entry = json.loads(text)
            metrics.setdefault(entry["kind"], []).append(entry)
        except (ValueError, KeyError, TypeError):
            place = f"{folder / 'metrics.jsonl'}, line {number}"
            raise UsageError(f"{place}: damaged, it is not one JSON object with a kind") from None
    return Run(folder, info, np.array(steps, int), evals, tuple(seeds), metrics)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a file that may be missing, without a torn last one."""
    if not path.exists():
        return
    whole = path.read_text(errors="replace").rpartition("\n")[0]
    yield from ((n, text) for n, text in enumerate(whole.split("\n"), 1) if text)


def series(run: Run, kind: str, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A metric of kind "learn", "fit" or "diagnosis": variant -> (steps (T,), values (seeds, T)).

    Null or missing values are NaN; a variant without any is left out. Names are those of `curve`.
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
        curves[curve(run, variant)] = (np.array(steps), values)
    return curves


def last_channels(run: Run) -> dict[str, np.ndarray]:
    """Skill of the state's channels on the holdout of the last fit: curve -> (seeds, D).

    Channels that did not vary are NaN; a variant without any, as of older folders, is left out.
    """
    newest: dict[str, dict[int, list[float | None]]] = {}
    for line in run.metrics.get("fit", []):
        if line.get("r2_state_dims"):
            newest.setdefault(line["variant"], {})[line["seed"]] = line["r2_state_dims"]
    return {
        curve(run, v): np.array([newest[v][s] for s in sorted(newest[v])], float)
        for v in run.config["variants"]
        if v in newest
    }


def label(run: Run, variant: str) -> str:
    """What a curve is called where methods stand side by side: "SAC", "simba", "MBPO", "MBPO
    scale,target", "MBPO simba scale trust=m2ac"."""
    config = run.config
    if config["algo"] == "model-free":
        words, trust = [model_free(run)], "none"
    else:
        agent, trust = config["agent_name"], config["trust_name"]
        words = ["MBPO", *([agent] if agent != "sac" else [])]
    if variant != "none":
        words.append(variant.removeprefix("none;"))
    if trust != "none":
        words.append(f"trust={trust}")
    return " ".join(words)


def model_free(run: Run) -> str:
    """The label of the run's agent without a model: what its curves are measured by."""
    agent: str = run.config["agent_name"]
    return agent.upper() if agent == "sac" else agent


def curve(run: Run, variant: str) -> str:
    """What a curve is called beside others of its run: the variant, or without a model the
    agent."""
    without_model = run.config["algo"] == "model-free" and variant == "none"
    return model_free(run) if without_model else variant
