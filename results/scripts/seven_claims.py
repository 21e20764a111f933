"""Test the claims of the study on seven tasks, and describe the mechanism beside them.

results/seven/README.md registers the statistic and the claims.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dynajax.report import statistics
from seven_runs import ARMS, MECHANISM, MODEL_FREE_AS_DYNAJAX, TASKS, Learner, median

#: Registered seeds of each arm, from `FIRST_SEED` on, and those on the tasks with fewer.
SEEDS = {
    "model-free": (5, 3),
    "MBPO": (3, 2),
    "FTFL": (3, 2),
    "dynajax": (5, 3),
    MODEL_FREE_AS_DYNAJAX: (5, 3),
}
FEWER_SEEDS = ("humanoid-walk", "humanoid-run")
FIRST_SEED = 1000
#: Tasks of the pilot that selects `dynajax`.
PILOT = ("quadruped-run", "humanoid-stand")
#: A task on which both arms have a mean evaluation return under this is at the floor.
FLOOR = 15.0
#: Claim C3: `scale,target` may be at most so far below model-free.
MARGIN = math.log(0.8)
#: The mechanism is seen where the reward R² without fixes is below this, and with them is not.
LEARNED_R2 = 0.5


class Effect(NamedTuple):
    """The difference of two arms on a task."""

    task: str
    estimate: statistics.ConfidenceInterval
    at_floor: bool
    seeds: tuple[int, int]

    @property
    def decision(self) -> str:
        """What the task's own interval says."""
        _, low, high = map(float, self.estimate)
        return "above" if low > 0 else "below" if high < 0 else "undecided"


def effects(found: Sequence[Learner], base: str, other: str) -> list[Effect]:
    """Return `other` minus `base` on every task that has learners of both."""
    result = []
    for task in TASKS:
        sides = [[x for x in found if (x.task, x.arm) == (task, name)] for name in (base, other)]
        if not all(sides):
            continue
        before, after = ([x.log_return for x in side] for side in sides)
        estimate = statistics.difference(before, after)
        means = [float(np.mean([x.returns.mean() for x in side])) for side in sides]
        seeds = len(sides[0]), len(sides[1])
        result.append(Effect(task, estimate, max(means) < FLOOR, seeds))
    return result


def pooled(cells: Sequence[Effect]) -> statistics.ConfidenceInterval:
    """Return the mean of the effects with a t interval over tasks; tasks at the floor are left out."""
    points = [cell.estimate.point for cell in cells if not cell.at_floor]
    return statistics.interval(points) if points else statistics.ConfidenceInterval(*[math.nan] * 3)


def registered(name: str) -> set[tuple[str, int]]:
    """Return the tasks and seeds that are registered for an arm."""
    most, fewer = SEEDS[name]
    return {
        (task, FIRST_SEED + i)
        for task in TASKS
        for i in range(fewer if task in FEWER_SEEDS else most)
    }


class Claim(NamedTuple):
    """A registered claim about a pooled effect."""

    name: str
    text: str
    base: str
    other: str

    def verdict(self, effect: statistics.ConfidenceInterval, cells: Sequence[Effect]) -> str:
        """Return what the registration says of an effect of all registered learners."""
        _, low, high = map(float, effect)
        if not math.isfinite(low):
            return "not decided: fewer than two tasks"
        above = sum(cell.decision == "above" for cell in cells if not cell.at_floor)
        holds, refuted = {
            "C1": (high < 0, low > 0),
            "C2": (low > 0, high < 0),
            "C3": (low > MARGIN, high < MARGIN),
            "C4": (low > 0 and above >= 3, high < 0),
        }[self.name]
        return "holds" if holds else "refuted" if refuted else "not decided"

    def missing(self, found: Sequence[Learner]) -> str:
        """Return in which way the learners are not the registered ones, or an empty text."""
        planned = {(name, *x) for name in (self.base, self.other) for x in registered(name)}
        done = {(x.arm, x.task, x.seed) for x in found if x.arm in (self.base, self.other)}
        if done == planned:
            return ""
        others = f", and {len(done - planned)} others" if done - planned else ""
        return f"incomplete: {len(done & planned)} of {len(planned)} registered learners{others}"


_CLAIMS = (
    Claim("C1", "MBPO without fixes is below model-free", "model-free", "MBPO"),
    Claim("C2", "FTFL (`scale,target`) is above MBPO without fixes", "MBPO", "FTFL"),
    Claim("C3", "FTFL is at most 20 % below model-free", "model-free", "FTFL"),
    Claim("C4", "dynajax is above model-free", "model-free", "dynajax"),
)


def baseline_of(found: Sequence[Learner], name: str) -> str:
    """Return the model-free arm that an arm is compared with.

    That of dynajax has its settings that concern the model-free agent too.
    """
    other = name == "dynajax" and any(x.other_sampling for x in found if x.arm == name)
    return MODEL_FREE_AS_DYNAJAX if other else "model-free"


def claims(found: Sequence[Learner]) -> tuple[Claim, ...]:
    """Return the registered claims."""
    *others, last = _CLAIMS
    return (*others, last._replace(base=baseline_of(found, last.other)))


#: The intervals of the table of last evaluations.
BOOTSTRAP = "bootstrap intervals, which are too narrow with two or three seeds per task"
CAPTION = f"""\
A ratio compares the geometric means, over seeds, of 1 + mean evaluation return. Brackets contain 95 %
intervals: t intervals for ratios, and in the table of last evaluations {BOOTSTRAP}.
A task is at the floor if neither arm of a ratio has a mean return of 15. Values of the critic
and returns beside them are discounted; a reward is that of an agent step, which is two frames.
"""


def _ratio(estimate: statistics.ConfidenceInterval) -> str:
    """Return a difference of logarithms as a ratio with its interval."""
    return statistics.format_interval(statistics.ConfidenceInterval(*np.exp(estimate)))


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, and an empty one."""
    lines = [titles, ["---"] * len(titles), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def claims_table(found: Sequence[Learner]) -> str:
    """Return the claims with their verdicts, the effects by task, and the mechanism, as Markdown."""
    tested = claims(found)
    cells = {claim: side for claim in tested if (side := effects(found, claim.base, claim.other))}
    lines = [CAPTION, *_verdicts(found, cells), *_other_tasks(found, cells)]
    by_task = {(c.task, claim): c for claim, side in cells.items() for c in side}
    rows = [
        [
            task,
            *(
                "" if c is None else _cell(c)
                for c in [by_task.get((task, claim)) for claim in tested]
            ),
        ]
        for task in TASKS
    ]
    lines += _markdown(["task", *(f"{c.other} / {c.base}" for c in tested)], rows)
    lines += [*_final_table(found), *_coincidence(found), *_mechanism_table(found)]
    return "\n".join(lines)


def _cell(effect: Effect) -> str:
    """Return an effect on a task, and what its own interval decides."""
    if effect.at_floor:
        return "at the floor"
    return f"{_ratio(effect.estimate)}, {effect.decision}"


def _verdicts(found: Sequence[Learner], cells: Mapping[Claim, Sequence[Effect]]) -> list[str]:
    """Return the table of claims."""
    rows: list[list[str]] = []
    for claim, side in cells.items():
        effect, counted = pooled(side), [c for c in side if not c.at_floor]
        signs = [sum(s * c.estimate.point > 0 for c in counted) for s in (1, -1)]
        decided = [sum(c.decision == name for c in counted) for name in ("above", "below")]
        rows.append(
            [
                f"{claim.name}: {claim.text}",
                _ratio(effect),
                f"{len(counted)} of {len(side)}",
                f"{signs[0]}, {signs[1]}",
                f"{decided[0]}, {decided[1]}",
                claim.missing(found) or claim.verdict(effect, side),
            ]
        )
    titles = [
        "claim",
        "ratio, pooled",
        "tasks counted",
        "above, below",
        "by own interval",
        "verdict",
    ]
    return _markdown(titles, rows)


def _other_tasks(found: Sequence[Learner], cells: Mapping[Claim, Sequence[Effect]]) -> list[str]:
    """Return how far the pooled ratios depend on the tasks that count."""
    learned = {
        task
        for task in TASKS
        for name in ARMS
        if (means := [x.returns.mean() for x in found if (x.task, x.arm) == (task, name)])
        and np.mean(means) >= FLOOR
    }
    rows = []
    for claim, side in cells.items():
        counted = [c for c in side if not c.at_floor]
        fewer = [pooled([c for c in counted if c is not left]).point for left in counted]
        low, high = np.exp([min(fewer), max(fewer)]) if len(counted) > 1 else [math.nan] * 2
        rows.append(
            [
                claim.name,
                _ratio(pooled([c._replace(at_floor=c.task not in learned) for c in side])),
                f"{statistics.format_number(low)} to {statistics.format_number(high)}"
                if len(counted) > 1
                else "",
                _ratio(pooled([c for c in counted if c.task not in PILOT])),
            ]
        )
    titles = [
        "claim",
        "tasks that any arm learns",
        "leaving out one task",
        "without the pilot's tasks",
    ]
    return _markdown(titles, rows)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _coincidence(found: Sequence[Learner]) -> list[str]:
    """Return on which tasks MBPO fails, and on which the mechanism is seen."""
    cells = {c.task: c for c in effects(found, "model-free", "MBPO")}
    rows = []
    for task, cell in cells.items():
        sides = {a: [x for x in found if (x.task, x.arm) == (task, a)] for a in ARMS}
        r2 = [median(sides[name], "r2_reward") for name in ("MBPO", "FTFL")]
        biases = [median(sides[a], "critic_bias") for a in ("model-free", "MBPO", "FTFL")]
        seen = r2[0] < LEARNED_R2 <= r2[1]
        rows.append(
            [
                task,
                _cell(cell),
                *map(_number, r2),
                _number(float(np.mean([x.without_reward for x in sides["MBPO"]]))),
                *(_number(bias - biases[0]) for bias in biases[1:]),
                "at the floor" if cell.at_floor else "yes" if cell.decision == "below" else "no",
                "" if any(map(math.isnan, r2)) else "yes" if seen else "no",
            ]
        )
    titles = [
        "task",
        "MBPO / model-free",
        "reward R², MBPO",
        "FTFL",
        "fits without reward, MBPO",
    ]
    titles += ["critic's bias over model-free's, MBPO", "FTFL", "MBPO fails", "mechanism seen"]
    return _markdown(titles, rows)


def _mechanism_table(found: Sequence[Learner]) -> list[str]:
    """Return the medians of the mechanism by task and arm."""
    rows = []
    for task in TASKS:
        for name in ARMS:
            side = [x for x in found if (x.task, x.arm) == (task, name)]
            cells = [_number(median(side, metric.name)) for metric in MECHANISM]
            if any(cells):
                rows.append([task, name, *cells])
    return _markdown(["task", "arm", *(metric.title for metric in MECHANISM)], rows)


class Final(NamedTuple):
    """The last evaluations of an arm, over the tasks that it shares with its model-free baseline."""

    tasks: int
    iqm: statistics.ConfidenceInterval  # of returns / 1000
    improvement: (
        statistics.ConfidenceInterval | None
    )  # probability over model-free; None for itself


def final(found: Sequence[Learner]) -> dict[str, Final]:
    """Return the last evaluations by arm."""
    result = {}
    for name in ARMS:
        baseline = baseline_of(found, name)
        if tasks := shared(found, [name, baseline]):
            own, without = (_last_returns(found, arm, tasks) for arm in (name, baseline))
            better = None
            if name != baseline:
                better = statistics.probability_of_improvement(own, without)
            result[name] = Final(len(tasks), statistics.stratified_bootstrap(own), better)
    return result


def shared(found: Sequence[Learner], names: Sequence[str]) -> list[str]:
    """Return the tasks that have learners of all named arms."""
    return [t for t in TASKS if set(names) <= {x.arm for x in found if x.task == t}]


def _last_returns(found: Sequence[Learner], name: str, tasks: Sequence[str]) -> list[np.ndarray]:
    """Return the last returns / 1000 of an arm's learners, (seeds,) for each task."""
    sides = [[x.returns[-1] for x in found if (x.task, x.arm) == (t, name)] for t in tasks]
    return [np.array(side) / 1000 for side in sides]


def _final_table(found: Sequence[Learner]) -> list[str]:
    """Return the last evaluations as Markdown."""
    rows = [
        [
            name,
            str(x.tasks),
            statistics.format_interval(x.iqm),
            statistics.format_interval(x.improvement) if x.improvement else "",
        ]
        for name, x in final(found).items()
    ]
    titles = [
        "arm",
        "tasks",
        "last IQM / 1000",
        "probability of improvement over its model-free baseline",
    ]
    return _markdown(titles, rows)
