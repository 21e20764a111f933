"""What the measures mean, in plain words with the figures behind them.

Every threshold is a constant here, with its reason. They say what is worth a reader's attention,
not what is significant: with three seeds little is, and intervals stand beside the figures.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dynajax.diagnose import measures
from dynajax.diagnose.offline import Offline
from dynajax.report import statistics

#: From this share of its variation on, something counts as learned: half of what there is to
#: know.
LEARNED = 0.5
#: A reward that is known this well is not what stands in the way. Below it, a code that does
#: better by GAIN says that the rest was there to be learned.
GOOD = 0.9
#: A gain in R² or skill that is worth another set of fixes; two seeds of the same code differ by
#: 0.02 to 0.1.
GAIN = 0.1
#: Where the largest hundredth of the steps makes half of all squared change, the rest hardly
#: moves: a jump, not noise (a Gaussian has 0.08, a Laplacian 0.16).
JUMP = 0.5
#: ... and so where a typical step is this small beside the root mean square one (Gaussian: 0.67).
STILL = 0.02
#: Inside the predicted 80 % interval at least this share is expected; less is overconfident.
COVERED = 0.6
#: How much merit a simpler set of fixes may lack and still be preferred.
TOLERANCE = 0.05
#: The log-variance that a target may have is bounded at 0.5 (published MBPO): a raw target whose
#: variance is larger than this cannot be given its noise.
BOUND = float(np.exp(0.5))


class Cause(NamedTuple):
    """One thing that explains a failure."""

    name: str  # a short one, for tables
    text: str


class Verdict(NamedTuple):
    """The words on top of the page."""

    headline: str
    causes: tuple[Cause, ...]
    remarks: tuple[str, ...]
    advice: str  # a comma list for --fix; "" for none


class Channels(NamedTuple):
    """Which channels are of a kind: (D,) bool each."""

    constant: np.ndarray
    direct: np.ndarray  # Var(s' - s) > Var(s')
    jumps: np.ndarray


def kinds(found: Offline) -> Channels:
    """What kind each channel is, as most seeds have it."""
    s = found.scales

    def most(values: np.ndarray) -> np.ndarray:
        return values.mean(0) > 0.5

    constant = most(s["var_next"] <= measures.CONSTANT**2)
    moving = ~constant
    direct = moving & most(s["var_delta"] > s["var_next"])
    jumps = moving & most((s["top_share"] > JUMP) | (s["typical"] < STILL))
    return Channels(constant, direct, jumps)


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


def figure(values: np.ndarray) -> str:
    """A mean over seeds with its 95 % t interval: "0.24 (0.10 to 0.38)"."""
    point, low, high = (float(x) for x in statistics.interval(values))
    if not np.isfinite(point):
        return "not defined"
    text = number(point)
    return f"{text} ({number(low)} to {number(high)})" if np.isfinite(low) else text


def number(value: float) -> str:
    """Two digits after the point, or three in all, or a power of ten."""
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    text = f"{value:.2f}" if size < 10 else f"{value:,.0f}"
    return text.replace("-0.00", "0.00")


def merit(found: Offline) -> np.ndarray:
    """How useful each code's model is, (R, C), at most 2.25: the reward's R² and the state's
    median skill, either no lower than -1, and a quarter of the worst five channels' skill."""
    reward = np.nan_to_num(found.scores["reward_r2"], nan=0.0)
    middle = np.nan_to_num(measures.median(found.scores["skill"]))
    low = np.nan_to_num(measures.worst(found.scores["skill"]))
    return np.clip(reward, -1, 1) + np.clip(middle, -1, 1) + 0.25 * np.clip(low, -1, 1)


def choose(found: Offline) -> str:
    """The code with the fewest fixes that lacks no more than TOLERANCE of the best one's merit."""
    value = merit(found).mean(0)
    fixes = [0 if code == "none" else code.count(",") + 1 for code in found.codes]
    good = np.flatnonzero(value >= value.max() - TOLERANCE)
    return found.codes[min(good, key=lambda c: (fixes[c], -value[c]))]


def _beats(better: np.ndarray, worse: np.ndarray, by: float) -> bool:
    """Whether (R,) is larger by more than `by` on average, and in every seed larger."""
    gap = better - worse
    return bool(gap.mean() > by and (gap > 0).all())


def judge(found: Offline) -> Verdict:
    """The verdict on what was found."""
    code = {name: c for c, name in enumerate(found.codes)}
    first = "none" if "none" in code else found.codes[0]
    base, advice = code[first], choose(found)
    best = code[advice]
    kind = kinds(found)
    causes = [*_reward(found, base, best), *_state(found, base, best)]
    remarks = [
        *_scale(found),
        *_channels(found, kind, base, best),
        *_calibration(found, best),
        *_chain(found, best),
    ]
    gains = _beats(merit(found)[:, best], merit(found)[:, base], 0.0) and best != base
    suggestion = f" Try <b>--fix={advice}</b>." if gains else ""
    if causes:
        head = causes[0].text[0].upper() + causes[0].text[1:] + suggestion
    else:
        head = (
            "Nothing here explains a failure: with "
            f"{'published targets' if first == 'none' else first} the model predicts "
            f"{_reward_share(found, base)} and "
            f"{_percent(measures.median(found.scores['skill'])[:, base])} of the state's change "
            "(median channel) on transitions that it was not shown."
        )
        if gains:
            head += (
                f" <b>--fix={advice}</b> would predict "
                f"{_reward_share(found, best)} and "
                f"{_percent(measures.median(found.scores['skill'])[:, best])}."
            )
    return Verdict(head, tuple(causes), tuple(remarks), "" if advice == "none" else advice)


def _percent(values: np.ndarray) -> str:
    return f"{100 * max(float(np.mean(values)), 0):.0f} %"


def _reward_share(found: Offline, code: int) -> str:
    r2 = found.scores["reward_r2"][:, code]
    return f"{_percent(r2)} of the reward's variation" if np.isfinite(r2).all() else "the reward"


def _reward(found: Offline, base: int, best: int) -> list[Cause]:
    r2, scales = found.scores["reward_r2"], found.scales
    silent = scales["var_reward"] <= measures.CONSTANT**2
    if silent.any():
        if silent.all() and (np.abs(scales["mean_reward"]) > measures.CONSTANT).all():
            return []  # see `_scale`
        sets = "the data" if silent.all() else f"{silent.sum()} of {len(silent)} sets of data"
        return [
            Cause(
                "reward unseen",
                f"in {sets} the reward never changes, so no model can learn it from them, and nothing "
                "can be said about it. Diagnose a run's replay instead (--data=RUN_FOLDER).",
            )
        ]
    now, top = r2[:, base], r2[:, r2.mean(0).argmax()]
    code = found.codes[int(r2.mean(0).argmax())]
    ratio = scales["ratio_next" if "target" in found.codes[base] else "ratio_delta"]
    spike = scales["reward_top_share"].mean() > JUMP
    partly = now.mean() < GOOD and _beats(top, now, GAIN)
    if now.mean() >= LEARNED and not partly:
        return []
    raw = f"R² {figure(now)}"
    if top.mean() < LEARNED and spike:
        return [
            Cause(
                "reward is a spike",
                f"the reward is a rare spike (a hundredth of the steps makes "
                f"{100 * scales['reward_top_share'].mean():.0f} % of its variation), and no code "
                f"learns it from these data (published targets: {raw}; best, {code}: {figure(top)}).",
            )
        ]
    if top.mean() < LEARNED:
        return [
            Cause(
                "reward hard",
                f"the reward is not learned by any code (published targets: {raw}; best, {code}: "
                f"{figure(top)}).",
            )
        ]
    degree = "not" if now.mean() < LEARNED else "only partly"
    said = f"the reward is {degree} learned from {_targets(found.codes[base])}: {raw}"
    if ratio.mean() > 1:
        said += f", the state's targets having {number(float(np.median(ratio)))} times its variance"
    helped = [
        f"{name} gives {figure(r2[:, found.codes.index(name)])}"
        for name in dict.fromkeys(["scale", found.codes[best], code])
        if name in found.codes and r2[:, found.codes.index(name)].mean() > now.mean() + GAIN / 2
    ]
    return [Cause("reward lost", f"{said}; {', '.join(helped)}.")]


def _targets(code: str) -> str:
    return "published targets" if code == "none" else f"the targets of {code}"


def _state(found: Offline, base: int, best: int) -> list[Cause]:
    middle = measures.median(found.scores["skill"])
    if middle[:, base].mean() >= LEARNED:
        return []
    text = (
        f"the state's change is not learned from {_targets(found.codes[base])}: skill "
        f"{figure(middle[:, base])} in the median channel"
    )
    if best != base and _beats(middle[:, best], middle[:, base], GAIN):
        return [
            Cause("state lost", f"{text}; {found.codes[best]} gives {figure(middle[:, best])}.")
        ]
    return [Cause("state hard", f"{text}, and no code does better by much.")]


def _scale(found: Offline) -> list[str]:
    s = found.scales
    if (s["var_reward"] <= measures.CONSTANT**2).any():
        if (np.abs(s["mean_reward"]) <= measures.CONSTANT).any():
            return []
        return [
            f"The reward is {number(float(s['mean_reward'].mean()))} at every step, so there is "
            "nothing to learn in it: what matters is when an episode ends, which rollouts know."
        ]
    above = ((s["var_delta"] > BOUND).sum(1).mean(), (s["var_next"] > BOUND).sum(1).mean())
    text = (
        f"Raw targets: the variances of s' - s sum to {number(float(np.median(s['ratio_delta'])))} "
        f"times the reward's, those of s' to {number(float(np.median(s['ratio_next'])))} times."
    )
    if max(above) >= 1:
        text += (
            f" {above[0]:.0f} channels of s' - s and {above[1]:.0f} of s' have a larger variance "
            "than published MBPO can give its noise (e^0.5)."
        )
    return [text]


def _channels(found: Offline, kind: Channels, base: int, best: int) -> list[str]:
    said, count = [], len(found.channels)
    skill = found.scores["skill"]
    if kind.direct.any():
        n = int(kind.direct.sum())
        text = (
            f"{n} of {count} channels {'varies' if n == 1 else 'vary'} less than "
            f"{'its' if n == 1 else 'their'} change, so s' itself is the smaller target there: "
            f"{names(found.channels, kind.direct)}."
        )
        pair = [c for c in ("scale", "scale,auto") if c in found.codes]
        if len(pair) == 2:
            a, b = (np.nanmean(skill[:, found.codes.index(c)][:, kind.direct], 1) for c in pair)
            text += f" Skill in them: {figure(a)} with scale, {figure(b)} with scale,auto."
        said.append(text)
    if kind.jumps.any():
        low = np.nanmean(skill[:, best][:, kind.jumps], 1)
        said.append(
            f"{int(kind.jumps.sum())} of {count} channels jump (a hundredth of the steps makes "
            f"most of their change): {names(found.channels, kind.jumps)}. Skill in them with "
            f"{found.codes[best]}: {figure(low)}."
        )
    if kind.constant.any():
        said.append(
            f"{int(kind.constant.sum())} of {count} channels never change here: "
            f"{names(found.channels, kind.constant)}."
        )
    poor = (skill[:, best].mean(0) < 0) & ~kind.jumps & ~kind.constant
    if poor.any():
        said.append(
            f"{int(poor.sum())} of {count} channels are predicted worse than by their mean change, "
            f"with {found.codes[best]}: {names(found.channels, poor)}."
        )
    return said


def _calibration(found: Offline, best: int) -> list[str]:
    inside = found.new["inside"][:, best, 1].mean()
    if not inside < COVERED:
        return []
    return [
        f"The model is overconfident: {100 * inside:.0f} % of the truths in new episodes lie "
        f"inside its 80 % intervals ({found.codes[best]})."
    ]


def _chain(found: Offline, best: int) -> list[str]:
    curve = measures.median(found.chains["open_skill"][:, best]).mean(0)
    seen = np.isfinite(curve)
    if not seen.any():
        return []
    last = int(np.flatnonzero(seen)[-1])
    below = np.flatnonzero(curve[: last + 1] < LEARNED)
    if not below.size:
        return [
            f"Rollouts hold: after {last + 1} steps {found.codes[best]} still predicts "
            f"{100 * curve[last]:.0f} % of the change (median channel, new episodes)."
        ]
    if below[0] == 0:
        return [
            "Rollouts of more than one step would not hold: in new episodes even one step ahead "
            f"{found.codes[best]} predicts {100 * max(curve[0], 0):.0f} % of the change."
        ]
    return [
        f"Rollouts hold for {below[0]} steps: up to there {found.codes[best]} predicts more than "
        f"half of the change (median channel, new episodes)."
    ]
