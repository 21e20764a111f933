"""The diagnosis before training as a page, and its numbers as CSV."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dynajax.diagnose import measures, verdict
from dynajax.diagnose.offline import Offline
from dynajax.models import targets
from dynajax.record.folder import write_atomically, write_csv
from dynajax.report import figures, statistics
from dynajax.report.figures import Panel

#: What lies lower is cut off in pictures.
_FLOOR = -1.0
#: The line on which a model knows its errors.
_CLAIM = "as claimed"
_GREY: figures.Style = {"color": "#8a8a8a", "linestyle": "-."}


def summary(found: Offline) -> list[dict[str, Any]]:
    """A line for every code and seed: what the CSV has, and tables are made of."""
    lines = []
    for r in range(len(found.scales["var_reward"])):
        for c, code in enumerate(found.codes):
            here = {k: v[r, c] for k, v in found.scores.items()}
            new = {k: v[r, c] for k, v in found.new.items()}
            chain = {k: v[r, c] for k, v in found.chains.items()}
            line: dict[str, Any] = {
                "env": found.env,
                "seed": r,
                "code": code,
                "reward_r2": float(here["reward_r2"]),
                "state_skill": float(measures.median(here["skill"])),
                "state_skill_worst5": float(measures.worst(here["skill"])),
                "reward_bias": float(here["reward_bias"]),
                "reward_noise": float(here["reward_noise"]),
                "new_reward_r2": float(new["reward_r2"]),
                "new_state_skill": float(measures.median(new["skill"])),
            }
            for i, share in enumerate(measures.COVERAGES):
                line[f"inside_{100 * share:.0f}"] = float(here["inside"][i])
                line[f"reward_inside_{100 * share:.0f}"] = float(here["reward_inside"][i])
                line[f"new_inside_{100 * share:.0f}"] = float(new["inside"][i])
            for h in (1, 5, len(chain["open_skill"])):
                line[f"open_skill_{h}"] = float(measures.median(chain["open_skill"][h - 1]))
                line[f"open_reward_r2_{h}"] = float(chain["open_reward_r2"][h - 1])
            line["open_spread"] = float(chain["open_spread"][-1])
            for name in ("ratio_delta", "ratio_next", "var_reward", "reward_top_share"):
                line[name] = float(found.scales[name][r])
            lines.append(line)
    return lines


def channel_table(found: Offline) -> list[dict[str, Any]]:
    """A line for every channel, means over seeds."""
    kind = verdict.kinds(found)
    lines = []
    for d, channel in enumerate(found.channels):
        line: dict[str, Any] = {"channel": channel, "kind": _kind(kind, d)}
        for name in ("var_delta", "var_next", "top_share", "typical"):
            line[name] = float(found.scales[name][:, d].mean())
        for c, code in enumerate(found.codes):
            for name in ("skill", "rmse", "noise", "spread"):
                line[f"{name} {code}"] = float(found.scores[name][:, c, d].mean())
        lines.append(line)
    return lines


def _kind(kind: verdict.Channels, d: int) -> str:
    if kind.constant[d]:
        return "constant"
    return ("direct" if kind.direct[d] else "residual") + (", jumps" if kind.jumps[d] else "")


def write(found: Offline, folder: Path, command: str) -> verdict.Verdict:
    """Writes diagnosis.html, codes.csv, channels.csv and chains.csv; gives back the verdict."""
    said = verdict.judge(found)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "codes.csv", summary(found))
    write_csv(folder / "channels.csv", channel_table(found))
    write_csv(
        folder / "chains.csv",
        [
            {
                "code": code,
                "steps": h + 1,
                "skill": float(measures.median(found.chains["open_skill"][:, c, h]).mean()),
                "reward_r2": float(found.chains["open_reward_r2"][:, c, h].mean()),
                "spread": float(found.chains["open_spread"][:, c, h].mean()),
            }
            for c, code in enumerate(found.codes)
            for h in range(found.chains["open_skill"].shape[2])
        ],
    )
    write_atomically(folder / "diagnosis.html", _html(found, said, command).encode())
    return said


def _html(found: Offline, said: verdict.Verdict, command: str) -> str:
    seeds = len(found.scales["var_reward"])
    parts = [
        f'<p class="lead">{said.headline}</p>',
        "<ul>",
        *(f"<li>{_first_upper(cause.text)}</li>" for cause in said.causes[1:]),
        *(f"<li>{escape(remark)}</li>" for remark in said.remarks),
        f"<li>{escape(found.source)}; {found.transitions:,} transitions for each of {seeds} "
        f"seed{'s' if seeds > 1 else ''}. The models are small and briefly trained, the same for "
        "every code: compare codes, and expect more of a long training. "
        + (
            "Ranges are 95 % t intervals over seeds."
            if seeds > 1
            else "<b>One seed has no interval.</b>"
        )
        + "</li>",
        "</ul>",
    ]
    shown = shown_codes(found, said.advice)
    style = figures.styles(shown)
    parts += [
        figures.picture(
            "",
            figures.png(_bars(found, said.advice)),
            "How much of what happens next is predicted, on transitions that no fit was shown: 1 "
            "is everything, 0 no more than always saying the average (below -1 is cut off). Left: "
            "the reward. Middle: how the state changes, in the median channel. Right: the mean of "
            "the five channels that are predicted worst. Each bar is one way of writing down what "
            "the model has to predict: red as published, green what is suggested. Lines: 95 % t "
            "interval over seeds.",
        ),
        figures.html_table(
            ["fix", "what it does"],
            [
                ["none", "as published: predict s' - s and the reward, in the task's units"],
                *([name, escape(fix.summary)] for name, fix in targets.FIXES.items()),
            ],
        ),
        "<h2>What the model is asked to predict</h2>",
        figures.picture(
            "",
            figures.png(scale_picture(found)),
            "Each channel of the observation: how much it varies (s', squares) and how much it "
            "changes in one step (s' - s, circles), against the reward (dashed). Published MBPO "
            "trains on the circles and the reward with equal weight: what lies far below drowns. "
            "Where the square is lower, s' itself is the easier target.",
        ),
        figures.picture(
            "",
            figures.png(skill_picture(found, shown)),
            "How much of each channel's change is predicted: 1 is everything, 0 no more than its "
            "mean change (below -1 is cut off).",
        ),
        "<h2>Can it be trusted?</h2>",
        figures.story(_panels(found, shown), style | {_CLAIM: _GREY}),
        "<h2>Numbers</h2>",
        figures.html_table(*_numbers(found)),
        f"<h2>How to repeat it</h2><pre>{escape(command)}</pre>",
        "<p>All numbers: codes.csv, channels.csv and chains.csv beside this page.</p>",
    ]
    return figures.document(f"{found.env}: what can a model learn of it?", "".join(parts))


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def shown_codes(found: Offline, advice: str) -> list[str]:
    """At most four codes that a picture of curves shows: the published one, the paper's, ours."""
    wanted = ["none", "scale", "scale,target", advice or "scale,auto,beta"]
    return [code for code in dict.fromkeys(wanted) if code in found.codes] or list(found.codes[:4])


def _bars(found: Offline, advice: str) -> Any:
    """How much every code predicts: three sets of bars that share their labels."""
    skill = found.scores["skill"]
    columns = {
        "The reward": found.scores["reward_r2"],
        "The state's change (median channel)": measures.median(skill),
        "The five worst channels": measures.worst(skill),
    }
    names = list(found.codes)
    colours = {"none": figures.VERMILLION, advice: figures.GREEN}
    height = 1.2 + 0.32 * len(names)
    with figures.house_style():
        figure, grid = figures.canvas(3, (3.5, height), (3.5, height))
        for i, (axes, (title, values)) in enumerate(zip(grid, columns.items(), strict=True)):
            for place, name in enumerate(names):
                point, low, high = (float(x) for x in statistics.interval(values[:, place]))
                if not np.isfinite(point):
                    continue
                bar = max(point, _FLOOR)
                axes.barh(place, bar, 0.66, color=colours.get(name, figures.SKY), alpha=0.85)
                if np.isfinite(low):
                    axes.plot(np.clip([low, high], _FLOOR, 1), [place] * 2, color=figures.BLACK)
                axes.text(1.06, place, verdict.number(point), va="center", fontsize=9)
            axes.set_yticks(range(len(names)), names if i == 0 else [""] * len(names))
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_xlim(_FLOOR, 1.35)
            axes.set_xticks([-1, -0.5, 0, 0.5, 1])
            axes.axvline(0, color=figures.BLACK, linewidth=0.8)
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.set_title(title)
            axes.set_xlabel("share predicted")
    return figure


def groups(channels: Sequence[str]) -> list[tuple[str, int, int]]:
    """(name, first, last) of neighbouring channels of one part of the observation."""
    found: list[tuple[str, int, int]] = []
    for i, channel in enumerate(channels):
        name = channel.split("[")[0]
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], i)
        else:
            found.append((name, i, i))
    return found


def by_channel(axes: Any, channels: Sequence[str]) -> None:
    """Names the parts of an observation along the x axis, with lines between them."""
    parts = groups(channels)
    axes.set_xlim(-0.7, len(channels) - 0.3)
    axes.grid(axis="x", visible=False)
    if len(parts) == 1:
        axes.set_xlabel(f"entry of {parts[0][0]}")
        return
    for _, first, _ in parts[1:]:
        axes.axvline(first - 0.5, color="#dddddd", linewidth=0.8)
    # Names of small parts would overlap in a long observation.
    least = len(channels) / 40
    named = [p for p in parts if p[2] - p[1] + 1 >= least] if len(parts) > 6 else parts
    turned = len(named) > 5
    axes.set_xticks(
        [(a + b) / 2 for _, a, b in named],
        [n for n, _, _ in named],
        rotation=30 if turned else 0,
        ha="right" if turned else "center",
    )


def scale_picture(found: Offline) -> Any:
    """Variances of s' - s and of s' by channel, and of the reward."""
    x = np.arange(len(found.channels))
    delta, there = (found.scales[n].mean(0) for n in ("var_delta", "var_next"))
    reward = float(found.scales["var_reward"].mean())
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, (9.6, 3.4), (9.6, 3.4))
        floor = measures.CONSTANT**2
        a, b = np.maximum(delta, floor), np.maximum(there, floor)
        direct = delta > there
        axes.vlines(x, a, b, color=np.where(direct, figures.VERMILLION, "#c9c9c9"), linewidth=1.2)
        size = 16 if len(x) < 120 else 7
        axes.scatter(x, b, size, color=figures.SKY, marker="s", label="s' itself")
        axes.scatter(x, a, size, color=figures.BLUE, label="change in a step, s' - s", zorder=3)
        axes.axhline(
            max(reward, floor), color=figures.BLACK, linestyle=(0, (4, 3)), label="the reward"
        )
        axes.set_yscale("log")
        axes.set_ylabel("variance")
        axes.set_title("How large the targets are")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        by_channel(axes, found.channels)
    return figure


def skill_picture(found: Offline, shown: Sequence[str]) -> Any:
    """Skill by channel of a few codes."""
    x, style = np.arange(len(found.channels)), figures.styles(shown)
    with figures.house_style():
        figure, (axes,) = figures.canvas(1, (9.6, 3.2), (9.6, 3.2))
        for i, code in enumerate(shown):
            values = found.scores["skill"][:, found.codes.index(code)].mean(0)
            shift = (i - (len(shown) - 1) / 2) * 0.16
            axes.scatter(
                x + shift,
                np.maximum(values, _FLOOR),
                11 if len(x) < 120 else 5,
                color=style[code]["color"],
                label=code,
                alpha=0.9,
            )
        axes.axhline(0, color="#8a8a8a", linewidth=1)
        axes.set_ylim(_FLOOR - 0.05, 1.05)
        axes.set_ylabel("share predicted")
        axes.set_title("Which channels are learned")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        by_channel(axes, found.channels)
    return figure


def _panels(found: Offline, shown: Sequence[str]) -> list[tuple[Panel, str]]:
    index = {code: found.codes.index(code) for code in shown}
    steps = np.arange(1, found.chains["open_skill"].shape[2] + 1)
    skill, reward = (
        {n: (steps, np.clip(values[:, c], _FLOOR, 1)) for n, c in index.items()}
        for values in (measures.median(found.chains["open_skill"]), found.chains["open_reward_r2"])
    )
    shares = np.array(measures.COVERAGES)
    perfect = {_CLAIM: (shares, shares[None])}
    inside, reward_inside = (
        perfect | {n: (shares, found.new[name][:, c]) for n, c in index.items()}
        for name in ("inside", "reward_inside")
    )
    ahead, claimed = "steps ahead", "share that the model claims"
    return [
        (
            Panel(
                skill, "share predicted", "Many steps ahead: the state", floor=-1.0, xlabel=ahead
            ),
            "The model fed with its own predictions and the real actions, in episodes that no fit was "
            "shown: how much of the state's change since the start it predicts, in the median "
            "channel. Where it falls to 0, longer rollouts are fiction.",
        ),
        (
            Panel(
                reward, "share predicted", "Many steps ahead: the reward", floor=-1.0, xlabel=ahead
            ),
            "The same for the sum of the rewards up to there (below -1 is cut off).",
        ),
        (
            Panel(
                inside,
                "share found inside",
                "Does it know what it does not know?",
                xlabel=claimed,
                include=1.0,
            ),
            "Share of the true next states inside the intervals that the model says hold 50, 80 and "
            "95 % of them, in new episodes. On the grey line it is right; below it is overconfident.",
        ),
        (
            Panel(
                reward_inside,
                "share found inside",
                "The same for the reward",
                xlabel=claimed,
                include=1.0,
            ),
            "As to the left, for the reward.",
        ),
    ]


def _numbers(found: Offline) -> tuple[list[str], list[Any]]:
    header = [
        "code",
        "reward R²",
        "reward bias",
        "reward noise",
        "state skill",
        "worst five",
        "inside 80 %",
        "reward R², new episodes",
        f"skill after {found.chains['open_skill'].shape[2]} steps",
    ]
    rows = []
    for c, code in enumerate(found.codes):
        s, new, chain = found.scores, found.new, found.chains
        columns = [
            s["reward_r2"][:, c],
            s["reward_bias"][:, c],
            s["reward_noise"][:, c],
            measures.median(s["skill"][:, c]),
            measures.worst(s["skill"][:, c]),
            s["inside"][:, c, 1],
            new["reward_r2"][:, c],
            measures.median(chain["open_skill"][:, c, -1]),
        ]
        rows.append([escape(code), *(escape(verdict.figure(column)) for column in columns)])
    return header, rows
