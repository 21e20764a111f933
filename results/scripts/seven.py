"""Evaluate the study on seven tasks: test its claims, write its tables, and draw its figure.

  python results/scripts/seven.py results/seven

Reads every run directory in the folder, and writes claims.md, learners.csv (a line for each learner),
effects.csv (a line for each task and pair of arms), index.csv, seven.png, and a figure of each metric of
the mechanism beside them. results/seven/README.md registers the statistic and the claims; this script
computes nothing else.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynajax import UsageError
from dynajax.cli import common
from dynajax.report import figures, published, statistics
from dynajax.report.run import Run, read_run
from dynajax.runs.directory import write_atomically, write_csv

TASKS = (
    "hopper-stand",
    "hopper-hop",
    "quadruped-walk",
    "quadruped-run",
    "humanoid-stand",
    "humanoid-walk",
    "humanoid-run",
)
#: Arms in the order of tables and legends.
ARMS = ("model-free", "MBPO", "FTFL", "dynajax")
#: Their names in figures.
LABELS = {name: name for name in ARMS} | {"FTFL": "MBPO + scale, target (FTFL)"}
#: What the paper says goes wrong: name, the kind of metrics, a metric and one to subtract, a title.
MECHANISM = (
    ("r2_reward", "fit", ("r2_reward",), "reward R²"),
    ("r2_state", "fit", ("r2_state",), "state R²"),
    ("critic_bias", "learn", ("start_value", "start_return"), "critic's value minus return"),
    (
        "synthetic_minus_real_reward",
        "learn",
        ("synthetic_reward_mean", "real_reward_mean"),
        "synthetic minus real reward",
    ),
)
#: Reference lines: tasks and published methods.
REFERENCES = {task: ["simba-utd8"] for task in TASKS[:4]} | {
    task: ["simba-utd8", "wimle"] for task in TASKS[4:]
}
#: A task on which both arms have a mean evaluation return under this is at the floor.
FLOOR = 15.0
#: Claim C3: `scale,target` may be at most so far below model-free.
MARGIN = math.log(0.8)


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
    commit: str
    seconds: float

    @property
    def area(self) -> float:
        """The registered statistic: log(1 + mean evaluation return over the run)."""
        return math.log1p(float(self.returns.mean()))


def arm(run: Run, variant: str) -> str:
    """Return the arm of a variant of a run.

    Raises:
      UsageError: it is not an arm of the study.
    """
    algo = str(run.config["algo"])
    named = {("mbpo", "none"): "MBPO", ("mbpo", "scale,target"): "FTFL"}
    if algo in ("model-free", "dynajax"):
        return algo
    if (algo, variant) not in named:
        raise UsageError(
            f"{run.folder}: {algo} with {variant} is not an arm of the study; the arms are model-free, "
            "mbpo with none, mbpo with scale,target, and dynajax"
        )
    return named[algo, variant]


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
      UsageError: it is not finished, is not an arm of the study, or has a negative mean return.
    """
    check_finished(run)
    if any(float(returns.mean()) < 0 for rows in run.evals.values() for returns in rows):
        raise UsageError(
            f"{run.folder}: the statistic is a logarithm, but its mean return is negative"
        )
    time = run.metrics["time"]
    return [
        Learner(
            run.folder.name,
            run.config["env"],
            arm(run, variant),
            seed,
            run.frames,
            returns,
            _mechanism(run, variant, seed),
            str(run.info.get("git_commit")),
            time[-1]["wall_seconds"] if time else math.nan,
        )
        for variant, rows in run.evals.items()
        for seed, returns in zip(run.seeds, rows, strict=True)
    ]


def _mechanism(run: Run, variant: str, seed: int) -> dict[str, Curve]:
    """Return the curves of `MECHANISM` that a learner has."""
    curves = {}
    for name, kind, metrics, _ in MECHANISM:
        rows = [
            (line["step"], *(float(line[m]) for m in metrics))
            for line in run.metrics[kind]
            if (line["variant"], line["seed"]) == (variant, seed)
            and all(line.get(m) is not None for m in metrics)
        ]
        if rows:
            steps, first, *rest = np.array(rows).T
            frames = run.frames_at(variant, steps)
            curves[name] = Curve(frames, first - sum(rest))
    return curves


def median(found: Sequence[Learner], name: str) -> float:
    """Return the mean over learners of a metric's median over the run; NaN without one."""
    medians = [float(np.median(x.mechanism[name].values)) for x in found if name in x.mechanism]
    return float(np.mean(medians)) if medians else math.nan


class Effect(NamedTuple):
    """The difference of two arms on a task."""

    task: str
    estimate: statistics.ConfidenceInterval
    at_floor: bool
    seeds: tuple[int, int]


def effects(found: Sequence[Learner], base: str, other: str) -> list[Effect]:
    """Return `other` minus `base` on every task that has learners of both."""
    result = []
    for task in TASKS:
        sides = [[x for x in found if (x.task, x.arm) == (task, name)] for name in (base, other)]
        if not all(sides):
            continue
        before, after = ([x.area for x in side] for side in sides)
        estimate = statistics.difference(before, after)
        means = [float(np.mean([x.returns.mean() for x in side])) for side in sides]
        seeds = len(sides[0]), len(sides[1])
        result.append(Effect(task, estimate, max(means) < FLOOR, seeds))
    return result


def pooled(cells: Sequence[Effect]) -> statistics.ConfidenceInterval:
    """Return the mean of the effects with a t interval over tasks; tasks at the floor are left out."""
    points = [cell.estimate.point for cell in cells if not cell.at_floor]
    return statistics.interval(points) if points else statistics.ConfidenceInterval(*[math.nan] * 3)


class Claim(NamedTuple):
    """A registered claim about a pooled effect."""

    name: str
    text: str
    base: str
    other: str

    def verdict(self, effect: statistics.ConfidenceInterval, cells: Sequence[Effect]) -> str:
        """Return what the registration says of an effect."""
        _, low, high = map(float, effect)
        if not math.isfinite(low):
            return "not decided: fewer than two tasks"
        above = sum(cell.estimate.low > 0 for cell in cells if not cell.at_floor)
        holds, refuted = {
            "C1": (high < 0, low > 0),
            "C2": (low > 0, high < 0),
            "C3": (low > MARGIN, high < MARGIN),
            "C4": (low > 0 and above >= 3, high < 0),
        }[self.name]
        return "holds" if holds else "refuted" if refuted else "not decided"


CLAIMS = (
    Claim("C1", "MBPO without fixes is below model-free", "model-free", "MBPO"),
    Claim("C2", "FTFL (`scale,target`) is above MBPO without fixes", "MBPO", "FTFL"),
    Claim("C3", "FTFL is at most 20 % below model-free", "model-free", "FTFL"),
    Claim("C4", "dynajax is above model-free", "model-free", "dynajax"),
)


def _ratio(estimate: statistics.ConfidenceInterval) -> str:
    """Return a difference of logarithms as a ratio with its interval."""
    return statistics.format_interval(statistics.ConfidenceInterval(*np.exp(estimate)))


def claims_table(found: Sequence[Learner]) -> str:
    """Return the claims with their effects and verdicts, and the effects by task, as Markdown."""
    lines = [
        "| claim | ratio, pooled over tasks | tasks above, below | verdict |",
        "|---|---|---|---|",
    ]
    for claim in CLAIMS:
        cells = effects(found, claim.base, claim.other)
        if not cells:
            continue
        effect, counted = pooled(cells), [c for c in cells if not c.at_floor]
        signs = [sum(s * c.estimate.point > 0 for c in counted) for s in (1, -1)]
        lines.append(
            f"| {claim.name}: {claim.text} | {_ratio(effect)} | {signs[0]}, {signs[1]} of "
            f"{len(counted)} | {claim.verdict(effect, cells)} |"
        )
    lines += ["", "| task | " + " | ".join(f"{c.other} / {c.base}" for c in CLAIMS) + " |"]
    lines.append("|---" * (1 + len(CLAIMS)) + "|")
    for task in TASKS:
        row = []
        for claim in CLAIMS:
            cells = [c for c in effects(found, claim.base, claim.other) if c.task == task]
            row += ["at the floor" if c.at_floor else _ratio(c.estimate) for c in cells] or [""]
        lines.append(f"| {task} | " + " | ".join(row) + " |")
    lines += ["", *_final_table(found), "", *_mechanism_table(found)]
    return "\n".join(lines) + "\n"


def _mechanism_table(found: Sequence[Learner]) -> list[str]:
    """Return the medians of the mechanism by task and arm."""
    titles = [title for *_, title in MECHANISM]
    lines = [f"| task | arm | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
    for task in TASKS:
        for name in ARMS:
            side = [x for x in found if (x.task, x.arm) == (task, name)]
            values = [median(side, metric) for metric, *_ in MECHANISM]
            cells = ["" if math.isnan(v) else f"{v:.3g}" for v in values]
            if any(cells):
                lines.append(f"| {task} | {name} | {' | '.join(cells)} |")
    return lines


class Final(NamedTuple):
    """The last evaluations of an arm, over the tasks that it shares with the model-free arm."""

    iqm: statistics.ConfidenceInterval  # of returns / 1000
    improvement: (
        statistics.ConfidenceInterval | None
    )  # probability over model-free; None for itself


def final(found: Sequence[Learner]) -> dict[str, Final]:
    """Return the last evaluations by arm."""
    result = {}
    for name in ARMS:
        if tasks := _shared(found, [name, "model-free"]):
            own, base = (_last_returns(found, arm, tasks) for arm in (name, "model-free"))
            better = None
            if name != "model-free":
                better = statistics.probability_of_improvement(own, base)
            result[name] = Final(statistics.stratified_bootstrap(own), better)
    return result


def _shared(found: Sequence[Learner], names: Sequence[str]) -> list[str]:
    """Return the tasks that have learners of all named arms."""
    return [t for t in TASKS if set(names) <= {x.arm for x in found if x.task == t}]


def _last_returns(found: Sequence[Learner], name: str, tasks: Sequence[str]) -> list[np.ndarray]:
    """Return the last returns / 1000 of an arm's learners, (seeds,) for each task."""
    sides = [[x.returns[-1] for x in found if (x.task, x.arm) == (t, name)] for t in tasks]
    return [np.array(side) / 1000 for side in sides]


def _final_table(found: Sequence[Learner]) -> list[str]:
    """Return the last evaluations as Markdown."""
    lines = [
        "| arm | final IQM / 1000 | probability of improvement over model-free |",
        "|---|---|---|",
    ]
    for name, (score, improvement) in final(found).items():
        better = statistics.format_interval(improvement) if improvement else ""
        lines.append(f"| {name} | {statistics.format_interval(score)} | {better} |")
    return lines


def draw(found: Sequence[Learner]) -> Any:
    """Draw returns by frames on each task, and their IQM over tasks."""
    end = max(int(x.frames[-1]) for x in found)
    panels = []
    for task in TASKS:
        lines = {
            label: _stack([Curve(x.frames, x.returns) for x in side])
            for label, side in _by_arm(found, task).items()
        }
        if lines:
            references = published.curves_until(task, REFERENCES[task], end)
            panels.append(
                figures.Panel(
                    lines,
                    figures.RETURN,
                    task,
                    xlabel=figures.FRAMES,
                    floor=0.0,
                    include=0.0,
                    bounds=(0.0, 1000.0),
                    published=references,
                )
            )
    note = f"{figures.LINES} of the mean; of the IQM (interquartile mean): 95 % bootstrap interval."
    if better := [
        f"{LABELS[name]} {statistics.format_interval(improvement)}"
        for name, (_, improvement) in final(found).items()
        if improvement
    ]:
        note += f"\nProbability of improvement over model-free at the end: {'; '.join(better)}."
    return figures.curves([*panels, *_aggregate(found)], note=note)


def _aggregate(found: Sequence[Learner]) -> list[figures.Panel]:
    """Return a panel with the IQM over the tasks that all arms share, if there are any."""
    names = [name for name in ARMS if any(x.arm == name for x in found)]
    tasks = _shared(found, names)
    if not tasks:
        return []
    lines, bands = {}, {}
    for name in names:
        sides = [[x for x in found if (x.task, x.arm) == (t, name)] for t in tasks]
        returns = [np.array([x.returns for x in side]) / 1000 for side in sides]
        steps = range(returns[0].shape[1])
        points = [statistics.stratified_bootstrap([r[:, i] for r in returns]) for i in steps]
        band = statistics.ConfidenceInterval(*np.array(points).T)
        lines[LABELS[name]] = (sides[0][0].frames, np.asarray(band.point)[None])
        bands[LABELS[name]] = band
    title = f"All {len(tasks)} tasks" if len(tasks) == len(TASKS) else f"{len(tasks)} tasks"
    return [
        figures.Panel(
            lines,
            "IQM of return / 1000",
            title,
            xlabel=figures.FRAMES,
            floor=0.0,
            include=0.0,
            bands=bands,
        )
    ]


def draw_mechanism(found: Sequence[Learner], name: str) -> Any:
    """Draw a metric of `MECHANISM` by frames on each task."""
    (title,) = (title for metric, *_, title in MECHANISM if metric == name)
    is_r2 = name.startswith("r2")
    panels = []
    for task in TASKS:
        lines = {}
        for label, side in _by_arm(found, task).items():
            if curves := [x.mechanism[name] for x in side if name in x.mechanism]:
                frames, values = _stack(curves)
                # A far lower R² says no more than that nothing was learned.
                lines[label] = frames, np.maximum(values, -1) if is_r2 else values
        if lines:
            panels.append(
                figures.Panel(
                    lines,
                    title,
                    task,
                    xlabel=figures.FRAMES,
                    include=0.0,
                    bounds=statistics.R2 if is_r2 else statistics.UNBOUNDED,
                )
            )
    return figures.curves(panels, note=figures.LINES + " of the mean.")


def _by_arm(found: Sequence[Learner], task: str) -> dict[str, list[Learner]]:
    """Return the learners of a task by the labels of their arms."""
    sides = {name: [x for x in found if (x.task, x.arm) == (task, name)] for name in ARMS}
    return {LABELS[name]: side for name, side in sides.items() if side}


def _stack(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Return all frames (T,) of some curves and their values (curves, T), NaN where one has none."""
    frames = np.unique(np.concatenate([curve.frames for curve in curves]))
    values = np.full((len(curves), len(frames)), np.nan)
    for row, curve in zip(values, curves, strict=True):
        row[np.searchsorted(frames, curve.frames)] = curve.values
    return frames, values


def read(folder: Path) -> list[Learner]:
    """Return the learners of all runs in a folder.

    Raises:
      UsageError: there is none; one is damaged, not finished or not an arm of the study; or they
        differ in the agent, the preset or the number of agent steps, or repeat a learner.
    """
    paths = sorted(path.parent for path in folder.glob("*/config.json"))
    if not paths:
        raise UsageError(f"{folder}: it contains no run directory")
    runs = [read_run(path) for path in paths]
    for key in ("agent_name", "preset", "steps"):
        for run in runs[1:]:
            if run.config[key] != runs[0].config[key]:
                raise UsageError(
                    f"{run.folder}: {key} is {run.config[key]}, but {runs[0].config[key]} in "
                    f"{runs[0].folder.name}; different studies need different folders"
                )
    found = [learner for run in runs for learner in learners(run)]
    names: dict[tuple[str, str, int], str] = {}
    for x in found:
        before = names.setdefault((x.task, x.arm, x.seed), x.folder)
        if before != x.folder:
            raise UsageError(f"{folder}: {before} and {x.folder} are the same arm, task and seed")
    return found


def main(arguments: Sequence[str]) -> int:
    """Write the tables and the figure of the folder that is given."""
    if len(arguments) != 1:
        raise UsageError("give one folder, such as results/seven")
    folder = Path(arguments[0])
    found = read(folder)
    if others := sorted({x.task for x in found} - set(TASKS)):
        raise UsageError(f"{folder}: {', '.join(others)} is not a task of the study")
    rows = [
        {
            "task": x.task,
            "arm": x.arm,
            "seed": x.seed,
            "frames": int(x.frames[-1]),
            "mean_return": x.returns.mean(),
            "final_return": x.returns[-1],
            **{name: median([x], name) for name, *_ in MECHANISM},
        }
        for x in found
    ]
    write_csv(folder / "learners.csv", rows)
    write_csv(
        folder / "effects.csv",
        [
            {
                "task": cell.task,
                "base": claim.base,
                "arm": claim.other,
                "seeds_of_base": cell.seeds[0],
                "seeds_of_arm": cell.seeds[1],
                "log_ratio": cell.estimate.point,
                "low": cell.estimate.low,
                "high": cell.estimate.high,
                "at_floor": cell.at_floor,
            }
            for claim in CLAIMS
            for cell in effects(found, claim.base, claim.other)
        ]
        or [{"task": ""}],
    )
    used = {a: " ".join(c.name for c in CLAIMS if a in (c.base, c.other)) for a in ARMS}
    write_csv(
        folder / "index.csv",
        [
            {
                "folder": x.folder,
                "arm": x.arm,
                "task": x.task,
                "seed": x.seed,
                "commit": x.commit,
                "wall_seconds": x.seconds,
                "claims": used[x.arm],
            }
            for x in found
        ],
    )
    write_atomically(folder / "claims.md", claims_table(found).encode())
    write_atomically(folder / "seven.png", figures.png(draw(found)))
    for name, *_ in MECHANISM:
        if any(name in x.mechanism for x in found):
            write_atomically(folder / f"{name}.png", figures.png(draw_mechanism(found, name)))
    print(claims_table(found), end="")
    return 0


if __name__ == "__main__":
    common.run(main)
