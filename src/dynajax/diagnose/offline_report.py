"""The diagnosis before training as a page, and its numbers as CSV."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dynajax.diagnose import measures, offline_plots, statements
from dynajax.diagnose.offline import Offline
from dynajax.models import targets
from dynajax.report import figures, html, statistics
from dynajax.report.dimensions import FLOOR
from dynajax.report.figures import Panel
from dynajax.runs.directory import write_atomically, write_csv

#: The line on which a model knows its errors.
_CLAIM = "as claimed"
_GREY: figures.Style = {"color": "#8a8a8a", "linestyle": "-."}

_BARS = """How much of what happens next is predicted, on transitions that no fit was shown: 1 is
everything, 0 no more than always saying the average (below -1 is cut off). Left: the reward. Middle:
how the state changes, in the median channel. Right: the mean of the five channels that are predicted
worst. Each bar is one way of writing down what the model has to predict: red as published, green the
highest sum of the first two. Lines: 95 % t interval over seeds."""
_SCALES = """Each channel of the observation: how much it varies (s', squares) and how much it changes
in one step (s' - s, circles), against the reward (dashed). Published MBPO trains on the circles and
the reward with equal weight, so what lies lower weighs less. Where the square is lower, s' itself is
the smaller target."""
_SKILLS = """How much of each channel's change is predicted: 1 is everything, 0 no more than its mean
change (below -1 is cut off)."""
#: Title -> caption of the panels under "Can it be trusted?".
_TRUST = {
    "Many steps ahead: the state": """The model fed with its own predictions and the real actions, in
episodes that no fit was shown: how much of the state's change since the start it predicts, in the
median channel. At 0 a rollout of that length says no more than the mean change.""",
    "Many steps ahead: the reward": """The same for the sum of the rewards up to there (below -1 is
cut off).""",
    "Does it know what it does not know?": """Share of the true next states inside the intervals that
the model says hold 50, 80 and 95 % of them, in new episodes. On the grey line it is right; below it
is overconfident.""",
    "The same for the reward": "As to the left, for the reward.",
}


def summary(offline: Offline) -> list[dict[str, Any]]:
    """A line for every code and seed: what the CSV has, and tables are made of."""
    lines = []
    for r in range(len(offline.scales["var_reward"])):
        for c, code in enumerate(offline.codes):
            scores, new, chain = (
                {k: v[r, c] for k, v in table.items()}
                for table in (offline.scores, offline.new, offline.chains)
            )
            line: dict[str, Any] = {
                "env": offline.env,
                "seed": r,
                "code": code,
                "reward_r2": float(scores["reward_r2"]),
                "state_skill": float(measures.median(scores["skill"])),
                "state_skill_worst5": float(measures.worst(scores["skill"])),
                "reward_bias": float(scores["reward_bias"]),
                "reward_noise": float(scores["reward_noise"]),
                "new_reward_r2": float(new["reward_r2"]),
                "new_state_skill": float(measures.median(new["skill"])),
            }
            for i, share in enumerate(measures.COVERAGES):
                line[f"inside_{100 * share:.0f}"] = float(scores["inside"][i])
                line[f"reward_inside_{100 * share:.0f}"] = float(scores["reward_inside"][i])
                line[f"new_inside_{100 * share:.0f}"] = float(new["inside"][i])
            for h in (1, 5, len(chain["open_skill"])):
                line[f"open_skill_{h}"] = float(measures.median(chain["open_skill"][h - 1]))
                line[f"open_reward_r2_{h}"] = float(chain["open_reward_r2"][h - 1])
            line["open_spread"] = float(chain["open_spread"][-1])
            for name in ("ratio_delta", "ratio_next", "var_reward", "reward_top_share"):
                line[name] = float(offline.scales[name][r])
            lines.append(line)
    return lines


def channel_table(offline: Offline) -> list[dict[str, Any]]:
    """A line for every channel, means over seeds."""
    kind = statements.kinds(offline)
    lines = []
    for d, channel in enumerate(offline.channels):
        moving = "direct" if kind.direct[d] else "residual"
        line: dict[str, Any] = {"channel": channel}
        line["kind"] = "constant" if kind.constant[d] else moving
        for name in ("var_delta", "var_next", "top_share", "typical"):
            line[name] = float(offline.scales[name][:, d].mean())
        for c, code in enumerate(offline.codes):
            for name in ("skill", "rmse", "noise", "spread"):
                line[f"{name} {code}"] = float(offline.scores[name][:, c, d].mean())
        lines.append(line)
    return lines


def chain_table(offline: Offline) -> list[dict[str, Any]]:
    """A line for every code and number of steps ahead, means over seeds."""
    chains = offline.chains
    return [
        {
            "code": code,
            "steps": h + 1,
            "skill": float(measures.median(chains["open_skill"][:, c, h]).mean()),
            "reward_r2": float(chains["open_reward_r2"][:, c, h].mean()),
            "spread": float(chains["open_spread"][:, c, h].mean()),
        }
        for c, code in enumerate(offline.codes)
        for h in range(chains["open_skill"].shape[2])
    ]


def write(offline: Offline, folder: Path, command: str) -> list[str]:
    """Writes diagnosis.html, codes.csv, channels.csv and chains.csv; gives back the sentences."""
    lines = statements.sentences(offline)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "codes.csv", summary(offline))
    write_csv(folder / "channels.csv", channel_table(offline))
    write_csv(folder / "chains.csv", chain_table(offline))
    write_atomically(folder / "diagnosis.html", _html(offline, lines, command).encode())
    return lines


def _html(offline: Offline, lines: Sequence[str], command: str) -> str:
    codes, style = statements.compared(offline), figures.styles(statements.compared(offline))
    fixes = [["none", "as published: predict s' - s and the reward, in the task's units"]]
    fixes += [[name, escape(fix.summary)] for name, fix in targets.FIXES.items()]
    parts = [
        f'<p class="lead">{lines[0]}</p>',
        html.bullets([*lines[1:], _origin(offline)]),
        html.picture("", figures.png(offline_plots.bars(offline, statements.best(offline))), _BARS),
        html.html_table(["fix", "what it does"], fixes),
        "<h2>What the model is asked to predict</h2>",
        html.picture("", figures.png(offline_plots.scales(offline)), _SCALES),
        html.picture("", figures.png(offline_plots.skills(offline, codes)), _SKILLS),
        "<h2>Can it be trusted?</h2>",
        html.story(_panels(offline, codes), style | {_CLAIM: _GREY}),
        "<h2>Numbers</h2>",
        html.html_table(*_numbers(offline)),
        f"<h2>How to repeat it</h2><pre>{escape(command)}</pre>",
        "<p>All numbers: codes.csv, channels.csv and chains.csv beside this page.</p>",
    ]
    return html.document(f"{offline.env}: what can a model learn of it?", "".join(parts))


def _origin(offline: Offline) -> str:
    seeds = len(offline.scales["var_reward"])
    ranges = "Ranges are 95 % t intervals over seeds."
    return (
        f"{escape(offline.source)}; {offline.transitions:,} transitions for each of {seeds} "
        f"seed{'s' if seeds > 1 else ''}. The models are small and briefly trained, the same for "
        "every code: compare codes, and expect more of a long training. "
        + (ranges if seeds > 1 else "<b>One seed has no interval.</b>")
    )


def _panels(offline: Offline, codes: Sequence[str]) -> list[tuple[Panel, str]]:
    index = {code: offline.codes.index(code) for code in codes}
    steps = np.arange(1, offline.chains["open_skill"].shape[2] + 1)
    shares = np.array(measures.COVERAGES)

    def ahead(values: np.ndarray) -> Panel:
        lines = {n: (steps, np.clip(values[:, c], FLOOR, 1)) for n, c in index.items()}
        return Panel(lines, "share predicted", floor=FLOOR, xlabel="steps ahead")

    def covered(values: np.ndarray) -> Panel:
        lines = {_CLAIM: (shares, shares[None])}
        lines |= {n: (shares, values[:, c]) for n, c in index.items()}
        return Panel(lines, "share inside", include=1.0, xlabel="share that the model claims")

    panels = [
        ahead(measures.median(offline.chains["open_skill"])),
        ahead(offline.chains["open_reward_r2"]),
        covered(offline.new["inside"]),
        covered(offline.new["reward_inside"]),
    ]
    return [
        (panel._replace(title=title), caption)
        for panel, (title, caption) in zip(panels, _TRUST.items(), strict=True)
    ]


def _numbers(offline: Offline) -> tuple[list[str], list[list[str]]]:
    scores, last = offline.scores, offline.chains["open_skill"][:, :, -1]
    columns = {
        "reward R²": scores["reward_r2"],
        "reward bias": scores["reward_bias"],
        "reward noise": scores["reward_noise"],
        "state skill": measures.median(scores["skill"]),
        "worst five": measures.worst(scores["skill"]),
        "inside 80 %": scores["inside"][..., 1],
        "reward R², new episodes": offline.new["reward_r2"],
        f"skill after {offline.chains['open_skill'].shape[2]} steps": measures.median(last),
    }
    rows = [
        [escape(code), *(escape(statistics.over_seeds(x[:, c])) for x in columns.values())]
        for c, code in enumerate(offline.codes)
    ]
    return ["code", *columns], rows
