"""The diagnosis of a run as a page, and its numbers as CSV.

Every number is of one row at one checkpoint; the page shows what was measured beside what it means
in general, and says no cause.
"""

import fcntl
import json
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dynajax.config import Config, as_dict
from dynajax.diagnose import measures
from dynajax.diagnose.online import Findings
from dynajax.diagnose.rollout_plots import strips
from dynajax.report import charts, figures, html
from dynajax.report.charts import Chart
from dynajax.report.dimensions import by_channel
from dynajax.report.figures import Panel, Series
from dynajax.report.run import current
from dynajax.report.statistics import over_seeds
from dynajax.runs.directory import write_atomically, write_csv
from dynajax.types import EnvSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CRITIC = (
    Chart(
        "critic_bias",
        "Is the critic right?",
        "share of the mean return",
        "What the critic expects less what comes, over the mean return, from states of the replay: "
        "below 0 it underestimates. What comes is the discounted return of the current policy in "
        "the real simulator, with SAC's reward for randomness.",
        include=0.0,
    ),
    Chart(
        "critic_value",
        "Expected, and real",
        "value",
        "Solid: the critic's value, mean over states. Dotted: what came.",
        dotted="critic_return",
    ),
)
MODEL = (
    Chart(
        "policy_reward_bias",
        "Is its reward biased?",
        "standard deviations",
        "Mean reward by the model less the real one, in standard deviations of the real: solid in "
        "states that the current policy visits, dotted on the replay.",
        dotted="replay_reward_bias",
        include=0.0,
    ),
    Chart(
        "policy_reward_r2",
        "Is the reward predicted?",
        "share predicted",
        "R² of the reward (below -1 is cut off): solid where the policy goes, dotted on the replay, "
        "which includes what the model was trained on.",
        dotted="replay_reward_r2",
        share=True,
    ),
    Chart(
        "policy_state_skill",
        "Is the state's change predicted?",
        "share predicted",
        "The same for the change of the state, in the median channel.",
        dotted="replay_state_skill",
        share=True,
    ),
    Chart(
        "counterfactual_reward_r2",
        "Other actions in the same states: reward",
        "share predicted",
        "The simulator is set to states of the replay and takes the current policy's action. "
        "Solid: R² of the model's mean. Dotted: of the synthetic transitions that the critic "
        "trains on, which are sampled and may be of older models.",
        dotted="synthetic_reward_r2",
        share=True,
    ),
    Chart(
        "counterfactual_state_skill",
        "Other actions in the same states: state",
        "share predicted",
        "The same for the change of the state, in the median channel.",
        dotted="synthetic_state_skill",
        share=True,
    ),
)
_NOISE = """What the model says that it cannot know, by channel of the observation and in the
channel's change: noise it sees in the world (circles), and how far its members disagree (crosses). In
states that the policy visits, at the last checkpoint, mean over seeds."""
#: Of a chain of predictions -> title and caption.
_CHAINS = {
    "open_skill": (
        "The state",
        "The model fed with its own predictions and the policy's real actions, against the "
        "simulator: how much of the state's change since the start it predicts (median channel). "
        "Below 0 a rollout of that length says less than the mean change.",
    ),
    "open_reward_r2": ("The reward", "The same for the sum of the rewards up to there."),
}


def series(findings: Sequence[Findings], name: str) -> Series:
    """One number of every variant along training: steps (T,), values (seeds, T); variants without
    one are left out."""
    curves = {}
    for variant in dict.fromkeys(f.variant for f in findings):
        rows = [f for f in findings if f.variant == variant]
        steps, seeds = (sorted({getattr(f, axis) for f in rows}) for axis in ("step", "seed"))
        at = {(f.seed, f.step): f.numbers.get(name, np.nan) for f in rows}
        values = np.array([[at.get((s, t), np.nan) for t in steps] for s in seeds])
        if np.isfinite(values).any():
            curves[variant] = np.array(steps), values
    return curves


def _last(findings: Sequence[Findings]) -> list[Findings]:
    """Those of the newest checkpoint."""
    newest = max(f.step for f in findings)
    return [f for f in findings if f.step == newest]


def sentences(findings: Sequence[Findings]) -> list[str]:
    """What was measured at the last checkpoint, an item of HTML for each variant."""
    items = []
    for variant in dict.fromkeys(f.variant for f in findings):
        rows = [f.numbers for f in _last([f for f in findings if f.variant == variant])]
        names = dict.fromkeys(n for numbers in rows for n in numbers)
        text = {n: over_seeds([numbers.get(n, np.nan) for numbers in rows]) for n in names}
        parts = []
        if "critic_bias" in text:
            parts.append(
                "the critic expects {critic_value} where {critic_return} comes, a difference of "
                "{critic_bias} of the mean return (below 0 is underestimation)"
            )
        if "policy_reward_r2" in text:
            parts.append(
                "in states that the policy visits the model predicts the reward with R² "
                "{policy_reward_r2}, {policy_reward_bias} standard deviations off on average, and "
                "the state's change with skill {policy_state_skill}"
            )
        if "synthetic_reward_r2" in text:
            parts.append(
                "synthetic transitions that the critic trains on, against the simulator from the "
                "same states and actions: reward R² {synthetic_reward_r2}, "
                "{synthetic_reward_bias} standard deviations off on average, state skill "
                "{synthetic_state_skill} (1 is all of the variation, 0 none)"
            )
        body = "; ".join(parts).format_map(text) if parts else "no path could be followed"
        items.append(f"<b>{escape(variant)}</b>: {body}.")
    return items


def repeat(config: Config) -> int:
    """Frames of an environment step."""
    return int(current(as_dict(config))["task"]["repeat"])


def write(
    findings: Sequence[Findings], config: Config, spec: EnvSpec, folder: Path, command: str
) -> list[str]:
    """Writes diagnosis.html, run.csv and run-channels.csv; gives back the sentences."""
    items = sentences(findings)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(n for f in findings for n in f.numbers))
    whose = [
        {"variant": f.variant, "seed": f.seed, "step": f.step, "frames": repeat(config) * f.step}
        for f in findings
    ]
    numbers = [{n: f.numbers.get(n, float("nan")) for n in names} for f in findings]
    write_csv(folder / "run.csv", [w | n for w, n in zip(whose, numbers, strict=True)])
    channels = [
        w | {"channel": channel} | {n: float(v[d]) for n, v in f.channels.items()}
        for w, f in zip(whose, findings, strict=True)
        if f.channels
        for d, channel in enumerate(spec.obs_names)
    ]
    if channels:
        write_csv(folder / "run-channels.csv", channels)
    html = _html(findings, items, config, spec, command)
    write_atomically(folder / "diagnosis.html", html.encode())
    return items


def add_to_logs(findings: Sequence[Findings], folder: Path) -> bool:
    """Writes the numbers into the run's metrics.jsonl too, as lines of the kind "diagnosis".

    A run that goes on later cuts its logs back to its last checkpoint; run.csv stays.

    Returns:
      Whether it was done: a run that is under way is left alone.
    """
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        with open(folder / "metrics.jsonl", "a") as file:
            for f in findings:
                numbers = {n: v if np.isfinite(v) else None for n, v in f.numbers.items()}
                line = {"kind": "diagnosis", "variant": f.variant, "seed": f.seed, "step": f.step}
                file.write(json.dumps(line | numbers, allow_nan=False) + "\n")
    return True


def _html(
    findings: Sequence[Findings], items: Sequence[str], config: Config, spec: EnvSpec, command: str
) -> str:
    style = figures.styles(list(dict.fromkeys(f.variant for f in findings)))
    last = _last(findings)
    frames = repeat(config)
    get = partial(series, findings)
    parts = [
        f'<p class="lead">{items[0]}</p>',
        html.bullets([*items[1:], escape(_states(findings, config))]),
        "<h2>The critic</h2>",
        html.story(charts.panels(CRITIC, get, frames), style),
    ]
    if any(f.channels for f in findings):
        parts += [
            "<h2>The model</h2>",
            html.story(charts.panels(MODEL, get, frames), style),
            html.picture("", figures.png(_noise_picture(last, spec)), _NOISE),
            "<h2>Many steps ahead</h2>",
            html.story(_chain_panels(last), style),
            *strips(last, config, spec),
        ]
    step = last[0].step
    parts += [
        f"<h2>Numbers</h2><p>At the last checkpoint ({step:,} environment steps, "
        f"{frames * step:,} frames), means over seeds; run.csv has all.</p>",
        html.html_table(*_numbers(last)),
        f"<h2>How to repeat it</h2><pre>{escape(command)}</pre>",
    ]
    title = f"{config.env}: this run's critic and model beside the simulator"
    return html.document(title, "".join(parts))


def _states(findings: Sequence[Findings], config: Config) -> str:
    """Where the physics states come from, or why there are none and what is left out."""
    without = (
        "so what needs that is left out: the critic is judged from first states, and there is no "
        "counterfactual error and no check of the synthetic buffer."
    )
    if config.engine != "host":
        return (
            "The run's physics were on the device, so its states cannot be rebuilt on the host: the "
            "critic is judged from first states, in C MuJoCo."
        )
    refused = next((f.refused for f in findings if f.refused is not None), None)
    if refused is not None:
        return (
            "This task's simulator cannot be set to a stored state: set to one, it does not lead to "
            f"the recorded transition, bit for bit ({refused}), {without}"
        )
    repeated = sum(f.numbers.get("repeated", 0) for f in findings)
    differ = sum(f.numbers.get("not_repeated", 0) for f in findings)
    if repeated:
        return (
            f"{repeated:,.0f} transitions were taken again from their episodes' seeds to come to "
            f"physics states; {differ:,.0f} did not repeat bit for bit and are left out."
        )
    return f"This task's simulator cannot be set to a stored state, {without}"


def _chain_panels(last: Sequence[Findings]) -> list[tuple[Panel, str]]:
    panels = []
    for name, (title, caption) in _CHAINS.items():
        lines = {}
        for variant in dict.fromkeys(f.variant for f in last):
            chains = [f.chain[name] for f in last if f.variant == variant and f.chain is not None]
            if chains:
                values = np.stack([measures.median(c) if c.ndim > 1 else c for c in chains])
                lines[variant] = np.arange(1, values.shape[1] + 1), np.clip(values, -1, 1)
        panels.append((Panel(lines, "share predicted", title, xlabel="steps ahead"), caption))
    return panels


def _noise_picture(last: Sequence[Findings], spec: EnvSpec) -> "Figure":
    variants = list(dict.fromkeys(f.variant for f in last))
    style = figures.styles(variants)
    x = np.arange(spec.obs_dim)
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, (9.6, 3.2), (9.6, 3.2))
        for i, variant in enumerate(variants):
            rows = [f.channels for f in last if f.variant == variant and f.channels]
            if not rows:
                continue
            shift = (i - (len(variants) - 1) / 2) * 0.15
            noise, spread = (np.mean([r[n] for r in rows], 0) for n in ("noise", "spread"))
            colour = style[variant]["color"]
            axes.scatter(x + shift, np.maximum(noise, 1e-9), 12, color=colour, label=variant)
            axes.scatter(x + shift, np.maximum(spread, 1e-9), 16, color=colour, marker="x")
        axes.set_yscale("log")
        axes.set_ylabel("standard deviation")
        axes.set_title("Noise (circles) and disagreement (crosses)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        by_channel(axes, spec.obs_names)
    return figure


def _numbers(last: Sequence[Findings]) -> tuple[list[str], list[list[str]]]:
    variants = list(dict.fromkeys(f.variant for f in last))
    rows = []
    for name in dict.fromkeys(n for f in last for n in f.numbers):
        cells = [
            over_seeds([f.numbers.get(name, np.nan) for f in last if f.variant == variant])
            for variant in variants
        ]
        rows.append([escape(name.replace("_", " ")), *map(escape, cells)])
    return ["", *variants], rows
