"""Write the diagnosis before training as a report, and its numbers as CSV."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynajax.diagnose import measures, offline_plots, statements
from dynajax.diagnose.offline import OfflineResult
from dynajax.models import targets
from dynajax.report import figures, html, statistics
from dynajax.report.dimensions import FLOOR
from dynajax.report.figures import Panel
from dynajax.report.html import Table
from dynajax.runs.directory import write_atomically, write_csv

#: Label of the diagonal of the calibration plots.
_IDEAL = "ideal"
_GREY: figures.Style = {"color": "#8a8a8a", "linestyle": "-."}

_ERRORS = """Share of the variance that the model does not explain, 1 - R², on transitions that no fit
used: lower is better, and 1 (grey line) is no better than predicting the mean. Left: the reward. Middle:
the change of the state, median dimension. Right: mean of the five dimensions with the lowest R². A row
for each combination of fixes: red is published MBPO, green the highest sum of the first two panels'
R². Large dots: mean over seeds. Small dots: single seeds."""
_VARIANCES = """Variance of each dimension of the observation (s', squares) and of its change in one step
(s' - s, circles), and of the reward (dashed). Published MBPO weights the circles and the reward
equally, so targets of small variance contribute less to the loss. Where the square is lower, s' is the
smaller target."""
_R2_DIMS = """Share of the variance of each dimension's change in one step that the model does not explain,
1 - R², mean over seeds: lower is better, and 1 (grey line) is no better than predicting the mean
change."""
#: Title -> caption of the panels on multi-step predictions and calibration.
_RELIABILITY = {
    "Multi-step predictions: state": """The model continues from its own predictions with the real
actions, in episodes that no fit used. R² of the state's change since the start, median dimension. At
0 a rollout of that length is no better than the mean change.""",
    "Multi-step predictions: reward": """The same for the sum of the rewards so far (values below -1
are clipped).""",
    "Calibration: state": """Share of the true next states inside the predicted 50, 80 and 95 %
intervals, in new episodes. Below the grey line the model is overconfident.""",
    "Calibration: reward": "The same for the reward.",
}


def by_fix_and_seed(result: OfflineResult) -> list[dict[str, Any]]:
    """Return the rows of fixes.csv."""
    rows = []
    for r in range(len(result.targets["var_reward"])):
        for f, fix in enumerate(result.fixes):
            held_out, new, open_loop = (
                {k: v[r, f] for k, v in table.items()}
                for table in (result.held_out, result.new_episodes, result.open_loop)
            )
            row: dict[str, Any] = {
                "env": result.env,
                "seed": result.first_seed + r,
                "fix": fix,
                "reward_r2": float(held_out["reward_r2"]),
                "state_r2": float(measures.median(held_out["state_r2"])),
                "state_r2_worst5": float(measures.mean_of_lowest(held_out["state_r2"])),
                "reward_bias": float(held_out["reward_bias"]),
                "reward_aleatoric_std": float(held_out["reward_aleatoric_std"]),
                "new_reward_r2": float(new["reward_r2"]),
                "new_state_r2": float(measures.median(new["state_r2"])),
            }
            for i, share in enumerate(measures.COVERAGES):
                row[f"coverage_{100 * share:.0f}"] = float(held_out["coverage"][i])
                row[f"reward_coverage_{100 * share:.0f}"] = float(held_out["reward_coverage"][i])
                row[f"new_coverage_{100 * share:.0f}"] = float(new["coverage"][i])
            for h in (1, 5, len(open_loop["state_r2"])):
                state_r2 = measures.median(open_loop["state_r2"][h - 1])
                row[f"open_loop_state_r2_{h}"] = float(state_r2)
                row[f"open_loop_reward_r2_{h}"] = float(open_loop["reward_r2"][h - 1])
            row["open_loop_epistemic_std"] = float(open_loop["epistemic_std"][-1])
            for name in ("ratio_delta", "ratio_next", "var_reward", "reward_top_share"):
                row[name] = float(result.targets[name][r])
            rows.append(row)
    return rows


def by_dim(result: OfflineResult) -> list[dict[str, Any]]:
    """Return the rows of dims.csv, means over seeds."""
    kinds = statements.dim_kinds(result)
    columns = {"r2": "state_r2"} | {n: n for n in ("rmse", "aleatoric_std", "epistemic_std")}
    rows = []
    for d, dim in enumerate(result.dims):
        moving = "direct" if kinds.direct[d] else "residual"
        row: dict[str, Any] = {"dim": dim, "kind": "constant" if kinds.constant[d] else moving}
        for name in ("var_delta", "var_next", "top_share", "typical"):
            row[name] = float(result.targets[name][:, d].mean())
        for f, fix in enumerate(result.fixes):
            for column, name in columns.items():
                row[f"{column} {fix}"] = float(result.held_out[name][:, f, d].mean())
        rows.append(row)
    return rows


def by_steps(result: OfflineResult) -> list[dict[str, Any]]:
    """Return the rows of open_loop.csv, means over seeds."""
    measured = result.open_loop
    return [
        {
            "fix": fix,
            "steps": h + 1,
            "state_r2": float(measures.median(measured["state_r2"][:, f, h]).mean()),
            "reward_r2": float(measured["reward_r2"][:, f, h].mean()),
            "epistemic_std": float(measured["epistemic_std"][:, f, h].mean()),
        }
        for f, fix in enumerate(result.fixes)
        for h in range(measured["state_r2"].shape[2])
    ]


def write(result: OfflineResult, folder: Path, command: str) -> list[str]:
    """Write diagnosis.html, fixes.csv, dims.csv and open_loop.csv.

    Returns:
      The sentences of the report, see `statements.sentences`.
    """
    sentences = statements.sentences(result)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "fixes.csv", by_fix_and_seed(result))
    write_csv(folder / "dims.csv", by_dim(result))
    write_csv(folder / "open_loop.csv", by_steps(result))
    write_atomically(folder / "diagnosis.html", _html(result, sentences, command))
    return sentences


def _html(result: OfflineResult, sentences: Sequence[str], command: str) -> bytes:
    shown = statements.compared(result)
    figure = {
        "errors": (offline_plots.errors(result, statements.best(result)), _ERRORS),
        "target_variances": (offline_plots.target_variances(result), _VARIANCES),
        "r2_dims": (offline_plots.r2_by_dim(result, shown), _R2_DIMS),
    }
    fixes = [["none", "as published: predict s' - s and the reward, in the units of the task"]]
    fixes += [[name, fix.summary] for name, fix in targets.FIXES.items()]
    style = figures.styles(shown) | {_IDEAL: _GREY}
    return html.render(
        "offline_diagnosis",
        title=f"{result.env}: what can a model learn?",
        sentences=[*sentences, _origin(result)],
        fixes=Table(["fix", "effect"], fixes),
        reliability=html.figure_grid(_panels(result, shown), style),
        numbers=_numbers(result),
        command=command,
        **{n: html.image("", figures.png(drawn), text) for n, (drawn, text) in figure.items()},
    )


def _origin(result: OfflineResult) -> str:
    """Describe the data and the models."""
    seeds = len(result.targets["var_reward"])
    return (
        f"{result.source}; {result.transitions:,} transitions for each of {seeds} "
        f"seed{'s' if seeds > 1 else ''}. The models are small and trained briefly, in the same "
        "way under every fix: compare fixes, and expect higher values from longer training. "
        + (
            "Ranges are 95 % t intervals over seeds, cut at impossible values such as an R² above 1."
            if seeds > 1
            else "**A single seed has no interval.**"
        )
    )


def _panels(result: OfflineResult, fixes: Sequence[str]) -> list[tuple[Panel, str]]:
    index = {fix: result.fixes.index(fix) for fix in fixes}
    steps = np.arange(1, result.open_loop["state_r2"].shape[2] + 1)
    shares = np.array(measures.COVERAGES)

    def multi_step(values: np.ndarray) -> Panel:
        lines = {n: (steps, np.clip(values[:, f], FLOOR, 1)) for n, f in index.items()}
        return Panel(lines, "R²", floor=FLOOR, bounds=statistics.R2, xlabel="steps")

    def calibration(values: np.ndarray) -> Panel:
        lines = {_IDEAL: (shares, shares[None])}
        lines |= {n: (shares, values[:, f]) for n, f in index.items()}
        return Panel(
            lines,
            "share inside",
            include=1.0,
            bounds=statistics.SHARE,
            xlabel="probability of the interval",
        )

    panels = [
        multi_step(measures.median(result.open_loop["state_r2"])),
        multi_step(result.open_loop["reward_r2"]),
        calibration(result.new_episodes["coverage"]),
        calibration(result.new_episodes["reward_coverage"]),
    ]
    return [
        (panel._replace(title=title), caption)
        for panel, (title, caption) in zip(panels, _RELIABILITY.items(), strict=True)
    ]


def _numbers(result: OfflineResult) -> Table:
    held_out, steps = result.held_out, result.open_loop["state_r2"].shape[2]
    columns = {
        "reward R²": (held_out["reward_r2"], statistics.R2),
        "reward bias": (held_out["reward_bias"], statistics.UNBOUNDED),
        "reward aleatoric std": (held_out["reward_aleatoric_std"], statistics.POSITIVE),
        "state R²": (measures.median(held_out["state_r2"]), statistics.R2),
        "worst five": (measures.mean_of_lowest(held_out["state_r2"]), statistics.R2),
        "coverage of 80 %": (held_out["coverage"][..., 1], statistics.SHARE),
        "reward R², new episodes": (result.new_episodes["reward_r2"], statistics.R2),
        f"state R² after {steps} steps": (
            measures.median(result.open_loop["state_r2"][:, :, -1]),
            statistics.R2,
        ),
    }
    rows = [
        [fix, *(statistics.format_mean(x[:, f], bounds) for x, bounds in columns.values())]
        for f, fix in enumerate(result.fixes)
    ]
    return Table(["fix", *columns], rows)
