"""Write the diagnosis of a run as a report, and its numbers as CSV.

Each number is of one learner at one checkpoint. The report shows measured values and explains how
to read them; it does not name causes.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynajax.config import Config
from dynajax.diagnose import measures
from dynajax.diagnose.online import Findings
from dynajax.diagnose.rollout_plots import path_images
from dynajax.networks.normalization import SMALLEST_STD
from dynajax.report import charts, figures, html
from dynajax.report.charts import Chart
from dynajax.report.dimensions import label_dims
from dynajax.report.figures import Panel, Series
from dynajax.report.html import Table
from dynajax.report.statistics import R2, UNBOUNDED, Bounds, format_mean
from dynajax.runs.directory import write_atomically, write_csv
from dynajax.runs.lock import try_lock
from dynajax.types import EnvSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CRITIC = (
    Chart(
        "critic_bias",
        "Bias of the critic",
        "share of the mean return",
        "The critic's value minus the return, relative to the mean absolute return, from states of the "
        "replay buffer: below 0 it underestimates. The return is the discounted return of the "
        "current policy in the simulator, with the entropy bonus of SAC.",
        include=0.0,
    ),
    Chart(
        "critic_value",
        "Values and returns",
        "value",
        "Solid: the critic's value, mean over states. Dotted: the return.",
        dotted="critic_return",
    ),
)
MODEL = (
    Chart(
        "policy_reward_bias",
        "Bias of the predicted reward",
        "standard deviations",
        "Mean reward of the model minus the real one, in standard deviations of the real one. "
        "Solid: in states that the current policy visits. Dotted: on the replay buffer.",
        dotted="replay_reward_bias",
        include=0.0,
    ),
    Chart(
        "policy_reward_r2",
        "R² of the reward",
        "R²",
        "R² of the reward (values below -1 are clipped). Solid: in states that the policy visits. "
        "Dotted: on the replay buffer, which contains the model's training data.",
        dotted="replay_reward_r2",
        r2=True,
    ),
    Chart(
        "policy_state_r2",
        "R² of the state's change",
        "R²",
        "The same for the change of the state, median dimension.",
        dotted="replay_state_r2",
        r2=True,
    ),
    Chart(
        "counterfactual_reward_r2",
        "New actions in known states: reward",
        "R²",
        "The simulator is set to states of the replay buffer and takes the current policy's "
        "action. Solid: R² of the model's mean. Dotted: R² of the synthetic transitions that the "
        "critic trains on, which are sampled, some of them from older models.",
        dotted="synthetic_reward_r2",
        r2=True,
    ),
    Chart(
        "counterfactual_state_r2",
        "New actions in known states: state",
        "R²",
        "The same for the change of the state, median dimension.",
        dotted="synthetic_state_r2",
        r2=True,
    ),
)
_STD_CAPTION = """Predicted standard deviations by dimension of the observation, in the units of the
dimension: aleatoric (circles, the noise that the members predict) and epistemic (crosses, between the
means of the members). In states that the policy visits, at the last checkpoint, mean over seeds."""
#: Measure of multi-step predictions -> title and caption.
_OPEN_LOOP = {
    "state_r2": (
        "State",
        "The model continues from its own predictions with the policy's actions, compared with "
        "the simulator: R² of the state's change since the start (median dimension). Below 0 a "
        "rollout of that length is worse than the mean change.",
    ),
    "reward_r2": ("Reward", "The same for the sum of the rewards so far."),
}


def series(findings: Sequence[Findings], name: str) -> Series:
    """Return a number over training: steps (T,) and values (seeds, T) by variant.

    A variant without values is left out.
    """
    curves = {}
    for variant in _variants(findings):
        found = [f for f in findings if f.variant == variant]
        steps, seeds = (sorted({getattr(f, axis) for f in found}) for axis in ("step", "seed"))
        at = {(f.seed, f.step): f.numbers.get(name, np.nan) for f in found}
        values = np.array([[at.get((s, t), np.nan) for t in steps] for s in seeds])
        if np.isfinite(values).any():
            curves[variant] = np.array(steps), values
    return curves


def _frames_at(findings: Sequence[Findings], variant: str, steps: np.ndarray) -> np.ndarray:
    """Return the frames (T,) at steps (T,) with findings, mean over the seeds of a variant."""
    found = [f for f in findings if f.variant == variant]
    return np.array([np.mean([f.frames for f in found if f.step == step]) for step in steps])


def _variants(findings: Sequence[Findings]) -> list[str]:
    return list(dict.fromkeys(f.variant for f in findings))


def _bounds(name: str) -> Bounds:
    """Return the lowest and the highest value that a number can have."""
    return R2 if name.endswith("_r2") else UNBOUNDED


def _last(findings: Sequence[Findings]) -> list[Findings]:
    """Return the findings at the newest checkpoint."""
    newest = max(f.step for f in findings)
    return [f for f in findings if f.step == newest]


def sentences(findings: Sequence[Findings]) -> list[str]:
    """Describe the last checkpoint of each variant.

    The sentences are plain text in which ** marks emphasis.
    """
    items = []
    for variant in _variants(findings):
        numbers = [f.numbers for f in _last([f for f in findings if f.variant == variant])]
        names = dict.fromkeys(n for of_seed in numbers for n in of_seed)
        text = {
            n: format_mean([of_seed.get(n, np.nan) for of_seed in numbers], _bounds(n))
            for n in names
        }
        parts = []
        if "critic_bias" in text:
            parts.append(
                "the critic's value is {critic_value} and the return {critic_return}, a difference "
                "of {critic_bias} of the mean absolute return (below 0 is underestimation)"
            )
        if "policy_reward_r2" in text:
            parts.append(
                "in states that the policy visits the model has R² {policy_reward_r2} of the "
                "reward, with a bias of {policy_reward_bias} standard deviations, and R² "
                "{policy_state_r2} of the state's change"
            )
        if "synthetic_reward_r2" in text:
            parts.append(
                "the synthetic transitions that the critic trains on, compared with the simulator "
                "from the same states and actions, have R² {synthetic_reward_r2} of the reward, "
                "with a bias of {synthetic_reward_bias} standard deviations, and R² "
                "{synthetic_state_r2} of the state's change"
            )
        body = "; ".join(parts).format_map(text) if parts else "no path could be followed"
        items.append(f"**{variant}**: {body}.")
    return items


def write(
    findings: Sequence[Findings], config: Config, spec: EnvSpec, folder: Path, command: str
) -> list[str]:
    """Write diagnosis.html, run.csv and run-dims.csv.

    Returns:
      The sentences of the report, see `sentences`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(n for f in findings for n in f.numbers))
    learners = [
        {"variant": f.variant, "seed": f.seed, "step": f.step, "frames": f.frames} for f in findings
    ]
    numbers = [{n: f.numbers.get(n, float("nan")) for n in names} for f in findings]
    write_csv(folder / "run.csv", [w | n for w, n in zip(learners, numbers, strict=True)])
    dims = [
        w | {"dim": dim} | {n: float(v[d]) for n, v in f.dims.items()}
        for w, f in zip(learners, findings, strict=True)
        if f.dims
        for d, dim in enumerate(spec.obs_names)
    ]
    if dims:
        write_csv(folder / "run-dims.csv", dims)
    lines = sentences(findings)
    write_atomically(folder / "diagnosis.html", _html(findings, lines, config, spec, command))
    return lines


def add_to_logs(findings: Sequence[Findings], folder: Path) -> bool:
    """Append the numbers to the run's metrics.jsonl, as lines of kind "diagnosis".

    A run that is resumed later cuts its logs back to its last checkpoint; run.csv stays.

    Returns:
      False if the run is still in progress, whose logs are left alone.

    Raises:
      OSError: the folder cannot be written; the logs are unchanged.
    """
    with open(folder / "lock", "a") as lock:
        if not try_lock(lock):
            return False
        path = folder / "metrics.jsonl"
        content = path.read_bytes() if path.exists() else b""
        # A run that was killed, or whose disk was full, leaves an incomplete last line.
        content = content[: content.rfind(b"\n") + 1]
        for f in findings:
            numbers = {n: v if np.isfinite(v) else None for n, v in f.numbers.items()}
            line = {"kind": "diagnosis", "variant": f.variant, "seed": f.seed, "step": f.step}
            content += (json.dumps(line | numbers, allow_nan=False) + "\n").encode()
        write_atomically(path, content)
    return True


def _html(
    findings: Sequence[Findings], lines: Sequence[str], config: Config, spec: EnvSpec, command: str
) -> bytes:
    style = figures.styles(_variants(findings))
    last = _last(findings)
    frames_at = partial(_frames_at, findings) if config.task.repeat > 1 else None
    get = partial(series, findings)
    context: dict[str, Any] = {}
    if any(f.dims for f in findings):
        predicted_std = html.image("", figures.png(_draw_std(last, spec)), _STD_CAPTION)
        context = {
            "model": html.figure_grid(charts.panels(MODEL, get, frames_at), style),
            "predicted_std": predicted_std,
            "open_loop": html.figure_grid(_open_loop_panels(last), style),
            "paths": path_images(last, config, spec),
        }
    return html.render(
        "online_diagnosis",
        title=f"{config.env}: critic and model of a run compared with the simulator",
        sentences=[*lines, _states(findings, config)],
        critic=html.figure_grid(charts.panels(CRITIC, get, frames_at), style),
        step=last[0].step,
        frames=last[0].frames,
        numbers=_numbers(last),
        command=command,
        **context,
    )


def _states(findings: Sequence[Findings], config: Config) -> str:
    """Explain where the physics states come from, or why there are none and what is left out."""
    without = (
        "so some measures are left out: the critic is measured from first states, and there is no "
        "counterfactual error and no check of the synthetic buffer."
    )
    if config.engine != "host":
        return (
            "The run's physics were on the device, so its states cannot be rebuilt on the host: the "
            "critic is measured from first states, in C MuJoCo."
        )
    error = next((f.restore_error for f in findings if f.restore_error is not None), None)
    if error is not None:
        return (
            "This task's simulator cannot be set to a stored state: from there it does not lead to "
            f"the recorded transition, bit for bit ({error}), {without}"
        )
    resimulated = sum(f.numbers.get("resimulated", 0) for f in findings)
    differ = sum(f.numbers.get("not_reproduced", 0) for f in findings)
    if resimulated:
        return (
            f"{resimulated:,.0f} transitions were simulated again from the seeds of their episodes "
            f"to get physics states; {differ:,.0f} were not reproduced bit for bit and are left out."
        )
    return f"This task's simulator cannot be set to a stored state, {without}"


def _open_loop_panels(last: Sequence[Findings]) -> list[tuple[Panel, str]]:
    panels = []
    for name, (title, caption) in _OPEN_LOOP.items():
        lines = {}
        for variant in _variants(last):
            measured = [
                f.open_loop[name] for f in last if f.variant == variant and f.open_loop is not None
            ]
            if measured:
                values = np.stack([measures.median(m) if m.ndim > 1 else m for m in measured])
                lines[variant] = np.arange(1, values.shape[1] + 1), np.clip(values, -1, 1)
        panels.append((Panel(lines, "R²", title, bounds=R2, xlabel="steps"), caption))
    return panels


def _draw_std(last: Sequence[Findings], spec: EnvSpec) -> "Figure":
    """Draw the predicted standard deviations by dimension."""
    variants = _variants(last)
    style = figures.styles(variants)
    x = np.arange(spec.obs_dim)
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, (9.6, 3.2))
        for i, variant in enumerate(variants):
            dims = [f.dims for f in last if f.variant == variant and f.dims]
            if not dims:
                continue
            offset = (i - (len(variants) - 1) / 2) * 0.15
            aleatoric, epistemic = (
                np.maximum(np.mean([of_seed[n] for of_seed in dims], 0), SMALLEST_STD)
                for n in ("aleatoric_std", "epistemic_std")
            )
            colour = style[variant]["color"]
            axes.scatter(x + offset, aleatoric, 12, color=colour, label=variant)
            axes.scatter(x + offset, epistemic, 16, color=colour, marker="x")
        axes.set_yscale("log")
        axes.set_ylabel("standard deviation")
        axes.set_title("Aleatoric (circles) and epistemic (crosses) standard deviation")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        label_dims(axes, spec.obs_names)
    return figure


def _numbers(last: Sequence[Findings]) -> Table:
    variants = _variants(last)
    rows = []
    for name in dict.fromkeys(n for f in last for n in f.numbers):
        cells = [
            format_mean(
                [f.numbers.get(name, np.nan) for f in last if f.variant == variant], _bounds(name)
            )
            for variant in variants
        ]
        rows.append([name.replace("_", " "), *cells])
    return Table(["", *variants], rows)
