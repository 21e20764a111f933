"""The diagnosis of a run as a page, and its numbers as CSV."""

import fcntl
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dynajax import envs
from dynajax.config import Config
from dynajax.diagnose import measures, skeleton, verdict
from dynajax.diagnose.online import Findings, Strip
from dynajax.diagnose.page import by_channel
from dynajax.record.folder import write_atomically, write_csv
from dynajax.report import figures
from dynajax.report.figures import Panel, Series
from dynajax.types import EnvSpec

#: A critic that is this far from what comes, as a share of it, is worth a word.
BIASED = 0.2
#: A shift of the mean reward that is worth a word, in standard deviations of the reward.
SHIFTED = 0.2
#: Poses in the strip, and channels beside it.
_POSES, _CHANNELS = 6, 6


def _values(found: Sequence[Findings], variant: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,), and one number of every seed along them (seeds, T)."""
    lines = [f for f in found if f.variant == variant]
    steps = sorted({f.step for f in lines})
    seeds = sorted({f.seed for f in lines})
    value = {(f.seed, f.step): f.numbers.get(name, np.nan) for f in lines}
    return np.array(steps), np.array([[value.get((s, t), np.nan) for t in steps] for s in seeds])


def series(found: Sequence[Findings], name: str) -> Series:
    """One number of every variant along training; variants without one are left out."""
    variants = list(dict.fromkeys(f.variant for f in found))
    curves = {v: _values(found, v, name) for v in variants}
    return {v: c for v, c in curves.items() if np.isfinite(c[1]).any()}


def judge(found: Sequence[Findings]) -> list[str]:
    """What the numbers of the last checkpoint say, a sentence for each variant and matter."""
    said = []
    for variant in dict.fromkeys(f.variant for f in found):

        def last(name: str, variant: str = variant) -> np.ndarray:
            return _values(found, variant, name)[1][:, -1]

        def text(name: str) -> str:
            return verdict.figure(last(name))

        head = f"<b>{escape(variant)}</b>: " + _critic_words(
            last("critic_bias"),
            f"it expects {text('critic_value')} where {text('critic_return')} comes, a bias of "
            f"{text('critic_bias')} of the mean return",
        )
        if np.isfinite(last("policy_reward_r2")).any():
            shift = last("policy_reward_bias")
            biased = abs(np.nanmean(shift)) >= SHIFTED
            head += (
                f". In states that the policy visits the model's reward has R² "
                f"{text('policy_reward_r2')} and is "
                + (
                    f"{'too high' if np.nanmean(shift) > 0 else 'too low'} by "
                    f"{verdict.figure(np.abs(shift))} standard deviations"
                    if biased
                    else f"right on average ({text('policy_reward_bias')} standard deviations off)"
                )
                + f"; the state's change is predicted with skill {text('policy_state_skill')}"
            )
        if np.isfinite(last("synthetic_reward_r2")).any():
            head += (
                f". Of the synthetic transitions that the critic trains on, the same states and "
                f"actions in the simulator say: reward R² {text('synthetic_reward_r2')}, bias "
                f"{text('synthetic_reward_bias')}, state skill {text('synthetic_state_skill')}"
            )
            head += _harm(last("synthetic_reward_r2"), last("synthetic_state_skill"))
        said.append(head + ".")
    return said


def _critic_words(bias: np.ndarray, numbers: str) -> str:
    bias = bias[np.isfinite(bias)]
    if not bias.size or abs(bias.mean()) < BIASED:
        return f"the critic is about right ({numbers})"
    if (bias > 0).any() and (bias < 0).any():
        return f"the critic is wrong, upwards in some seeds and downwards in others ({numbers})"
    return f"the critic {'over' if bias[0] > 0 else 'under'}estimates ({numbers})"


def _harm(reward: np.ndarray, state: np.ndarray) -> str:
    r, s = float(np.nanmean(reward)), float(np.nanmean(state))
    if min(r, s) >= verdict.LEARNED:
        return ": both halves of the model are fair"
    if r < verdict.LEARNED <= s:
        return ": it is the reward that is wrong"
    if s < verdict.LEARNED <= r:
        return ": it is the next state that is wrong"
    return ": reward and next state are both wrong"


def write(
    found: Sequence[Findings], config: Config, spec: EnvSpec, folder: Path, command: str
) -> list[str]:
    """Writes diagnosis.html, run.csv and run-channels.csv; gives back the verdict's sentences."""
    said = judge(found)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(n for f in found for n in f.numbers))
    write_csv(
        folder / "run.csv",
        [
            {
                "variant": f.variant,
                "seed": f.seed,
                "step": f.step,
                **{n: f.numbers.get(n, float("nan")) for n in names},
            }
            for f in found
        ],
    )
    modelled = [f for f in found if f.channels]
    if modelled:
        write_csv(
            folder / "run-channels.csv",
            [
                {
                    "variant": f.variant,
                    "seed": f.seed,
                    "step": f.step,
                    "channel": channel,
                    **{n: float(v[d]) for n, v in f.channels.items()},
                }
                for f in modelled
                for d, channel in enumerate(spec.obs_names)
            ],
        )
    html = _html(found, said, config, spec, command)
    write_atomically(folder / "diagnosis.html", html.encode())
    return said


def add_to_logs(found: Sequence[Findings], folder: Path) -> bool:
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
            for f in found:
                numbers = {n: v if np.isfinite(v) else None for n, v in f.numbers.items()}
                line = {"kind": "diagnosis", "variant": f.variant, "seed": f.seed, "step": f.step}
                file.write(json.dumps(line | numbers, allow_nan=False) + "\n")
    return True


def _html(
    found: Sequence[Findings], said: Sequence[str], config: Config, spec: EnvSpec, command: str
) -> str:
    style = figures.styles(list(dict.fromkeys(f.variant for f in found)))
    last = [f for f in found if f.step == max(x.step for x in found)]
    repeated = sum(f.numbers.get("repeated", 0) for f in found)
    differ = sum(f.numbers.get("not_repeated", 0) for f in found)
    if repeated:
        note = (
            f"{repeated:,.0f} transitions were taken again from their episodes' seeds to come to "
            f"physics states; {differ:,.0f} did not repeat bit for bit and are left out."
        )
    else:
        note = (
            "This task's simulator cannot be set to a stored state, so what needs that is left "
            "out: the critic is judged from first states, and there is no counterfactual error "
            "and no check of the synthetic buffer."
            if config.engine == "host"
            else "The run's physics were on the device, so its states cannot be rebuilt on the host: "
            "the critic is judged from first states, in C MuJoCo."
        )
    parts = [
        f'<p class="lead">{said[0]}</p>',
        f"<ul>{''.join(f'<li>{s}</li>' for s in said[1:])}<li>{escape(note)}</li></ul>",
        "<h2>The critic</h2>",
        figures.story(_critic(found), style),
    ]
    if any(f.channels for f in found):
        parts += [
            "<h2>The model</h2>",
            figures.story(_model(found), style),
            figures.picture(
                "",
                figures.png(_noise_picture(last, spec)),
                "What the model says that it cannot know, by channel of the observation and in "
                "the channel's change: noise it sees in the world (circles), and how far its "
                "members disagree (crosses). In states that the policy visits, at the last "
                "checkpoint, mean over seeds.",
            ),
        ]
        chains = _chain_panels(last)
        parts += ["<h2>Many steps ahead</h2>", figures.story(chains, style)]
        parts += _strips(last, config, spec)
    parts += [
        "<h2>Numbers</h2><p>At the last checkpoint, means over seeds; run.csv has all.</p>",
        figures.html_table(*_numbers(last)),
        f"<h2>How to repeat it</h2><pre>{escape(command)}</pre>",
    ]
    return figures.document(
        f"{config.env}: where this run's critic and model are wrong", "".join(parts)
    )


def _critic(found: Sequence[Findings]) -> list[tuple[Panel, str]]:
    return [
        (
            Panel(
                series(found, "critic_bias"),
                "share of the mean return",
                "Is the critic right?",
                include=0.0,
            ),
            "What the critic expects less what comes, over the mean return, from states of the "
            "replay: below 0 it underestimates. What comes is the discounted return of the current "
            "policy in the real simulator, with SAC's reward for randomness.",
        ),
        (
            Panel(
                series(found, "critic_value"),
                "value",
                "Expected, and real",
                series(found, "critic_return"),
            ),
            "Solid: the critic's value, mean over states. Dotted: what came.",
        ),
    ]


def _model(found: Sequence[Findings]) -> list[tuple[Panel, str]]:
    def clipped(name: str) -> Series:
        return {n: (t, np.clip(v, -1, 1)) for n, (t, v) in series(found, name).items()}

    return [
        (
            Panel(
                series(found, "policy_reward_bias"),
                "standard deviations",
                "Is its reward biased?",
                series(found, "replay_reward_bias"),
                include=0.0,
            ),
            "Mean reward by the model less the real one, in standard deviations of the real: solid "
            "in states that the current policy visits, dotted on the replay.",
        ),
        (
            Panel(
                clipped("policy_reward_r2"),
                "share predicted",
                "Is the reward predicted?",
                clipped("replay_reward_r2"),
            ),
            "R² of the reward (below -1 is cut off): solid where the policy goes, dotted on the "
            "replay, which includes what the model was trained on.",
        ),
        (
            Panel(
                clipped("policy_state_skill"),
                "share predicted",
                "Is the state's change predicted?",
                clipped("replay_state_skill"),
            ),
            "The same for the change of the state, in the median channel.",
        ),
        (
            Panel(
                clipped("counterfactual_reward_r2"),
                "share predicted",
                "Other actions in the same states: reward",
                clipped("synthetic_reward_r2"),
            ),
            "The simulator is set to states of the replay and takes the current policy's action. "
            "Solid: R² of the model's mean. Dotted: of the synthetic transitions that the critic "
            "trains on, which are sampled and may be of older models.",
        ),
        (
            Panel(
                clipped("counterfactual_state_skill"),
                "share predicted",
                "Other actions in the same states: state",
                clipped("synthetic_state_skill"),
            ),
            "The same for the change of the state, in the median channel.",
        ),
    ]


def _chain_panels(last: Sequence[Findings]) -> list[tuple[Panel, str]]:
    def curves(name: str) -> Series:
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for variant in dict.fromkeys(f.variant for f in last):
            chains = [f.chain[name] for f in last if f.variant == variant and f.chain is not None]
            if chains:
                values = np.stack([measures.median(c) if c.ndim > 1 else c for c in chains])
                found[variant] = np.arange(1, values.shape[1] + 1), np.clip(values, -1, 1)
        return found

    return [
        (
            Panel(curves("open_skill"), "share predicted", "The state", xlabel="steps ahead"),
            "The model fed with its own predictions and the policy's real actions, against the "
            "simulator: how much of the state's change since the start it predicts (median channel). "
            "Below 0 a rollout of that length says less than nothing.",
        ),
        (
            Panel(curves("open_reward_r2"), "share predicted", "The reward", xlabel="steps ahead"),
            "The same for the sum of the rewards up to there.",
        ),
    ]


def _noise_picture(last: Sequence[Findings], spec: EnvSpec) -> Any:
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


def _strips(last: Sequence[Findings], config: Config, spec: EnvSpec) -> list[str]:
    """A strip for every variant's first seed: imagined against real."""
    parts = ["<h2>Imagined against real</h2>"]
    for variant in dict.fromkeys(f.variant for f in last):
        found = next((f for f in last if f.variant == variant and f.strip is not None), None)
        if found is None or found.strip is None:
            continue
        strip, poses = found.strip, None
        if strip.states is not None:
            env: Any = envs.make(config.env, time_limit=config.host.time_limit, seed=found.seed)
            poses = skeleton.sticks(env, strip.states, strip.real, strip.imagined)
            env.close()
        caption = (
            "From one state of the replay, with the policy's actions: grey what the simulator "
            "does, coloured what the model imagines when it is fed with its own predictions. "
        )
        if poses is not None:
            caption += (
                "On top the body from the side, with the imagined joints (what is not observed, "
                "such as the place on the ground, is the real one in both). "
            )
        caption += "Below the channels that go wrong most."
        image = figures.png(_strip_picture(strip, poses, variant, spec))
        parts.append(figures.picture(f"{variant}, seed {found.seed}", image, caption))
    return parts if len(parts) > 1 else []


def _strip_picture(strip: Strip, poses: skeleton.Sticks | None, variant: str, spec: EnvSpec) -> Any:
    from matplotlib.figure import Figure

    colour = figures.styles([variant])[variant]["color"]
    length = len(strip.real)
    times = np.unique(np.linspace(0, length - 1, _POSES).astype(int)).tolist()
    scale = np.maximum(strip.real.std(0), 1e-6)
    error = np.nan_to_num(np.abs(strip.imagined - strip.real)).mean(0) / scale
    worst = np.argsort(-np.where(strip.real.std(0) > 1e-6, error, -1))[:_CHANNELS]
    with figures.house_style():
        figure = Figure(figsize=(9.6, 3.4 + (1.8 if poses else 0)), layout="constrained")
        parts: Any = figure.subfigures(
            2 if poses else 1, 1, height_ratios=[1.1, 2] if poses else None
        )
        lower = parts[1] if poses else parts
        if poses:
            axes = parts[0].subplots(1, len(times))
            skeleton.draw(list(np.ravel(axes)), poses, times, ("#bbbbbb", colour))
        grid = np.ravel(lower.subplots(2, -(-len(worst) // 2), squeeze=False))
        for axes, d in zip(grid, worst, strict=False):
            axes.plot(strip.real[:, d], color="#999999", linewidth=2.4)
            axes.plot(strip.imagined[:, d], color=colour)
            low, high = strip.real[:, d].min(), strip.real[:, d].max()
            room = max(high - low, 1e-6)
            axes.set_ylim(low - room, high + room)
            axes.set_title(spec.obs_names[d], fontsize=9)
            axes.set_xlabel("steps ahead", fontsize=8)
        for axes in grid[len(worst) :]:
            axes.remove()
    return figure


def _numbers(last: Sequence[Findings]) -> tuple[list[str], list[list[str]]]:
    variants = list(dict.fromkeys(f.variant for f in last))
    names = list(dict.fromkeys(n for f in last for n in f.numbers))
    rows = []
    for name in names:
        cells = [
            verdict.figure(
                np.array([f.numbers.get(name, np.nan) for f in last if f.variant == variant])
            )
            for variant in variants
        ]
        rows.append([escape(name.replace("_", " ")), *map(escape, cells)])
    return ["", *variants], rows
