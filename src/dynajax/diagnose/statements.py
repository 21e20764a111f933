"""Describe the result of a diagnosis before training in sentences.

The sentences are plain text in which ** marks emphasis. They give measured values with intervals
and no cause of failure; the recommended fix is the one with the highest R² among those tried.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dynajax.diagnose import measures
from dynajax.diagnose.offline import OfflineResult
from dynajax.report.statistics import R2, SHARE, Bounds, format_mean, format_number

#: With the default bound of the log-variance, 0.5, an ensemble cannot predict the noise of a raw
#: target whose variance is larger than this. Janner et al. (2019) start there and learn the bound.
MAX_VARIANCE = float(np.exp(0.5))


class DimKinds(NamedTuple):
    """Which dimensions are of a kind in most seeds, (D,) bool each."""

    constant: np.ndarray
    direct: np.ndarray  # Var(s' - s) > Var(s')


def dim_kinds(result: OfflineResult) -> DimKinds:
    """Return the kind of each dimension."""
    var_delta, var_next = result.targets["var_delta"], result.targets["var_next"]
    constant = (var_next == 0).mean(0) > 0.5
    return DimKinds(constant, ~constant & ((var_delta > var_next).mean(0) > 0.5))


def list_dims(dims: Sequence[str], chosen: np.ndarray, most: int = 4) -> str:
    """Return the names of chosen dimensions in short: "velocity[3-5,8], touch[1]"."""
    groups: dict[str, list[int]] = {}
    for name in (d for d, yes in zip(dims, chosen, strict=True) if yes):
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


def best(result: OfflineResult) -> str:
    """Return the fixes with the highest sum of reward R² and median state R², each at least -1."""
    reward = result.held_out["reward_r2"]
    state = measures.median(result.held_out["state_r2"])
    total = sum(np.clip(np.nan_to_num(x), -1, 1).mean(0) for x in (reward, state))
    return result.fixes[int(np.argmax(total))]


def compared(result: OfflineResult) -> list[str]:
    """Return at most four fixes for sentences and curves: none, those of the paper, the best."""
    wanted = dict.fromkeys(["none", "scale", "scale,target", best(result)])
    return [fix for fix in wanted if fix in result.fixes]


def sentences(result: OfflineResult) -> list[str]:
    """Return what was measured, the most important first."""
    return [*_predictions(result), _variances(result), *_dims(result), *_reliability(result)]


def by_fix(result: OfflineResult, values: np.ndarray, bounds: Bounds = R2) -> str:
    """Return values (R, F) of the compared fixes: "0.21 (0.11 to 0.31) with none, 0.72 (...) ..."."""
    return ", ".join(
        f"{format_mean(values[:, result.fixes.index(fix)], bounds)} with {fix}"
        for fix in compared(result)
    )


def _predictions(result: OfflineResult) -> list[str]:
    targets, chosen = result.targets, best(result)
    constant = int((targets["var_reward"] == 0).sum())
    if constant:
        reward = (
            f"**Reward**: it is constant in {constant} of {len(targets['var_reward'])} data sets "
            f"(mean {format_number(float(targets['mean_reward'].mean()))}), so its R² is not "
            "defined there. The replay buffer of a run, where it may change, can be diagnosed with "
            "--data=FOLDER."
        )
    else:
        reward = (
            "**Reward**, R² (share of its variance that is predicted): "
            f"{by_fix(result, result.held_out['reward_r2'])}. 1 is perfect, 0 is no better than "
            "predicting the mean; the agent can learn only from the predicted part of a synthetic "
            "reward."
        )
    state = (
        "**State**, R² of its change in one step (median dimension): "
        f"{by_fix(result, measures.median(result.held_out['state_r2']))}."
    )
    option = f"--fix={chosen}" if chosen != "none" else "the published targets"
    advice = (
        f"**{chosen}** ({option}) has the highest sum of reward and state R² among "
        f"{len(result.fixes)} combinations of fixes. The best of several is overestimated by "
        "selection, and only a run shows the effect of a fix on the return."
    )
    return [advice, reward, state]


def _variances(result: OfflineResult) -> str:
    targets = result.targets
    above = [(targets[n] > MAX_VARIANCE).sum(1).mean() for n in ("var_delta", "var_next")]
    ratios = [format_number(float(np.median(targets[n]))) for n in ("ratio_delta", "ratio_next")]
    return (
        f"Raw targets: the variances of s' - s sum to {ratios[0]} times that of the reward, those "
        f"of s' to {ratios[1]} times; targets of small variance contribute little to an unscaled "
        f"loss. {above[0]:.0f} dimensions of s' - s and {above[1]:.0f} of s' vary more than the "
        "largest noise that an ensemble with the default bounds can predict (variance e^0.5)."
    )


def _dims(result: OfflineResult) -> list[str]:
    kinds, count, r2 = dim_kinds(result), len(result.dims), result.held_out["state_r2"]
    lines = []
    if kinds.direct.any():
        line = (
            f"{int(kinds.direct.sum())} of {count} dimensions change more in a step than they vary, "
            f"so s' is the smaller target there: {list_dims(result.dims, kinds.direct)}."
        )
        values = [
            f"{format_mean(np.nanmean(r2[:, result.fixes.index(fix)][:, kinds.direct], 1), R2)} "
            f"with {fix}"
            for fix in ("scale", "scale,auto")
            if fix in result.fixes
        ]
        lines.append(line + (f" Their R²: {', '.join(values)}." if values else ""))
    if not kinds.constant.all():
        lines.append(_jumps(result, kinds))
    if kinds.constant.any():
        lines.append(
            f"{int(kinds.constant.sum())} of {count} dimensions are constant in these data: "
            f"{list_dims(result.dims, kinds.constant)}."
        )
    return lines


def _jumps(result: OfflineResult, kinds: DimKinds) -> str:
    share = np.where(kinds.constant, -1.0, np.nan_to_num(result.targets["top_share"].mean(0)))
    highest = int(share.argmax())
    reward = result.targets["reward_top_share"].mean()
    return (
        "The 1 % of steps with the largest changes contribute "
        f"{100 * np.median(share[~kinds.constant]):.0f} % of the squared change of a dimension "
        f"(median), {100 * share[highest]:.0f} % in {result.dims[highest]}"
        + (f", {100 * reward:.0f} % of that of the reward" if np.isfinite(reward) else "")
        + ". It is 8 % for Gaussian noise, and nearly 100 % for rare jumps, of which a model has "
        "few examples."
    )


def _reliability(result: OfflineResult) -> list[str]:
    coverage = result.new_episodes["coverage"][..., 1]
    r2 = measures.median(result.open_loop["state_r2"])  # (R, F, H)
    open_loop = "; ".join(
        f"after {steps} step{'s' if steps > 1 else ''} {by_fix(result, r2[:, :, steps - 1])}"
        for steps in dict.fromkeys([1, r2.shape[2]])
    )
    return [
        "Share of the true next states in new episodes inside the predicted 80 % intervals: "
        f"{by_fix(result, coverage, SHARE)}. Less than 0.8 means overconfidence, more means too much "
        "noise.",
        "R² of the state's change since the start in new episodes, for predictions that continue "
        f"from themselves (median dimension): {open_loop}. At 0 a rollout of that length is no "
        "better than the mean change.",
    ]
