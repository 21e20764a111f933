"""A run's folder, read back and told as a story: `curves.png` and `report.html`.

The page says first what came out, then shows why: the model's story, the critic's, the clock's.
It is one file that needs nothing else, so it can be mailed or opened years later.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynajax.record.folder import write_atomically
from dynajax.report import figures, statistics
from dynajax.report.figures import Panel, Series
from dynajax.types import UsageError

#: A gain in the reward's R2 that counts as the reward model having changed.
_NOTICEABLE = 0.1


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
        return self.info["config"]


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
    try:
        info = json.loads((folder / "config.json").read_text())
        variants = list(info["config"]["variants"])
    except FileNotFoundError:
        raise UsageError(f"{folder}: not a run's folder, it has no config.json") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{folder / 'config.json'}: not the configuration of a run") from None

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

    Null or missing values are NaN; a variant without any is left out. Plain SAC's is named SAC.
    """
    found: dict[str, dict[tuple[int, int], float]] = {}
    for line in run.metrics.get(kind, []):
        value = line.get(name)
        if value is not None:
            found.setdefault(line["variant"], {})[line["seed"], line["step"]] = float(value)
    curves = {}
    for variant in [v for v in run.config["variants"] if v in found]:
        points = found[variant]
        seeds, steps = (sorted(set(axis)) for axis in zip(*points, strict=True))
        values = np.array([[points.get((s, t), np.nan) for t in steps] for s in seeds])
        curves[_shown(run, variant)] = (np.array(steps), values)
    return curves


def label(run: Run, variant: str) -> str:
    """What a curve is called when algorithms stand side by side: SAC, MBPO, MBPO scale,target."""
    algo = run.config["algo"].upper()
    return algo if variant == "none" else f"{algo} {variant.removeprefix('none;')}"


def write_report(folder: str | Path) -> Path:
    """Writes `curves.png` and `report.html` into a run's folder, each whole or not at all.

    Returns:
      The page's path.

    Raises:
      UsageError: see `read_run`.
    """
    run = read_run(folder)
    title = f"{run.config['env']}: {run.config['algo'].upper()}, preset {run.config['preset']}"
    evals: Series = {_shown(run, v): (run.steps, values) for v, values in run.evals.items()}
    if run.config.get("oracle", "none") != "none":
        title += f", oracle {run.config['oracle']}"
    panel = Panel(evals, figures.RETURN, include=0.0)
    write_atomically(run.folder / "curves.png", figures.png(figures.curves([panel], title=title)))
    stories = _model_story(run) if run.config["algo"] == "mbpo" else {}
    stories |= _critic_story(run)
    page = figures.page(
        title=title,
        sentences=headline(run),
        table=_final_table(run),
        curves=figures.png(figures.curves([panel])),
        style=figures.styles([_shown(run, v) for v in run.config["variants"]]),
        stories=stories,
        appendix=_time(run) + _provenance(run.info),
    )
    path = run.folder / "report.html"
    write_atomically(path, page.encode())
    return path


def headline(run: Run) -> list[str]:
    """What came out, in plain sentences (HTML), the most important first."""
    config = run.config
    if not run.evals or not run.steps.size:
        return ["<b>No evaluation has been written yet</b>, so there is nothing to say."]
    final = {v: values[:, -1] for v, values in run.evals.items()}
    means = {v: float(statistics.interval(x).point) for v, x in final.items()}
    ranked = sorted(means, key=lambda v: -np.nan_to_num(means[v], nan=-np.inf))
    best = ranked[0]
    seeds = max(len(x) for x in final.values())
    end = int(run.steps[-1])
    said = []
    result = f"<b>{_interval(statistics.interval(final[best]))}</b>"
    if len(final) == 1:
        said.append(f"Final return {result}.")
    else:
        name = escape(_shown(run, best))
        said.append(f"<b>{name}</b> is the best of {len(final)} variants: final return {result}.")
        lead = statistics.difference(final[ranked[1]], final[best])
        if lead.low <= 0:
            said[-1] += f" Its lead over {escape(ranked[1])} is too small to be sure of."
    span = f"{end:,} environment steps on {escape(config['env'])}, preset {config['preset']}"
    if end < config["steps"]:
        span = f"Not finished: {end:,} of {config['steps']:,}{span.removeprefix(f'{end:,}')}"
    said.append(
        f"{span}, {seeds} seed{'s' if seeds > 1 else ''}{' a variant' if len(final) > 1 else ''}. "
        + (
            "Ranges are 95 % t intervals over seeds."
            if seeds > 1
            else "<b>One seed has no interval</b>: only large differences mean anything."
        )
    )
    if "none" in final:
        said += [_against_none(run, v, final) for v in final if v != "none"]
    dropped = max((line.get("dropped") or 0 for line in run.metrics["time"]), default=0)
    if dropped:
        said.append(f"{dropped:,} transitions were dropped because the physics gave no number.")
    return said


def _against_none(run: Run, variant: str, final: Mapping[str, np.ndarray]) -> str:
    gap = statistics.difference(final["none"], final[variant])
    clear = gap.low > 0 or gap.high < 0
    direction = "above" if gap.point > 0 else "below"
    text = f"<b>{escape(variant)}</b> ends {abs(gap.point):,.0f} {direction} none"
    if np.isfinite(gap.low):
        text += f" (95 % interval of the difference {gap.low:,.0f} to {gap.high:,.0f})"
        text += "" if clear else ", which is no clear difference"
    before, after = reward_fit(run, "none"), reward_fit(run, variant)
    if not np.isfinite(before) or not np.isfinite(after):
        return text + "."
    values = f"its reward model's R² is {after:.2f}, against {before:.2f} for none"
    better, helps = after - before > _NOTICEABLE, clear and gap.point > 0
    if better and helps:
        verdict = ": the paper's explanation, a reward that the model could not see, fits"
    elif better:
        verdict = ": the reward is learned better, but that has not raised the return"
    elif clear and abs(after - before) <= _NOTICEABLE:
        verdict = ": about the same, so the reward model does not explain the difference"
    elif helps:
        verdict = ": the reward is learned worse, so something else must have helped"
    else:
        verdict = ""
    return f"{text}; {values}{verdict}."


def reward_fit(run: Run, variant: str) -> float:
    """R² of the reward on the holdout: median over seeds and the later half of the fits."""
    _, values = series(run, "fit", "r2_reward").get(variant, (None, np.empty((0, 0))))
    late = values[:, values.shape[1] // 2 :]
    return float(np.median(late[np.isfinite(late)])) if np.isfinite(late).any() else np.nan


def _final_table(run: Run) -> list[dict[str, str]]:
    """A line for each variant: what the page's first table shows."""
    rows = []
    modelled = run.config["algo"] == "mbpo"
    for variant, values in run.evals.items():
        if not run.steps.size:
            continue
        r2 = reward_fit(run, variant)
        peak = np.nanmax(statistics.interval(values).point, initial=-np.inf)
        rows.append(
            {
                "variant": _shown(run, variant),
                "final return (95 % interval)": _interval(statistics.interval(values[:, -1])),
                "best evaluation": f"{peak:,.0f}" if np.isfinite(peak) else "-",
                **({"reward R²": f"{r2:.2f}" if np.isfinite(r2) else "-"} if modelled else {}),
                "seeds": str(len(values)),
            }
        )
    return rows


def _interval(value: statistics.Interval) -> str:
    digits = 0 if np.nanmax(np.abs([*value, 0.0])) >= 100 else 1
    middle, low, high = (f"{round(float(x), digits) + 0.0:,.{digits}f}" for x in value)
    if not np.isfinite(value.point):
        return "not a number"
    return f"{middle} ({low} to {high})" if np.isfinite(value.low) else middle


def _shown(run: Run, variant: str) -> str:
    return "SAC" if run.config["algo"] == "sac" and variant == "none" else variant


def _model_story(run: Run) -> dict[str, list[tuple[Panel, str]]]:
    def fit(name: str) -> Series:
        return series(run, "fit", name)

    return {
        "The model's story": [
            (
                Panel(fit("r2_reward"), "R² of the reward", "Reward learned?", floor=-1.0),
                "Share of the reward's variation that the model predicts on transitions it was not "
                "trained on: 1 is perfect, 0 no better than always saying the average (below -1 is cut "
                "off). The agent cannot climb a reward that its model does not see.",
            ),
            (
                Panel(fit("r2_state"), "R² of the state's change", "State learned?", floor=-1.0),
                "The same for how the state changes in a step, the median over the state's channels.",
            ),
            (
                Panel(
                    fit("scale_ratio"),
                    "state over reward variance",
                    "Reward drowned out?",
                    scale="log",
                ),
                "Variance of all state targets over that of the reward target, as the network sees "
                "them. Where it is many thousands, the loss hardly feels the reward.",
            ),
            (
                Panel(
                    fit("real_reward_mean"),
                    "mean reward of a step",
                    "Reward biased?",
                    fit("model_reward_mean"),
                ),
                "Mean reward on held-out transitions: solid what the environment gave, dotted what the "
                "model says. The gap is a bias that the agent learns from.",
            ),
            (
                Panel(fit("score"), "mean squared error", "Held-out error", scale="log"),
                "Error on held-out transitions in the network's own units. These differ between "
                "variants: compare shapes, not heights. A rise means overfitting, or new ground.",
            ),
            (
                Panel(fit("nll"), "negative log-likelihood", "Training loss"),
                "The loss that the fits minimise, on held-out transitions, in the network's own units: "
                "again compare shapes.",
            ),
            (
                Panel(
                    fit("spread"),
                    "standard deviation of means",
                    "Do the members agree?",
                    scale="log",
                ),
                "How far the ensemble's members are apart, in the network's own units. It falls as data "
                "pin the dynamics down, and rises where the agent explores.",
            ),
            (
                Panel(
                    fit("noise"),
                    "standard deviation",
                    "How noisy does the world look?",
                    scale="log",
                ),
                "The noise that the members see in the world, in the network's own units. Much more than "
                "the error above is noise that the model made up, and rollouts add it to every step.",
            ),
            (
                Panel(
                    fit("inside_80"),
                    "share of held-out transitions",
                    "Does it know its errors?",
                    include=0.8,
                ),
                "Share of the true values inside the intervals that should hold 80 % of them. Less is "
                "overconfidence, more is needless noise.",
            ),
            (
                Panel(fit("fit_steps"), "gradient steps of a fit", "Work of each fit"),
                "How long each refit trained. With early stopping a short fit had nothing left to gain.",
            ),
        ]
    }


def _critic_story(run: Run) -> dict[str, list[tuple[Panel, str]]]:
    def learn(name: str) -> Series:
        return series(run, "learn", name)

    q = learn("q_mean")
    huge = any(np.nanmax(np.abs(v), initial=0) > 1e4 for _, v in q.values())
    synthetic = learn("synthetic_reward_mean")
    reward = "Mean reward in the agent's minibatches" + (
        ": solid from real transitions, dotted from the model's. If they part, the agent is "
        "learning in a world that is not the one it is tested in."
        if synthetic
        else "."
    )
    diagnosed = [
        (
            Panel(
                series(run, "diagnosis", "critic_bias"),
                "share of the mean return",
                "Is the critic right?",
                include=0.0,
            ),
            "By experiments/diagnose.py: the critic's value less the entropy-corrected return that "
            "the current policy really gets, over its mean. Below 0 it underestimates.",
        ),
        (
            Panel(
                series(run, "diagnosis", "policy_reward_bias"),
                "standard deviations",
                "Is its reward biased?",
                series(run, "diagnosis", "synthetic_reward_bias"),
                include=0.0,
            ),
            "By experiments/diagnose.py: mean reward by the model less the real one, solid where the "
            "policy goes, dotted in the synthetic transitions.",
        ),
    ]
    return {
        "The critic's story": [
            *diagnosed,
            (
                Panel(
                    q,
                    "value",
                    "Value estimates",
                    learn("target_mean"),
                    scale="symlog" if huge else "linear",
                ),
                "Solid: what the critic expects of the states it trains on (discounted return). Dotted: "
                "the target it is pulled towards. Both should grow with the return, and stay together; "
                "growth without bound is divergence.",
            ),
            (
                Panel(learn("start_value"), "value", "Expected, and real", learn("start_return")),
                "Solid: what the critic expects in the first states of the evaluation's episodes. Dotted: "
                "the discounted return that the deterministic policy had there, without SAC's reward for "
                "randomness. Solid far below dotted is underestimation; experiments/diagnose.py --run "
                "measures it exactly.",
            ),
            (
                Panel(learn("critic_loss"), "squared error", "Critic loss", scale="log"),
                "How far the critic is from its targets. It grows with the values; sudden jumps are a "
                "warning.",
            ),
            (
                Panel(
                    learn("real_reward_mean"),
                    "mean reward of a step",
                    "What the agent is fed",
                    synthetic,
                ),
                reward,
            ),
            (
                Panel(learn("temperature"), "temperature (alpha)", "Temperature", scale="log"),
                "The price of randomness, tuned so that the entropy meets its target. It should fall "
                "and settle; one that keeps rising says that the policy has collapsed.",
            ),
            (
                Panel(learn("entropy"), "entropy (nats)", "Entropy"),
                "How random the policy's actions are. It should settle at the target, minus half the "
                "number of action dimensions unless it was set otherwise.",
            ),
        ]
    }


def _time(run: Run) -> str:
    if not run.metrics["time"]:
        return ""
    clock = run.metrics["time"][-1]
    seconds = {stage: float(s or 0) for stage, s in (clock.get("seconds") or {}).items()}
    total = sum(seconds.values()) or 1.0
    rows = [
        [
            escape(stage),
            f"{s:,.1f} s",
            f"{s / total:.0%}",
            f'<div class="bar" style="width:{240 * s / total:.0f}px"></div>',
        ]
        for stage, s in seconds.items()
    ]
    wall, rate = (float(clock.get(k) or 0) for k in ("wall_seconds", "steps_per_second"))
    spent = f"{wall / 3600:,.1f} hours" if wall >= 3600 else f"{wall / 60:,.1f} minutes"
    return (
        f"<h2>Where the time went</h2><p>{spent} in all, {rate:,.1f} environment "
        "steps a second (of every seed and variant at once).</p>"
        f"{figures.html_table(['stage', 'time', 'share', ''], rows)}"
    )


def _provenance(info: Mapping[str, Any]) -> str:
    flat: dict[str, Any] = {}
    for name, value in info["config"].items():
        flat |= (
            {f"{name}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )

    def listed(values: Mapping[str, Any]) -> str:
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
        return figures.html_table(
            ["name", "value"], [[escape(k), escape(v)] for k, v in texts.items()]
        )

    origin = {k: info.get(k) for k in ("device", "git_commit") if info.get(k)}
    counts = {f"{name} parameters": f"{n:,}" for name, n in (info.get("parameters") or {}).items()}
    versions = {k: v for k, v in (info.get("versions") or {}).items() if v}
    command = f"<pre>{escape(info['command'])}</pre>" if info.get("command") else ""
    return (
        f"<h2>How to repeat it</h2>{command}"
        f"<details><summary>Configuration</summary>{listed(flat)}</details>"
        f"<details><summary>Versions and device</summary>"
        f"{listed({**origin, **counts, **versions})}</details>"
    )
