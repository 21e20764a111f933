"""What a diagnosis before training has measured, in sentences beside what it means in general.

No sentence says why a task fails: figures stand with their intervals, and the code of the targets
that is named at last is the one with the best figures among those that were tried.
"""

import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from dynajax.diagnose import measures
from dynajax.diagnose.offline import Offline
from dynajax.report.statistics import number, over_seeds

#: The log-variance that a target may have is bounded at 0.5 (published MBPO): a raw target whose
#: variance is larger than this cannot be given its noise.
BOUND = float(np.exp(0.5))


class Channels(NamedTuple):
    """Which channels are of a kind, (D,) bool each, as most seeds have it."""

    constant: np.ndarray
    direct: np.ndarray  # Var(s' - s) > Var(s')


def kinds(offline: Offline) -> Channels:
    """What kind each channel is."""
    delta, there = offline.scales["var_delta"], offline.scales["var_next"]
    constant = (there <= measures.CONSTANT**2).mean(0) > 0.5
    return Channels(constant, ~constant & ((delta > there).mean(0) > 0.5))


def names(channels: Sequence[str], chosen: np.ndarray, most: int = 4) -> str:
    """Chosen channels in few words: "velocity[3-5,8], touch[1]"."""
    groups: dict[str, list[int]] = {}
    for name in (c for c, yes in zip(channels, chosen, strict=True) if yes):
        match = re.fullmatch(r"(.*)\[(\d+)\]", name)
        groups.setdefault(match[1] if match else name, []).extend([int(match[2])] if match else [])
    parts = []
    for name, numbers in groups.items():
        runs: list[list[int]] = []
        for n in numbers:
            if runs and n == runs[-1][1] + 1:
                runs[-1][1] = n
            else:
                runs.append([n, n])
        inside = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:most])
        inside += ",..." if len(runs) > most else ""
        parts.append(f"{name}[{inside}]" if numbers else name)
    more = len(parts) - most
    return ", ".join(parts[:most]) + (f" and {more} more" if more > 0 else "")


def best(offline: Offline) -> str:
    """The code with the highest sum of reward R² and median state skill, each no lower than -1."""
    reward, state = offline.scores["reward_r2"], measures.median(offline.scores["skill"])
    total = sum(np.clip(np.nan_to_num(x), -1, 1).mean(0) for x in (reward, state))
    return offline.codes[int(np.argmax(total))]


def compared(offline: Offline) -> list[str]:
    """At most four codes for sentences and curves: the published one, the paper's, the best."""
    wanted = dict.fromkeys(["none", "scale", "scale,target", best(offline)])
    return [code for code in wanted if code in offline.codes]


def sentences(offline: Offline) -> list[str]:
    """What was measured (HTML), the most important first."""
    return [*_predicted(offline), _scales(offline), *_channels(offline), *_trust(offline)]


def by_code(offline: Offline, values: np.ndarray) -> str:
    """(R, C) numbers of the compared codes: "none gives 0.21 (0.11 to 0.31), scale 0.72 (...)"."""
    first, *others = (
        (escape(code), over_seeds(values[:, offline.codes.index(code)]))
        for code in compared(offline)
    )
    return ", ".join([f"{first[0]} gives {first[1]}", *map(" ".join, others)])


def _predicted(offline: Offline) -> list[str]:
    scales, chosen = offline.scales, best(offline)
    constant = int((scales["var_reward"] <= measures.CONSTANT**2).sum())
    if constant:
        reward = (
            f"<b>Reward</b>: it never changes in {constant} of {len(scales['var_reward'])} sets of "
            f"data (mean {number(float(scales['mean_reward'].mean()))}), so there is no R² of it "
            "there. The replay of a run, where it may change, can be diagnosed with --data=FOLDER."
        )
    else:
        reward = (
            "<b>Reward</b>, share of its variation that is predicted (R²): "
            f"{by_code(offline, offline.scores['reward_r2'])}. 1 is all of it, 0 no more than its "
            "mean; an agent sees no more of a synthetic reward than the model predicts."
        )
    state = (
        "<b>State</b>, share of its change in a step that is predicted (median channel): "
        f"{by_code(offline, measures.median(offline.scores['skill']))}."
    )
    advice = (
        f"Reward and state together are predicted best by {chosen} among the "
        f"{len(offline.codes)} codes"
        + (f" (--fix={chosen})" if chosen != "none" else ", the published targets")
        + ". The best of several is flattered by chance; only a run tells what a code does to "
        "the return."
    )
    return [reward, state, advice]


def _scales(offline: Offline) -> str:
    scales = offline.scales
    above = ((scales[name] > BOUND).sum(1).mean() for name in ("var_delta", "var_next"))
    ratios = (float(np.median(scales[name])) for name in ("ratio_delta", "ratio_next"))
    return (
        "Raw targets: the variances of s' - s sum to {} times the reward's, those of s' to {} "
        "times; what is small beside the rest weighs little in an unscaled loss. {:.0f} channels "
        "of s' - s and {:.0f} of s' vary more than the noise that published MBPO can predict "
        "(e^0.5)."
    ).format(*map(number, ratios), *above)


def _channels(offline: Offline) -> list[str]:
    kind, count, skill = kinds(offline), len(offline.channels), offline.scores["skill"]
    lines = []
    if kind.direct.any():
        line = (
            f"{int(kind.direct.sum())} of {count} channels vary less than they change in a step, so "
            f"s' is the smaller target there: {escape(names(offline.channels, kind.direct))}."
        )
        pair = [c for c in ("scale", "scale,auto") if c in offline.codes]
        figures = [
            f"{over_seeds(np.nanmean(skill[:, offline.codes.index(c)][:, kind.direct], 1))} with {c}"
            for c in pair
        ]
        lines.append(line + (f" Skill in them: {', '.join(figures)}." if figures else ""))
    if not kind.constant.all():
        lines.append(_jumps(offline, kind))
    if kind.constant.any():
        lines.append(
            f"{int(kind.constant.sum())} of {count} channels never change in these data: "
            f"{escape(names(offline.channels, kind.constant))}."
        )
    return lines


def _jumps(offline: Offline, kind: Channels) -> str:
    share = np.where(kind.constant, -1.0, np.nan_to_num(offline.scales["top_share"].mean(0)))
    highest = int(share.argmax())
    reward = offline.scales["reward_top_share"].mean()
    return (
        "The largest hundredth of the steps makes "
        f"{100 * np.median(share[~kind.constant]):.0f} % of a channel's squared change (median), "
        f"{100 * share[highest]:.0f} % in {escape(offline.channels[highest])}"
        + (f", {100 * reward:.0f} % of the reward's" if np.isfinite(reward) else "")
        + ". Gaussian noise has 8 %. A jump now and then comes near 100 %, and a model sees few "
        "of them."
    )


def _trust(offline: Offline) -> list[str]:
    inside = offline.new["inside"][..., 1]
    skill = measures.median(offline.chains["open_skill"])  # (R, C, H)
    ahead = dict.fromkeys([1, skill.shape[2]])
    chain = ". ".join(
        f"After {steps} step{'s' if steps > 1 else ''} {by_code(offline, skill[:, :, steps - 1])}"
        for steps in ahead
    )
    return [
        "In new episodes the models' 80 % intervals hold this share of the truths: "
        f"{by_code(offline, inside)}. Less than 0.8 is overconfidence, more is needless noise.",
        "Fed with its own predictions in new episodes, a model predicts this share of the state's "
        f"change since the start (median channel). {chain}. At 0 a rollout of that length says no "
        "more than the mean change.",
    ]
