"""Read the runs of the study on seven tasks: returns, and the mechanism that the paper describes."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynajax import UsageError
from dynajax.report.run import Run, read_run
from dynajax.runs.directory import git_commits

TASKS = (
    "hopper-stand",
    "hopper-hop",
    "quadruped-walk",
    "quadruped-run",
    "humanoid-stand",
    "humanoid-walk",
    "humanoid-run",
)
#: The agent without a model, with those settings of dynajax that concern it too.
MODEL_FREE_AS_DYNAJAX = "model-free, as dynajax"
#: Arms in the order of tables and legends.
ARMS = ("model-free", "MBPO", "FTFL", "dynajax", MODEL_FREE_AS_DYNAJAX)


class Metric(NamedTuple):
    """A quantity of the mechanism that the paper describes."""

    name: str
    kind: str  # of the lines in metrics.jsonl
    inputs: tuple[str, ...]
    title: str
    value: Callable[..., float]  # of the discount and the inputs


def _difference(_: float, a: float, b: float) -> float:
    return a - b


def clipped_r2(_: float, r2: float) -> float:
    """Return an R² of at least -1: a far lower one says no more than that nothing was learned."""
    return max(r2, -1.0)


def _soft_bias(
    discount: float, value: float, outcome: float, temperature: float, entropy: float
) -> float:
    """Return the bias of a value less SAC's entropy bonus, as if the policy's entropy stayed equal."""
    return value - discount / (1 - discount) * temperature * entropy - outcome


MECHANISM = (
    Metric("r2_reward", "fit", ("r2_reward",), "reward R²", clipped_r2),
    Metric("r2_state", "fit", ("r2_state",), "state R²", clipped_r2),
    Metric(
        "reward_bias",
        "fit",
        ("model_reward_mean", "real_reward_mean"),
        "predicted minus true reward",
        _difference,
    ),
    Metric(
        "critic_bias",
        "learn",
        ("start_value", "start_return"),
        "critic's value minus return",
        _difference,
    ),
    Metric(
        "critic_bias_without_entropy",
        "learn",
        ("start_value", "start_return", "temperature", "entropy"),
        "critic's value without entropy bonus, minus return",
        _soft_bias,
    ),
    Metric(
        "synthetic_minus_real_reward",
        "learn",
        ("synthetic_reward_mean", "real_reward_mean"),
        "synthetic minus real reward",
        _difference,
    ),
)


class Curve(NamedTuple):
    """A metric of one learner over its run."""

    frames: np.ndarray  # (T,)
    values: np.ndarray  # (T,)


class Learner(NamedTuple):
    """One seed of an arm on a task."""

    folder: str
    task: str
    arm: str
    seed: int
    frames: np.ndarray  # (T,)
    returns: np.ndarray  # (T,) mean over the episodes of each evaluation
    mechanism: Mapping[str, Curve]  # by the names of MECHANISM; without a value, no curve
    without_reward: float  # share of the fits on whose holdout the reward is constant
    other_sampling: bool  # see `has_other_sampling`
    commit: str
    machine: str
    seconds: float

    @property
    def log_return(self) -> float:
        """The registered statistic: log(1 + mean evaluation return over the run)."""
        return math.log1p(float(self.returns.mean()))


def arm(run: Run, variant: str) -> str:
    """Return the arm of a variant of a run.

    Raises:
      UsageError: it is not an arm of the study.
    """
    algo = str(run.config["algo"])
    if algo == "model-free" and has_other_sampling(run):
        return MODEL_FREE_AS_DYNAJAX
    named = {
        ("model-free", "none"): "model-free",
        ("mbpo", "none"): "MBPO",
        ("mbpo", "scale,target"): "FTFL",
    }
    # An arm of the pilot expands the critic's targets instead of adding synthetic transitions.
    if algo in ("dynajax", "mve"):
        return "dynajax"
    if (algo, variant) not in named:
        raise UsageError(
            f"{run.folder}: {algo} with {variant} is not an arm of the study; the arms are model-free, "
            "mbpo with none, mbpo with scale,target, and dynajax"
        )
    return named[algo, variant]


def has_other_sampling(run: Run) -> bool:
    """Return whether a run holds exploration noise or samples by age.

    These settings of the pilot's arms concern the model-free agent too.
    """
    held, decay = run.config["learn"].get("hold_noise", 1), run.config["replay"].get("age_decay", 1)
    return bool(held > 1 or decay < 1)


def is_finished(run: Run) -> bool:
    """Return whether a run has all of its evaluations."""
    return bool(run.steps.size) and int(run.steps[-1]) >= run.config["steps"]


def check_finished(run: Run) -> None:
    """Refuse a run that is not finished, because the mean over its evaluations is another quantity.

    Raises:
      UsageError: it is not finished.
    """
    if not is_finished(run):
        planned, done = run.config["steps"], int(run.steps[-1]) if run.steps.size else 0
        raise UsageError(
            f"{run.folder}: it has {done:,} of {planned:,} agent steps; collect.py copies finished runs"
        )


def learners(run: Run) -> list[Learner]:
    """Return the learners of a finished run.

    Raises:
      UsageError: it is not finished, is not an arm of the study, or has a negative mean return or none.
    """
    check_finished(run)
    if not all(float(returns.mean()) >= 0 for rows in run.evals.values() for returns in rows):
        raise UsageError(
            f"{run.folder}: the statistic is a logarithm, but its mean return is negative or missing"
        )
    time = run.metrics["time"]
    found = []
    for variant, rows in run.evals.items():
        for seed, returns in zip(run.seeds, rows, strict=True):
            fits = [line.get("r2_reward") for line in _lines(run, "fit", variant, seed)]
            found.append(
                Learner(
                    run.folder.name,
                    run.config["env"],
                    arm(run, variant),
                    seed,
                    run.frames,
                    returns,
                    _mechanism(run, variant, seed),
                    fits.count(None) / len(fits) if fits else math.nan,
                    has_other_sampling(run),
                    " ".join(git_commits(run.info)),
                    str(run.info.get("machine")),
                    time[-1]["wall_seconds"] if time else math.nan,
                )
            )
    return found


def _lines(run: Run, kind: str, variant: str, seed: int) -> list[dict[str, Any]]:
    """Return the metrics of a kind that a learner has."""
    of_learner = (variant, seed)
    return [line for line in run.metrics[kind] if (line["variant"], line["seed"]) == of_learner]


def _mechanism(run: Run, variant: str, seed: int) -> dict[str, Curve]:
    """Return the curves of `MECHANISM` that a learner has."""
    curves, discount = {}, run.config["learn"]["discount"]
    for metric in MECHANISM:
        rows = [
            (line["step"], metric.value(discount, *(float(line[name]) for name in metric.inputs)))
            for line in _lines(run, metric.kind, variant, seed)
            if all(line.get(name) is not None for name in metric.inputs)
        ]
        if rows:
            steps, values = np.array(rows).T
            curves[metric.name] = Curve(run.frames_at(variant, steps), values)
    return curves


def median(found: Sequence[Learner], name: str) -> float:
    """Return the median over learners of a metric's median over the second half of the run.

    NaN without a value.
    """
    medians = []
    for x in found:
        if curve := x.mechanism.get(name):
            late = curve.values[curve.frames > x.frames[-1] / 2]
            medians += [float(np.median(late))] if late.size else []
    return float(np.median(medians)) if medians else math.nan


def check_alike(runs: Sequence[tuple[str, Run]]) -> None:
    """Check that runs are of one study.

    All have the same agent, evaluations, preset and number of agent steps. Those of an arm have the
    same configuration, apart from tasks and seeds.

    Args:
      runs: runs with the names of their arms.

    Raises:
      UsageError: two runs differ.
    """
    first: dict[str, Run] = {}
    for name, run in runs:
        for other, keys in (
            (runs[0][1], ("agent_name", "preset", "steps", "agent", "eval")),
            (first.setdefault(name, run), sorted({*run.config} - {"env", "seed", "seeds"})),
        ):
            for key in keys:
                mine, others = (x.config.get(key) for x in (run, other))
                if mine != others:
                    values = (
                        f"is {mine}, but {others}" if isinstance(mine, str | int) else "is not as"
                    )
                    raise UsageError(
                        f"{run.folder}: {key} {values} in {other.folder.name}; different studies need "
                        "different folders, and an arm has one configuration"
                    )


def read(folder: Path) -> list[Learner]:
    """Return the learners of all runs in a folder.

    Raises:
      UsageError: there is none; one is damaged, not finished or not an arm of the study; or they
        are not alike, see `check_alike`, or repeat a learner.
    """
    paths = sorted(path.parent for path in folder.glob("*/config.json"))
    if not paths:
        raise UsageError(f"{folder}: it contains no run directory")
    runs = [read_run(path) for path in paths]
    check_alike([(" and ".join(arm(run, v) for v in run.evals), run) for run in runs])
    found = [learner for run in runs for learner in learners(run)]
    names: dict[tuple[str, str, int], str] = {}
    for x in found:
        before = names.setdefault((x.task, x.arm, x.seed), x.folder)
        if before != x.folder:
            raise UsageError(f"{folder}: {before} and {x.folder} are the same arm, task and seed")
    return found
