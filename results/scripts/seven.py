"""Evaluate the study on seven tasks: test its claims, write its tables, and draw its figure.

  python results/scripts/seven.py results/seven

Reads every run directory in the folder, and writes claims.md, learners.csv (a line for each learner),
effects.csv (a line for each task and pair of arms), index.csv, seven.png and mechanism.png beside
them. results/seven/README.md registers the statistic and the claims; this script computes nothing
else.
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
#: Arms with their colours, in the order of legends.
ARMS = {
    "model-free": figures.BLACK,
    "MBPO": figures.VERMILLION,
    "FTFL": figures.BLUE,
    "dynajax": figures.GREEN,
}
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
#: Thin reference lines: tasks and published methods.
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
    lines += ["", *_final(found), "", *_mechanism_table(found)]
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


def _final(found: Sequence[Learner]) -> list[str]:
    """Return the final IQM over tasks, and the probability of improvement over model-free."""
    lines = [
        "| arm | final IQM / 1000 | probability of improvement over model-free |",
        "|---|---|---|",
    ]
    for name in ARMS:
        tasks = [t for t in TASKS if {name, "model-free"} <= {x.arm for x in found if x.task == t}]
        if not tasks:
            continue
        last = {
            a: [[x.returns[-1] for x in found if (x.task, x.arm) == (t, a)] for t in tasks]
            for a in (name, "model-free")
        }
        score = statistics.stratified_bootstrap([np.array(v) / 1000 for v in last[name]])
        better = ""
        if name != "model-free":
            better = statistics.format_interval(
                statistics.probability_of_improvement(last[name], last["model-free"])
            )
        lines.append(f"| {name} | {statistics.format_interval(score)} | {better} |")
    return lines


def draw(found: Sequence[Learner]) -> Any:
    """Draw returns by frames on each task, and their IQM over tasks."""
    figures.matplotlib()
    from matplotlib.figure import Figure

    end = max(int(x.frames[-1]) for x in found)
    with figures.house_style():
        figure = Figure(figsize=(12, 5.2), layout="constrained")
        grid = figure.subplots(2, 4, sharex=True)
        for axes, task in zip(grid.flat, TASKS, strict=False):
            axes.set_title(task)
            for curve, side in zip(
                published.curves_until(task, REFERENCES[task], end), ("bottom", "top"), strict=False
            ):
                axes.plot(
                    curve.frames, curve.mean, "o:", color="#9a9a9a", linewidth=1, markersize=3
                )
                axes.annotate(
                    f"{published.METHODS[curve.key].name} (published)",
                    (curve.frames[-1], curve.mean[-1]),
                    fontsize=7,
                    color="#7a7a7a",
                    ha="right",
                    va=side,
                )
            for name, colour in ARMS.items():
                curves = [x for x in found if (x.task, x.arm) == (task, name)]
                _draw_arm(axes, curves, colour)
            axes.set_ylim(bottom=0)
        axes = grid.flat[-1]
        shared = [
            t for t in TASKS if {x.arm for x in found} <= {x.arm for x in found if x.task == t}
        ]
        axes.set_title(f"mean of {len(shared)} tasks / 1000")
        for name, colour in ARMS.items():
            if not any(x.arm == name for x in found):
                continue
            sides = [[x for x in found if (x.task, x.arm) == (t, name)] for t in shared]
            if not sides:
                axes.plot([], [], color=colour, label=name)
                continue
            length = min(len(x.returns) for side in sides for x in side)
            means = [np.mean([x.returns[:length] for x in side], 0) for side in sides]
            frames = sides[0][0].frames[:length]
            axes.plot(frames, np.mean(means, 0) / 1000, color=colour, label=name)
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.supxlabel("frames", fontsize=10)
        figure.supylabel("return", fontsize=10)
    return figure


def draw_mechanism(found: Sequence[Learner]) -> Any:
    """Draw the reward R² and the critic's bias by frames on each task, a line for each learner."""
    figures.matplotlib()
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if task in {x.task for x in found}]
    with figures.house_style():
        figure = Figure(figsize=(2.2 * len(tasks) + 1, 4.4), layout="constrained")
        grid = figure.subplots(2, len(tasks), sharex=True, squeeze=False)
        for row, (name, label) in zip(
            grid, (("r2_reward", "reward R²"), ("critic_bias", "value minus return")), strict=True
        ):
            row[0].set_ylabel(label)
            for axes, task in zip(row, tasks, strict=True):
                for x in found:
                    if x.task == task and name in x.mechanism:
                        curve = x.mechanism[name]
                        values = (
                            np.clip(curve.values, -1, 1) if name == "r2_reward" else curve.values
                        )
                        axes.plot(curve.frames, values, color=ARMS[x.arm], linewidth=0.8)
                axes.axhline(0, color="#9a9a9a", linewidth=0.6)
        for axes, task in zip(grid[0], tasks, strict=True):
            axes.set_title(task)
            axes.set_ylim(-1.05, 1.05)
        for name, colour in ARMS.items():
            if any(x.arm == name for x in found):
                grid[0][0].plot([], [], color=colour, label=name)
        figure.legend(loc="outside right center")
        figure.supxlabel("frames", fontsize=10)
    return figure


def _draw_arm(axes: Any, curves: Sequence[Learner], colour: str) -> None:
    """Draw the mean of an arm with its interval; fewer than five seeds have a thin line each."""
    if not curves:
        return
    length = min(len(x.returns) for x in curves)
    frames, returns = curves[0].frames[:length], np.array([x.returns[:length] for x in curves])
    estimate = statistics.interval(returns)
    axes.plot(frames, estimate.point, color=colour)
    if len(curves) >= 5:
        low, high = np.clip([estimate.low, estimate.high], 0, 1000)
        axes.fill_between(frames, low, high, color=colour, alpha=0.15, linewidth=0)
    else:
        axes.plot(frames, returns.T, color=colour, linewidth=0.6, alpha=0.6)


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
    write_atomically(folder / "mechanism.png", figures.png(draw_mechanism(found)))
    print(claims_table(found), end="")
    return 0


if __name__ == "__main__":
    common.run(main)
