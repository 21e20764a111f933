"""A run's folder told as a story: `curves.png` and `report.html`.

The page says first what came out, then shows the model's measures, the critic's, the clock's. It is
one file that needs nothing else, so it can be mailed or opened years later.
"""

import json
from collections.abc import Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dynajax.record.folder import write_atomically
from dynajax.report import charts, figures, markup, statistics
from dynajax.report.figures import Panel, Series
from dynajax.report.run import Run, curve, label, read_run, series


def write_report(folder: str | Path) -> Path:
    """Writes `curves.png` and `report.html` into a run's folder, each whole or not at all.

    Returns:
      The page's path.

    Raises:
      UsageError: see `read_run`.
    """
    run = read_run(folder)
    title = f"{run.config['env']}: {label(run, 'none')}, preset {run.config['preset']}"
    if run.config.get("oracle", "none") != "none":
        title += f", oracle {run.config['oracle']}"
    if run.repeat > 1:
        title += f", {run.repeat} frames a step"
    evals: Series = {curve(run, v): (run.steps, values) for v, values in run.evals.items()}
    panel = Panel(evals, figures.RETURN, include=0.0).framed(run.repeat)
    write_atomically(run.folder / "curves.png", figures.png(figures.curves([panel], title=title)))
    path = run.folder / "report.html"
    write_atomically(path, _html(run, title, figures.png(figures.curves([panel]))).encode())
    return path


def _html(run: Run, title: str, picture: bytes) -> str:
    style = figures.styles([curve(run, v) for v in run.config["variants"]])
    lead, *sentences = headline(run)
    parts = [f'<p class="lead">{lead}</p>', markup.bullets(sentences)]
    caption = (
        "Evaluation with the deterministic policy: mean over seeds, with the 95 % t interval over "
        "seeds shaded. Higher is better."
    )
    parts.append(markup.picture("", picture, caption))
    table = _final_table(run)
    if table:
        cells = [list(map(escape, row.values())) for row in table]
        for cell, row in zip(cells, table, strict=True):
            cell[0] = markup.swatch(style.get(row["variant"])) + cell[0]
        parts.append(markup.html_table(list(table[0]), cells))
    stories = {
        "The critic's story": [
            *charts.panels(charts.DIAGNOSED, partial(series, run, "diagnosis"), run.repeat),
            *charts.panels(charts.CRITIC, partial(series, run, "learn"), run.repeat),
        ]
    }
    if run.config["algo"] == "mbpo":
        model = charts.panels(charts.MODEL, partial(series, run, "fit"), run.repeat)
        stories = {"The model's story": model} | stories
    for heading, panels in stories.items():
        body = markup.story(panels, style) or "<p>Nothing has been logged yet.</p>"
        parts.append(f"<h2>{escape(heading)}</h2>{body}")
    return markup.document(title, "".join(parts) + _time(run) + _provenance(run.info))


def headline(run: Run) -> list[str]:
    """What came out, in plain sentences (HTML), the most important first."""
    if not run.evals or not run.steps.size:
        return ["<b>No evaluation has been written yet</b>, so there is nothing to say."]
    final = {v: values[:, -1] for v, values in run.evals.items()}
    sentences = [_result(run, final), _extent(run, final)]
    if "none" in final:
        sentences += [_beside_none(run, v, final) for v in final if v != "none"]
    dropped = max((line.get("dropped") or 0 for line in run.metrics["time"]), default=0)
    if dropped:
        sentences.append(
            f"{dropped:,} transitions were dropped because the physics gave no number."
        )
    return sentences


def _result(run: Run, final: Mapping[str, np.ndarray]) -> str:
    means = {v: float(statistics.interval(x).point) for v, x in final.items()}
    first, *others = sorted(means, key=lambda v: -np.nan_to_num(means[v], nan=-np.inf))
    result = f"<b>{statistics.over_seeds(final[first])}</b>"
    if not others:
        return f"Final return {result}."
    lead = statistics.difference(final[others[0]], final[first])
    return (
        f"<b>{escape(curve(run, first))}</b> has the highest of {len(final)} mean final returns: "
        f"{result}. The difference to {escape(curve(run, others[0]))} is {statistics.text(lead)}."
    )


def _extent(run: Run, final: Mapping[str, np.ndarray]) -> str:
    config, end = run.config, int(run.steps[-1])
    seeds = max(len(x) for x in final.values())
    begin = f"Not finished: {end:,} of {config['steps']:,}" if end < config["steps"] else f"{end:,}"
    return (
        f"{begin} environment steps ({run.frames[-1]:,} frames) on {escape(config['env'])}, preset "
        f"{config['preset']}, {seeds} seed{'s' if seeds > 1 else ''}"
        f"{' a variant' if len(final) > 1 else ''}. "
        + (
            "Ranges are 95 % t intervals over seeds; one of a difference that holds 0 leaves open "
            "which is the larger."
            if seeds > 1
            else "<b>One seed has no interval</b>: only large differences mean anything."
        )
    )


def _beside_none(run: Run, variant: str, final: Mapping[str, np.ndarray]) -> str:
    """What was measured of a variant and of the published targets."""
    gap = statistics.difference(final["none"], final[variant])
    sentence = f"<b>{escape(variant)}</b> less none: final return {statistics.text(gap)}"
    fits = [reward_fit(run, v) for v in (variant, "none")]
    if np.isfinite(fits).all():
        here, there = (f"{r2:.2f}" for r2 in fits)
        sentence += f"; reward R² in the later half of the fits {here} against {there}"
    return sentence + "."


def reward_fit(run: Run, variant: str) -> float:
    """R² of the reward on the holdout: median over seeds and the later half of the fits."""
    _, values = series(run, "fit", "r2_reward").get(variant, (None, np.empty((0, 0))))
    late = values[:, values.shape[1] // 2 :]
    return float(np.median(late[np.isfinite(late)])) if np.isfinite(late).any() else np.nan


def _final_table(run: Run) -> list[dict[str, str]]:
    """A line for each variant: what the page's first table shows."""
    rows = []
    modelled = run.config["algo"] == "mbpo"
    for variant, values in run.evals.items():
        if not run.steps.size:
            continue
        r2 = reward_fit(run, variant)
        peak = np.nanmax(statistics.interval(values).point, initial=-np.inf)
        rows.append(
            {
                "variant": curve(run, variant),
                "final return (95 % interval)": statistics.over_seeds(values[:, -1]),
                "best evaluation": f"{peak:,.0f}" if np.isfinite(peak) else "-",
                **({"reward R²": f"{r2:.2f}" if np.isfinite(r2) else "-"} if modelled else {}),
                "seeds": str(len(values)),
                "environment steps": f"{run.steps[-1]:,}",
                "frames": f"{run.frames[-1]:,}",
            }
        )
    return rows


def _time(run: Run) -> str:
    if not run.metrics["time"]:
        return ""
    clock = run.metrics["time"][-1]
    seconds = {stage: float(s or 0) for stage, s in (clock.get("seconds") or {}).items()}
    total = sum(seconds.values()) or 1.0
    rows = [
        [
            escape(stage),
            f"{s:,.1f} s",
            f"{s / total:.0%}",
            f'<div class="bar" style="width:{240 * s / total:.0f}px"></div>',
        ]
        for stage, s in seconds.items()
    ]
    wall, rate = (float(clock.get(k) or 0) for k in ("wall_seconds", "steps_per_second"))
    spent = f"{wall / 3600:,.1f} hours" if wall >= 3600 else f"{wall / 60:,.1f} minutes"
    return (
        f"<h2>Where the time went</h2><p>{spent} in all, {rate:,.1f} environment steps "
        f"({rate * run.repeat:,.1f} frames) a second (of every seed and variant at once).</p>"
        f"{markup.html_table(['stage', 'time', 'share', ''], rows)}"
    )


def _provenance(info: Mapping[str, Any]) -> str:
    flat: dict[str, Any] = {}
    for name, value in info["config"].items():
        flat |= (
            {f"{name}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )

    def listed(values: Mapping[str, Any]) -> str:
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
        return markup.html_table(
            ["name", "value"], [[escape(k), escape(v)] for k, v in texts.items()]
        )

    origin = {k: info.get(k) for k in ("device", "git_commit") if info.get(k)}
    counts = {f"{name} parameters": f"{n:,}" for name, n in (info.get("parameters") or {}).items()}
    versions = {k: v for k, v in (info.get("versions") or {}).items() if v}
    command = f"<pre>{escape(info['command'])}</pre>" if info.get("command") else ""
    return (
        f"<h2>How to repeat it</h2>{command}"
        f"<details><summary>Configuration</summary>{listed(flat)}</details>"
        f"<details><summary>Versions and device</summary>"
        f"{listed({**origin, **counts, **versions})}</details>"
    )
