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

from dynajax.report import charts, dimensions, figures, html, published, statistics
from dynajax.report.figures import Panel, Series
from dynajax.report.run import Run, curve, label, last_channels, read_run, series
from dynajax.runs.directory import write_atomically

#: Inches of a picture that has a page's width: its text can be read on a phone.
_ON_PAGE = (5.6, 3.7)
_CAPTION = """Evaluation with the deterministic policy: mean over seeds, with the 95 % t interval over
seeds shaded. Higher is better."""
_PUBLISHED = """The same curves, by frames (the simulator's steps), before published ones of the same
task: mean over seeds, a standard deviation to either side where one was published. They end where
this run does, or where each has its first evaluation. UTD is gradient updates a decision, repeat the
frames of a decision; widths are of the networks (actor/critic)."""
_CHANNELS = """How much of each channel's change in a step the last fit predicts on transitions that it
was not trained on: 1 is all, 0 no more than the mean (below -1 is cut off); mean over seeds. Channels
that did not vary have no mark."""
_EXPECTED = """Of the first states of the last evaluation's episodes, discounted, mean over seeds. What
the critic expects counts SAC's reward for randomness, what came does not."""
_KEPT = (
    """Share of the rollouts whose step of this number was learned from, at the last evaluation."""
)


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
    write_atomically(path, _html(run, title, panel).encode())
    return path


def _html(run: Run, title: str, panel: Panel) -> str:
    style = figures.styles([curve(run, v) for v in run.config["variants"]])
    lead, *sentences = headline(run)
    picture = figures.png(figures.curves([panel], alone=_ON_PAGE))
    parts = [
        f'<p class="lead">{lead}</p>',
        html.bullets(sentences),
        html.picture("", picture, _CAPTION, wide=True),
    ]
    table = _final_table(run)
    if table:
        cells = [list(map(escape, row.values())) for row in table]
        for cell, row in zip(cells, table, strict=True):
            cell[0] = html.swatch(style.get(row["variant"])) + cell[0]
        parts.append(html.html_table(list(table[0]), cells))
    parts.append(_published(run, panel))
    learn = partial(series, run, "learn")
    stories: dict[str, str] = {}
    if run.config["algo"] == "mbpo":
        model = charts.panels(charts.MODEL, partial(series, run, "fit"), run.repeat)
        stories["The model's story"] = html.story(model, style) + _channels(run)
        kept = [*charts.panels(charts.SYNTHETIC, learn, run.repeat), *_kept_by_step(run)]
        stories["What was kept of the synthetic data"] = _rule(run) + html.story(kept, style)
    critic = [
        *charts.panels(charts.DIAGNOSED, partial(series, run, "diagnosis"), run.repeat),
        *charts.panels(charts.CRITIC, learn, run.repeat),
    ]
    stories["The critic's story"] = _expected(run) + html.story(critic, style)
    for heading, body in stories.items():
        body = body or "<p>Nothing has been logged yet.</p>"
        parts.append(f"<h2>{escape(heading)}</h2>{body}")
    return html.document(title, "".join(parts) + _time(run) + _provenance(run.info))


def _published(run: Run, panel: Panel) -> str:
    """The run beside the published curves of its task, "" where there are none."""
    task = run.config["env"]
    if not run.steps.size:
        return ""
    shown = published.beside(task, published.choose("all"), int(run.frames[-1]))
    if not shown:
        return ""
    lines = {name: (run.frames, values) for name, (_, values) in panel.lines.items()}
    both = panel._replace(lines=lines, xlabel=figures.FRAMES, published=shown)
    size = (_ON_PAGE[0], _ON_PAGE[1] + 0.9)
    data = figures.png(figures.curves([both], alone=size))
    origin = "".join(f"<li>{escape(text)}</li>" for text in published.sources(shown))
    return (
        f"<h2>Beside published results</h2>{html.picture('', data, _PUBLISHED, wide=True)}"
        f"<details><summary>Where they are from</summary><ul>{origin}</ul></details>"
    )


def _channels(run: Run) -> str:
    """What the last fit predicts of every channel, "" where it was not logged."""
    skills = last_channels(run)
    names = run.info.get("channels") or []
    if not skills or not names:
        return ""
    with np.errstate(all="ignore"):
        means = {name: _mean(values) for name, values in skills.items()}
    figure = dimensions.skills(names, means, _ON_PAGE)
    return html.picture("", figures.png(figure), _CHANNELS, wide=True)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over seeds (seeds, D) -> (D,), of those that have a value."""
    return np.asarray(statistics.interval(values).point)


def _rule(run: Run) -> str:
    """Which rule of trust there was, in words (HTML)."""
    name = run.config["trust_name"]
    fields = ", ".join(f"{k} {v}" for k, v in (run.config["trust"] or {}).items())
    if name == "none":
        return "<p>No rule of trust: all that is finite and goes on is learned from.</p>"
    return f"<p>Rule of trust: <b>{escape(name)}</b>{escape(f' ({fields})' if fields else '')}.</p>"


def _kept_by_step(run: Run) -> list[tuple[Panel, str]]:
    """What was kept at each step of the rollouts, at the last evaluation."""
    names = {k for line in run.metrics["learn"] for k in line if k.startswith("accepted_fraction_")}
    longest = len(names)
    if longest < 2:
        return []
    kept = [series(run, "learn", f"accepted_fraction_{h + 1}") for h in range(longest)]
    lines = {
        name: (
            np.arange(1, longest + 1),
            np.stack([k[name][1][:, -1] for k in kept], 1),
        )
        for name in kept[0]
        if all(name in k for k in kept)
    }
    panel = Panel(lines, "share kept", "How far are rollouts trusted?", xlabel="step of a rollout")
    return [(panel._replace(include=0.0), _KEPT)]


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


def _expected(run: Run) -> str:
    """What the critic expects of first states, and what came of them, at the last evaluation."""
    value, real = (series(run, "learn", name) for name in ("start_value", "start_return"))
    rows = []
    for name in (n for n in value if n in real):
        expected, came = (lines[name][1][:, -1] for lines in (value, real))
        texts = [statistics.over_seeds(x) for x in (expected, came, expected - came)]
        rows.append([escape(name), *map(escape, texts)])
    if not rows:
        return ""
    header = ["", "the critic expects", "came", "difference"]
    return f"<p>{_EXPECTED}</p>{html.html_table(header, rows)}"


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
        f"{html.html_table(['stage', 'time', 'share', ''], rows)}"
    )


def _provenance(info: Mapping[str, Any]) -> str:
    flat: dict[str, Any] = {}
    for name, value in info["config"].items():
        flat |= (
            {f"{name}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in flat.items()}
    origin = {k: info[k] for k in ("device", "machine", "git_commit") if info.get(k)}
    counts = {f"{name} parameters": f"{n:,}" for name, n in (info.get("parameters") or {}).items()}
    versions = {k: v for k, v in (info.get("versions") or {}).items() if v}
    command = f"<pre>{escape(info['command'])}</pre>" if info.get("command") else ""
    return (
        f"<h2>How to repeat it</h2>{command}{html.facts({**origin, **versions, **counts})}"
        f"<details><summary>Configuration</summary>{html.facts(texts)}</details>"
    )
