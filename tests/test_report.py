"""Read run directories and write reports of them."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynajax import report
from dynajax.report import figures, statistics
from dynajax.report.run import is_dm_control, last_state_r2
from dynajax.types import UsageError
from fake_runs import VARIANTS, fake_run

ROOT = Path(__file__).parents[1]


def test_read_run_returns_evaluations_by_variant_seed_and_step(tmp_path):
    run = report.read_run(fake_run(tmp_path / "run", steps=3000))
    assert list(run.evals) == list(VARIANTS)
    assert run.steps.tolist() == [1000, 2000, 3000] and run.seeds == (0, 1, 2)
    with open(tmp_path / "run/eval.csv") as file:
        expected = [
            float(line["return_mean"])
            for line in csv.DictReader(file)
            if line["variant"] == "scale,target" and line["seed"] == "1"
        ]
    assert run.evals["scale,target"][1].tolist() == expected
    steps, values = report.series(run, "fit", "r2_reward")["none"]
    assert steps.tolist() == [1000, 2000, 3000] and values.shape == (3, 3)


def test_incomplete_last_line_is_ignored(tmp_path):
    folder = fake_run(tmp_path / "run", steps=3000)
    for name in ("eval.csv", "metrics.jsonl"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-7])
    run = report.read_run(folder)
    # The line of the last seed is incomplete, so the last evaluation does not count.
    assert run.steps.tolist() == [1000, 2000]
    assert len(run.metrics["time"]) == 2
    assert "**" in report.headline(run)[0]


def test_read_run_of_files_cut_at_any_byte(tmp_path):
    folder = fake_run(tmp_path / "run", variants=("none", "scale"), steps=2000, seeds=2)
    whole = {name: (folder / name).read_bytes() for name in ("eval.csv", "metrics.jsonl")}
    for share in np.linspace(0, 1, 30):
        for name, data in whole.items():
            (folder / name).write_bytes(data[: int(share * len(data))])
        report.headline(report.read_run(folder))


def test_later_line_of_a_step_counts_and_null_is_nan(tmp_path):
    folder = fake_run(tmp_path / "run", algo="model-free", seeds=1, steps=2000)
    with open(folder / "eval.csv", "a") as file:
        file.write("none,0,2000,2000,77.0,0,0,77,77\n")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind":"learn","variant":"none","seed":0,"step":3000,"q_mean":null}\n')
    run = report.read_run(folder)
    assert run.evals["none"].shape == (1, 2) and run.evals["none"][0, -1] == 77.0
    assert report.series(run, "learn", "q_mean")["SAC (model-free)"][0].tolist() == [1000, 2000]


@pytest.mark.parametrize("name", ["eval.csv", "metrics.jsonl", "config.json"])
def test_error_of_a_damaged_file_names_it_in_one_line(tmp_path, name):
    folder = fake_run(tmp_path / "run", steps=2000)
    lines = (folder / name).read_text().splitlines(keepends=True)
    lines[len(lines) // 2] = "none,zero,{\n"
    (folder / name).write_text("".join(lines))
    with pytest.raises(UsageError, match=re.escape(name)) as caught:
        report.read_run(folder)
    assert "\n" not in str(caught.value)


def test_report_is_complete_and_has_no_external_parts(tmp_path):
    variants = (*VARIANTS, "none;model.learning_rate=0.001")
    folder = fake_run(tmp_path / "run", variants=variants)
    page = report.write_report(folder).read_text()
    for text in (
        *variants,
        "preset quick",
        "cheetah-run",
        "10,000 agent steps",
        "3 seeds",
        "<h2>Dynamics model</h2>",
        "abc1234",
        "learn.utd",
    ):
        assert text in page, text
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:|//|file:)""", page)
    assert not re.search(r"<(link|script|iframe)\b|@import|https?://", page)
    assert "<th>frames</th>" in page and "(10,000 frames)" in page
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*")), "a temporary file was left"


def test_report_of_a_model_free_run_has_no_model_section(tmp_path):
    page = report.write_report(fake_run(tmp_path / "run", algo="model-free", seeds=1)).read_text()
    assert "<h2>Dynamics model" not in page and "<h2>Critic" in page
    assert "A single seed has no interval" in page


@pytest.mark.parametrize("keep", ["nothing", "header"])
def test_report_of_a_run_without_evaluations(tmp_path, keep):
    folder = fake_run(tmp_path / "run", steps=2000)
    (folder / "metrics.jsonl").unlink()
    header = (folder / "eval.csv").read_text().splitlines()[0] + "\n"
    (folder / "eval.csv").write_text(header if keep == "header" else "")
    assert "No evaluation has been written yet" in report.write_report(folder).read_text()


def test_headline_gives_the_verdict_first_and_no_cause(tmp_path):
    run = report.read_run(fake_run(tmp_path / "run"))
    sentences = report.headline(run)
    final = {v: x[:, -1] for v, x in run.evals.items()}
    assert sentences[0] == (
        "**Higher final return than `none`: `scale`, `target`, `scale,target`.** 3 seeds each."
    )
    [scale] = [x for x in sentences if x.startswith("`scale` minus `none`")]
    gap = statistics.difference(final["none"], final["scale"])
    fits = report.late_reward_r2(run, "scale"), report.late_reward_r2(run, "none")
    assert statistics.format_interval(gap) in scale and "{:.2f} and {:.2f}.".format(*fits) in scale
    for word in ("explanation", "because", "must have", "does not explain", "too small"):
        assert word not in " ".join(sentences)


@pytest.mark.parametrize(
    ("returns", "verdict"),
    [
        ("100,90 100,95", "**No detectable difference between `none` and `scale`**: 2.50 (-"),
        ("10,11 90,91", "**`scale` has a higher final return than `none`**: 80 ("),
        ("90,91 10,11", "**`scale` has a lower final return than `none`**: -80 ("),
        (
            "10 90",
            "**No verdict on `scale` and `none`**: the difference of their final returns is 80",
        ),
    ],
)
def test_verdict_on_two_variants(tmp_path, returns, verdict):
    by_variant = [x.split(",") for x in returns.split()]
    folder = fake_run(
        tmp_path / "run", variants=("none", "scale"), steps=1000, seeds=len(by_variant[0])
    )
    lines = (folder / "eval.csv").read_text().splitlines()
    values = [value for of_variant in by_variant for value in of_variant]
    for i, value in enumerate(values, 1):
        parts = lines[i].split(",")
        lines[i] = ",".join([*parts[:4], value, *parts[5:]])
    (folder / "eval.csv").write_text("\n".join(lines) + "\n")
    first = report.headline(report.read_run(folder))[0]
    assert first.startswith(verdict), first
    config = json.loads((folder / "config.json").read_text())
    config["config"]["steps"] = 9000
    (folder / "config.json").write_text(json.dumps(config))
    assert report.headline(report.read_run(folder))[0] == f"So far: {first}"


def test_headline_with_returns_that_are_not_finite(tmp_path):
    folder = fake_run(tmp_path / "run", variants=("none", "scale"), steps=1000)
    text = (folder / "eval.csv").read_text()
    (folder / "eval.csv").write_text(
        re.sub(r"^(none,.,1000,1000),[^,]*", r"\1,nan", text, flags=re.M)
    )
    sentences = report.headline(report.read_run(folder))
    assert sentences[0].startswith("**No verdict on `scale` and `none`**")
    assert "is not defined" in sentences[0]
    report.write_report(folder)


def test_seeds_without_a_finite_return_are_not_counted(tmp_path):
    folder = fake_run(tmp_path / "run", algo="model-free", steps=1000, seeds=3)
    text = (folder / "eval.csv").read_text()
    (folder / "eval.csv").write_text(
        re.sub(r"^(none,1,1000,1000),[^,]*", r"\1,nan", text, flags=re.M)
    )
    assert report.headline(report.read_run(folder))[0].endswith(
        "**, 2 of 3 seeds with a finite return."
    )
    assert "2 of 3" in report.write_report(folder).read_text()


def test_intervals_show_no_impossible_values(tmp_path):
    """Cut the interval of a return at 1,000, the most that a task of dm_control gives."""
    folder = fake_run(tmp_path / "run", algo="model-free", steps=1000, seeds=2)
    text = (folder / "eval.csv").read_text()
    text = re.sub(r"^(none,0,1000,1000),[^,]*", r"\1,900", text, flags=re.M)
    (folder / "eval.csv").write_text(
        re.sub(r"^(none,1,1000,1000),[^,]*", r"\1,990", text, flags=re.M)
    )
    assert report.headline(report.read_run(folder))[0] == (
        "**Final return 945 (373 to 1,000)**, 2 seeds."
    )
    page = " ".join(report.write_report(folder).read_text().split())
    assert "945 (373 to 1,000)" in page and "cut at the lowest and the highest possible" in page
    assert statistics.format_mean([0.5, 0.9], statistics.R2) == "0.70 (-1.84 to 1.00)"


def test_few_seeds_are_thin_lines_and_many_a_band(tmp_path):
    for seeds in (1, 4, 5):
        values = np.random.default_rng(0).normal(size=(seeds, 6))
        [axes] = figures.curves([figures.Panel({"MBPO": (np.arange(6), values)}, "y")]).axes
        thin = [line for line in axes.get_lines() if line.get_linewidth() < 1]
        assert len(thin) == (4 if seeds == 4 else 0)
        assert len(axes.collections) == (seeds == 5)


def test_nothing_of_a_figure_is_cut_off():
    """Draw long titles and labels, and compare their extents with that of the figure."""
    name = "own_tasks:PendulumMilli-v0 in units that need a long title"
    bar = figures.Bars(f"{name}\n15k frames", "a label " * 5, {"MBPO + scale, target": (1, 0, 2)})
    lines = {"MBPO + scale, target (model.learning_rate=0.001)": (np.arange(3), np.ones((1, 3)))}
    panel = figures.Panel(lines, "return (reward per episode)", name)
    for figure in (
        figures.bars([bar] * 3, title=name * 3, note=name * 3),
        figures.curves([panel] * 3, title=name * 3, note=name * 3),
        figures.curves([panel]),
    ):
        figures.png(figure)
        renderer = figure.canvas.get_renderer()
        for axes in figure.axes:
            box = axes.get_tightbbox(renderer)
            assert box.x0 >= 0 and box.y0 >= 0, axes.get_title()
            assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert figure.get_figwidth() <= figures.WIDTH


@pytest.mark.parametrize("low", [-20_000, -1e-4, -7.5e-4, 0.011, 300, 1e6])
def test_labels_of_small_figures_stay_within_them(low):
    values = low * np.linspace(1, 0.6, 5)[None]
    lines = {"none": (np.arange(1, 6) * 1000, values)}
    panel = figures.Panel(lines, "state variance / reward variance")
    figure = figures.small(panel, figures.styles(["none"]))
    figures.png(figure)
    box = figure.get_tightbbox().get_points()
    assert (box[0] >= 0).all() and (box[1] <= figure.get_size_inches()).all(), box


def test_videos_are_embedded_up_to_a_size(tmp_path, monkeypatch):
    folder = fake_run(tmp_path / "run", steps=1000)
    (folder / "video-none.mp4").write_bytes(b"abc")
    (folder / "video-scale+target.mp4").write_bytes(b"x" * 100)
    monkeypatch.setattr("dynajax.report.run_report.MAX_VIDEOS", 50)
    page = report.write_report(folder).read_text()
    assert page.count("<video ") == 1 and "data:video/mp4;base64,YWJj" in page
    assert '<a href="video-scale%2Btarget.mp4">video-scale+target.mp4</a>' in page


def test_styles_are_distinct_and_the_same_in_every_figure():
    names = ["SAC (model-free)", *VARIANTS, *(f"scale;model.learning_rate={i}" for i in range(9))]
    looks = figures.styles(names)
    assert len({tuple(look.values()) for look in looks.values()}) == len(names)
    assert figures.styles(["MBPO + scale, target", "MBPO"]) == {
        "MBPO + scale, target": looks["scale,target"],
        "MBPO": looks["none"],
    }
    both = ["MBPO (SimBa)", "MBPO + scale (SimBa)", "MBPO + scale (SAC)"]
    agent = figures.styles(["SimBa (model-free)", *both])
    assert agent["MBPO + scale (SimBa)"] == looks["scale"]
    assert agent["SimBa (model-free)"] == looks["SAC (model-free)"]
    assert len({tuple(look.values()) for look in agent.values()}) == 4


def test_labels_name_the_agent_if_asked_to(tmp_path):
    def labels(name, **arguments):
        run = report.read_run(fake_run(tmp_path / name, steps=1000, seeds=1, **arguments))
        return [report.label(run, v, agent=True) for v in run.config["variants"]]

    variants = ("none", "scale", "none;model.learning_rate=0.001")
    assert labels("a", algo="model-free") == ["SAC (model-free)"]
    assert labels("b", algo="model-free", agent="simba") == ["SimBa (model-free)"]
    own = labels("c", algo="model-free", agent="module:toy", trust="m2ac")
    assert own == ["module:toy (model-free)"]
    rate = "model.learning_rate=0.001"
    assert labels("d", variants=variants) == [
        "MBPO (SAC)",
        "MBPO + scale (SAC)",
        f"MBPO (SAC, {rate})",
    ]
    page = report.write_report(tmp_path / "d").read_text()
    assert "<h1>cheetah-run: MBPO</h1>" in page
    assert "SimBa (model-free)</span>" in report.write_report(tmp_path / "b").read_text()


def test_run_of_an_older_version_is_refused_in_one_line(tmp_path):
    folder = fake_run(tmp_path / "run", steps=1000)
    info = json.loads((folder / "config.json").read_text())
    del info["config"]["agent_name"]
    (folder / "config.json").write_text(json.dumps(info))
    with pytest.raises(UsageError, match=r"config\.json was written by an older version") as caught:
        report.read_run(folder)
    assert "\n" not in str(caught.value)


def test_text_of_a_run_is_escaped_in_the_report(tmp_path):
    folder = fake_run(tmp_path / "run", variants=("none", "<i>&"), steps=1000)
    page = report.write_report(folder).read_text()
    assert "<code>&lt;i&gt;&amp;</code>" in page and "<i>" not in page and "**" not in page


def test_x_axis_is_frames_if_a_step_has_several(tmp_path, monkeypatch):
    drawn = []
    curves = figures.curves
    monkeypatch.setattr(
        figures, "curves", lambda panels, **kw: drawn.extend(panels) or curves(panels, **kw)
    )
    monkeypatch.setattr(
        figures, "small", lambda panel, style: drawn.append(panel) or curves([panel])
    )
    folder = fake_run(tmp_path / "twice", repeat=2, steps=3000)
    page = report.write_report(folder).read_text()
    assert "3,000 agent steps (6,000 frames, 2 frames per step)" in page
    assert "5.0 agent steps (10.0 frames) a second" in page
    main = drawn[0]
    assert main.xlabel == "frames" and main.lines["none"][0].tolist() == [2000, 4000, 6000]
    dotted = figures.Panel({}, "y", dotted=main.lines).in_frames(lambda name, steps: 2 * steps)
    assert dotted.dotted["none"][0].tolist() == [4000, 8000, 12000]
    assert main.in_frames(None) is main
    drawn.clear()
    report.write_report(fake_run(tmp_path / "once", steps=3000))
    assert {panel.xlabel for panel in drawn if not panel.published} == {"agent steps"}


# A shell, a notebook or a cluster may set MPLBACKEND to a backend that is not installed.
_DRAW = """
import os, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("matplotlib_inline"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from dynajax import report
report.write_report(sys.argv[1])
print(os.environ["MPLBACKEND"], "matplotlib.pyplot" in sys.modules)
"""


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no such one"])
def test_figures_do_not_depend_on_mplbackend(tmp_path, backend):
    folder = fake_run(tmp_path / "run", variants=("none",), seeds=1, steps=1000)
    done = subprocess.run(
        [sys.executable, "-c", _DRAW, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "MPLBACKEND": backend},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{backend} False\n", "MPLBACKEND is restored"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_has_dimensions_trust_rule_start_values_published_curves_and_machine(tmp_path):
    folder = fake_run(tmp_path / "run", env="quadruped-walk", trust="m2ac", repeat=2, steps=2000)
    page = report.write_report(folder).read_text()
    for text in (
        "variance of each state dimension",
        "Trust rule: <b>m2ac</b>",
        "Accepted share by rollout step",
        "Penalty",
        "critic&#39;s value</th>",
        "Published results on the same task",
        "SimbaV2 results/baseline/simba_utd2.csv (SimBa)",
        "A processor, 2 cores; Linux",
        "0.10.2",
        "<pre>python experiments/run.py --env=quadruped-walk</pre>",
    ):
        assert text in page, text
    run = report.read_run(folder)
    r2 = last_state_r2(run)
    assert r2["none"].shape == (3, 17) and np.isnan(r2["none"][:, 0]).all()
    np.testing.assert_allclose(r2["scale"][:, 16], 0.8 * 16 / 17)


def test_start_values_and_returns_are_of_the_same_seeds_and_evaluation(tmp_path):
    folder = fake_run(tmp_path / "run", algo="model-free", steps=3000, seeds=3)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "learn":
            value = 100 * line["seed"] + line["step"] / 1000
            # Null stands for values that are not finite: always, or at the end.
            gone = line["seed"] == 0 or (line["seed"] == 1 and line["step"] == 3000)
            line |= {"start_value": None if gone else value + 7, "start_return": value}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    cells = re.findall(r"<td[^>]*>(210|203|7\.00)</td>", report.write_report(folder).read_text())
    assert cells == ["210", "203", "7.00"]
    (folder / "metrics.jsonl").write_text(
        re.sub(r'"start_value": [^,]*', '"start_value": null', text)
    )
    assert "critic&#39;s value</th>" not in report.write_report(folder).read_text()


def test_report_without_dimensions_trust_rule_or_published_curves(tmp_path):
    folder = fake_run(tmp_path / "run", env="Pendulum-v1", steps=2000)
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r', "r2_state_dims": \[[^]]*\]', "", lines))
    page = report.write_report(folder).read_text()
    assert "No trust rule" in page and "Accepted share by rollout step" not in page
    assert "Published results" not in page and "variance of each state dimension" not in page


def test_tasks_of_dm_control_are_known():
    from dm_control import suite

    assert all(is_dm_control(f"{domain}-{task}") for domain, task in suite.ALL_TASKS)
    assert not any(map(is_dm_control, ("Hopper-v4", "own:Cart-v0", "brax:ant", "Cart")))


@pytest.mark.parametrize(
    ("field", "value"),
    [("variants", [1]), ("variants", 3), ("task", {}), ("model", [1]), ("env", 3), ("steps", "x")],
)
def test_config_with_a_field_of_another_type_is_refused_in_one_line(tmp_path, field, value):
    folder = fake_run(tmp_path / "run", steps=1000)
    info = json.loads((folder / "config.json").read_text())
    info["config"][field] = value
    (folder / "config.json").write_text(json.dumps(info))
    with pytest.raises(UsageError, match=r"config\.json: not a run configuration$"):
        report.write_report(folder)
