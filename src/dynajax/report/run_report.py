"""Write the report of a run: `curves.png` and `report.html` in the run directory.

The report shows the result first, then metrics of the dynamics model, of the synthetic data, of the
critic, and the run time. It is one file without external parts, so it can be mailed or archived.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dynajax.report import charts, dimensions, figures, html, published, statistics
from dynajax.report.figures import FramesAt, Panel, Series
from dynajax.report.html import Image, Table, Video
from dynajax.report.run import (
    Run,
    curve_label,
    label,
    last_state_r2,
    read_run,
    return_bounds,
    series,
)
from dynajax.runs.directory import git_commits, write_atomically
from dynajax.runtime.timers import STAGES

#: Inches of a figure as wide as the report, so that its text is readable on a phone.
_WIDE = (5.6, 3.7)
_CURVES_CAPTION = f"""Evaluation with the deterministic policy; higher is better. {figures.lines_meaning()},
cut at the lowest and the highest possible return where these are known."""
_PUBLISHED_CAPTION = """The same curves by frames (simulator steps), with published curves of the same
task: means over seeds, dotted with their names at their ends, or grey. They end where this run does, or
at their first evaluation if that is later."""
_DIMS_CAPTION = """Share of the variance of each state dimension's change in one step that the model does
not explain, 1 - R², for the last fit on held-out transitions: lower is better, and 1 (grey line) is no
better than predicting the mean; mean over seeds. Dimensions that did not vary have no mark."""
_START_CAPTION = """Discounted values of the first states of the episodes of the last evaluation, mean over
seeds. The critic's value includes the entropy bonus of SAC, the return does not."""
_ACCEPTED_CAPTION = """Share of the rollouts whose step of this number the agent learned from, at the last
evaluation."""
#: Largest size of all embedded videos together, in bytes; the others are linked.
MAX_VIDEOS = 16 * 2**20


def write_report(folder: str | Path) -> Path:
    """Write `curves.png` and `report.html` into a run directory, each completely or not at all.

    Returns:
      The path of the report.

    Raises:
      UsageError: see `read_run`.
    """
    run = read_run(folder)
    variants = run.config["variants"]
    # Several variants are named in the legend. Without fixes, the label is that of the algorithm.
    title = f"{run.config['env']}: {label(run, variants[0], bare=len(variants) > 1)}"
    evals: Series = {curve_label(run, v): (run.steps, values) for v, values in run.evals.items()}
    bounds = return_bounds(run.config["env"])
    panel = Panel(evals, figures.RETURN, include=0.0, bounds=bounds).in_frames(frames_at(run))
    write_atomically(run.folder / "curves.png", figures.png(figures.curves([panel], title=title)))
    path = run.folder / "report.html"
    write_atomically(path, _html(run, title, panel))
    return path


def frames_at(run: Run) -> FramesAt | None:
    """Return how a run's figures convert steps to frames; None if they are the same."""
    return run.frames_at if run.repeat > 1 else None


def _html(run: Run, title: str, panel: Panel) -> bytes:
    curves = figures.png(figures.curves([panel], alone=_WIDE))
    style = figures.styles([curve_label(run, v) for v in run.config["variants"]])
    critic = [
        *charts.panels(charts.DIAGNOSED, partial(series, run, "diagnosis"), frames_at(run)),
        *charts.panels(charts.CRITIC, partial(series, run, "learn"), frames_at(run)),
    ]
    sources, published_curves = _published(run, panel)
    videos, links = _videos(run.folder)
    context = {
        "sentences": headline(run),
        "videos": videos,
        "video_links": links,
        "curves": html.image("", curves, _CURVES_CAPTION, wide=True),
        "final_returns": _final_returns(run),
        "styles": style,
        "published": published_curves,
        "published_sources": sources,
        "critic": html.figure_grid(critic, style),
        "start_values": _start_values(run),
        "start_values_caption": _START_CAPTION,
        "clock": _clock(run),
    }
    if run.config["algo"] != "model-free":
        context |= _model(run, style)
    return html.render("run_report", title=title, **context, **_provenance(run.info))


def _model(run: Run, style: Mapping[str, figures.Style]) -> dict[str, Any]:
    """Return what the sections about the model and the synthetic data show."""
    model = charts.panels(charts.MODEL, partial(series, run, "fit"), frames_at(run))
    synthetic = charts.panels(charts.SYNTHETIC, partial(series, run, "learn"), frames_at(run))
    fields = ", ".join(f"{k} {v}" for k, v in (run.config["trust"] or {}).items())
    return {
        "model": html.figure_grid(model, style),
        "dims": _dims(run),
        "synthetic": html.figure_grid([*synthetic, *_accepted_by_step(run)], style),
        "trust_name": run.config["trust_name"],
        "trust_settings": f" ({fields})" if fields else "",
    }


def _published(run: Run, panel: Panel) -> tuple[list[str], Image | None]:
    """Return published curves of the run's task, drawn with the run's, and their sources."""
    if not run.steps.size:
        return [], None
    methods = published.parse_methods("all")
    shown = published.curves_until(run.config["env"], methods, int(run.frames[-1]))
    if not shown:
        return [], None
    both = panel._replace(xlabel=figures.FRAMES, published=shown)
    size = (_WIDE[0], _WIDE[1] + 0.9)
    data = figures.png(figures.curves([both], alone=size))
    sources = [*published.labels(shown).values(), *published.sources(shown)]
    return sources, html.image("", data, _PUBLISHED_CAPTION, wide=True)


def _videos(folder: Path) -> tuple[list[Video], list[str]]:
    """Return the videos of a run to embed, and the names of those that are too large for that."""
    embedded, linked, size = [], [], 0
    for path in sorted(folder.glob("video-*.mp4")):
        if size + path.stat().st_size > MAX_VIDEOS:
            linked.append(path.name)
        else:
            size += path.stat().st_size
            name = path.stem.removeprefix("video-").replace("+", ",")
            embedded.append(html.video(name, path.read_bytes()))
    return embedded, linked


def _dims(run: Run) -> Image | None:
    """Draw R² of each state dimension at the last fit, if it was logged."""
    r2 = last_state_r2(run)
    names = run.info.get("dims") or []
    if not r2 or not names:
        return None
    means = {name: np.asarray(statistics.interval(v).point) for name, v in r2.items()}
    figure = dimensions.draw_r2(names, means, _WIDE)
    return html.image("", figures.png(figure), _DIMS_CAPTION, wide=True)


def _accepted_by_step(run: Run) -> list[tuple[Panel, str]]:
    """Return the share of accepted transitions by rollout step, at the last evaluation."""
    names = {k for line in run.metrics["learn"] for k in line if k.startswith("accepted_fraction_")}
    longest = len(names)
    if longest < 2:
        return []
    accepted = [series(run, "learn", f"accepted_fraction_{h + 1}") for h in range(longest)]
    lines = {
        name: (np.arange(1, longest + 1), np.stack([a[name][1][:, -1] for a in accepted], 1))
        for name in accepted[0]
        if all(name in a for a in accepted)
    }
    title = "Accepted share by rollout step"
    panel = Panel(lines, "share accepted", title, include=0.0, xlabel="step of the rollout")
    return [(panel, _ACCEPTED_CAPTION)]


def headline(run: Run) -> list[str]:
    """Return the result in sentences, the most important first.

    They are plain text in which ** marks emphasis.
    """
    if not run.evals or not run.steps.size:
        return ["**No evaluation has been written yet.**"]
    final = {v: values[:, -1] for v, values in run.evals.items()}
    sentences = [_verdict(run, final), _extent(run, final)]
    reference, *others = _ordered(final)
    if others:
        sentences += [_difference(run, v, reference, final) for v in others]
    if len(others) > 1:
        sentences.append("These intervals are not corrected for the number of comparisons.")
    dropped = max((line.get("dropped") or 0 for line in run.metrics["time"]), default=0)
    if dropped:
        sentences.append(
            f"{dropped:,} transitions were dropped because the simulator or the policy returned "
            "values that are not finite."
        )
    return sentences


def _ordered(final: Mapping[str, np.ndarray]) -> list[str]:
    """Return the variants, the one that the others are compared with first."""
    return sorted(final, key=lambda v: v != "none")


def _verdict(run: Run, final: Mapping[str, np.ndarray]) -> str:
    """Return the result of a run in one sentence."""
    reference, *others = _ordered(final)
    seeds = _count(final)
    so_far = "So far: " if run.steps[-1] < run.config["steps"] else ""
    if not others:
        result = statistics.format_mean(final[reference], return_bounds(run.config["env"]))
        return f"{so_far}**Final return {result}**, {seeds}."
    gaps = {v: statistics.difference(final[reference], final[v]) for v in others}
    names = f"`{reference}`"
    if len(others) == 1:
        [(other, gap)] = gaps.items()
        result = f": {statistics.format_interval(gap)}, {seeds} each."
        if not np.isfinite(gap.low):
            return (
                f"{so_far}**No verdict on `{other}` and {names}**: the difference of their final "
                f"returns is {statistics.format_number(gap.point)}, but an interval needs two seeds "
                "with finite returns."
            )
        if gap.low > 0 or gap.high < 0:
            relation = "higher" if gap.low > 0 else "lower"
            return f"{so_far}**`{other}` has a {relation} final return than {names}**{result}"
        return f"{so_far}**No detectable difference between {names} and `{other}`**{result}"
    groups = {
        f"Higher final return than {names}": [v for v, gap in gaps.items() if gap.low > 0],
        f"Lower final return than {names}": [v for v, gap in gaps.items() if gap.high < 0],
        f"No detectable difference to {names}": [
            v for v, gap in gaps.items() if gap.low <= 0 <= gap.high
        ],
        f"No verdict against {names}": [v for v, gap in gaps.items() if not np.isfinite(gap.low)],
    }
    parts = [
        f"**{relation}: {', '.join(f'`{v}`' for v in found)}.**"
        for relation, found in groups.items()
        if found
    ]
    return f"{so_far}{' '.join(parts)} {seeds.capitalize()} each."


def _count(final: Mapping[str, np.ndarray]) -> str:
    """Return how many seeds each variant has, of them those with a finite return."""
    all_seeds = max(len(x) for x in final.values())
    fewest = min(np.isfinite(x).sum() for x in final.values())
    plural = "s" if all_seeds > 1 else ""
    if fewest == all_seeds:
        return f"{all_seeds} seed{plural}"
    least = "at least " if len(final) > 1 else ""
    return f"{least}{fewest} of {all_seeds} seed{plural} with a finite return"


def _extent(run: Run, final: Mapping[str, np.ndarray]) -> str:
    config, end = run.config, int(run.steps[-1])
    seeds = max(len(x) for x in final.values())
    done = f"Not finished: {end:,} of {config['steps']:,}" if end < config["steps"] else f"{end:,}"
    # An episode may end within a step.
    at_most = "" if run.frames[-1] == end * run.repeat else "at most "
    each = f", {at_most}{run.repeat} frames per step" if run.repeat > 1 else ""
    return (
        f"{done} agent steps ({run.frames[-1]:,} frames{each}) on {config['env']}, agent "
        f"{config['agent_name']}, preset {config['preset']}, {_count(final)}"
        f"{' per variant' if len(final) > 1 else ''}. "
        + (
            "Ranges are 95 % t intervals over seeds; if the interval of a difference contains 0, "
            "the data do not show which value is larger."
            if seeds > 1
            else "**A single seed has no interval**, so small differences mean nothing."
        )
    )


def _difference(run: Run, variant: str, reference: str, final: Mapping[str, np.ndarray]) -> str:
    """Compare a variant with the reference."""
    gap = statistics.difference(final[reference], final[variant])
    sentence = f"`{variant}` minus `{reference}`: final return {statistics.format_interval(gap)}"
    fits = [late_reward_r2(run, v) for v in (variant, reference)]
    if np.isfinite(fits).all():
        ours, none = (f"{r2:.2f}" for r2 in fits)
        sentence += f"; reward R² in the second half of the fits {ours} and {none}"
    return sentence + "."


def _start_values(run: Run) -> Table:
    """Return the critic's values of first states and the returns from there, if both are logged.

    They are of the last step at which any learner has logged them. A learner counts if it has both.
    """
    names = ("start_value", "start_return")
    lines = [x for x in run.metrics["learn"] if any(x.get(name) is not None for name in names)]
    end = max((line["step"] for line in lines), default=None)
    rows = []
    for variant in run.config["variants"]:
        pairs = [
            [line[name] for name in names]
            for line in lines
            if (line["variant"], line["step"]) == (variant, end)
            and all(line.get(name) is not None for name in names)
        ]
        if pairs:
            value, came = np.array(pairs, float).T
            cells = (statistics.format_mean(x) for x in (value, came, value - came))
            rows.append([curve_label(run, variant), *cells])
    return Table(["", "critic's value", "discounted return", "difference"], rows)


def late_reward_r2(run: Run, variant: str) -> float:
    """Return R² of the reward on the holdout: median over seeds and the second half of the fits."""
    _, values = series(run, "fit", "r2_reward").get(variant, (None, np.empty((0, 0))))
    late = values[:, values.shape[1] // 2 :]
    return float(np.median(late[np.isfinite(late)])) if np.isfinite(late).any() else np.nan


def _final_returns(run: Run) -> Table:
    """Return the first table of the report, with a row for each variant."""
    has_model = run.config["algo"] != "model-free"
    header = [
        "variant",
        "final return (95 % interval)",
        "best evaluation",
        *(["reward R²"] if has_model else []),
        "seeds",
        "agent steps",
        "frames",
    ]
    rows = []
    for variant, values in run.evals.items() if run.steps.size else ():
        r2 = late_reward_r2(run, variant)
        peak = np.nanmax(statistics.interval(values).point, initial=-np.inf)
        rows.append(
            [
                curve_label(run, variant),
                statistics.format_mean(values[:, -1], return_bounds(run.config["env"])),
                statistics.format_number(peak) if np.isfinite(peak) else "-",
                *([f"{r2:.2f}" if np.isfinite(r2) else "-"] if has_model else []),
                statistics.format_count(values[:, -1]),
                f"{run.steps[-1]:,}",
                f"{run.frames[-1]:,}",
            ]
        )
    return Table(header, rows)


def _clock(run: Run) -> dict[str, Any] | None:
    """Return the run time by stage, if it was logged."""
    if not run.metrics["time"]:
        return None
    clock = run.metrics["time"][-1]
    seconds = {stage: float(s or 0) for stage, s in (clock.get("seconds") or {}).items()}
    total = sum(seconds.values()) or 1.0
    wall, rate = (float(clock.get(k) or 0) for k in ("wall_seconds", "steps_per_second"))
    per_step = run.frames[-1] / run.steps[-1] if run.steps.size else run.repeat
    return {
        "total": f"{wall / 3600:,.1f} hours" if wall >= 3600 else f"{wall / 60:,.1f} minutes",
        "rate": f"{rate:,.1f} agent steps ({rate * per_step:,.1f} frames)",
        "stages": [
            {"name": STAGES.get(stage, stage), "seconds": s, "share": s / total}
            for stage, s in seconds.items()
            if s
        ],
    }


def _provenance(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the command, the machine and versions, and the configuration of a run."""
    flat: dict[str, Any] = {}
    for name, value in info["config"].items():
        flat |= (
            {f"{name}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    origin = {k: info[k] for k in ("device", "machine") if info.get(k)}
    if commits := git_commits(info):
        origin["git_commit"] = ", ".join(commits)
    versions = {k: v for k, v in (info.get("versions") or {}).items() if v}
    counts = {f"{name} parameters": f"{n:,}" for name, n in (info.get("parameters") or {}).items()}
    return {
        "command": info.get("command"),
        "origin": origin | versions | counts,
        "settings": {k: v if isinstance(v, str) else json.dumps(v) for k, v in flat.items()},
    }
