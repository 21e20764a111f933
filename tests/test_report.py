"""Reading a run back, and telling it."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynajax import config, report
from dynajax.report import figures, statistics
from dynajax.report.run import last_channels
from dynajax.types import UsageError
from fake_runs import VARIANTS, fake_run

ROOT = Path(__file__).parents[1]


def test_reader_gives_variants_by_seeds_and_steps(tmp_path):
    run = report.read_run(fake_run(tmp_path / "run", steps=3000))
    assert list(run.evals) == list(VARIANTS)
    assert run.steps.tolist() == [1000, 2000, 3000] and run.seeds == (0, 1, 2)
    with open(tmp_path / "run/eval.csv") as file:
        wanted = [
            float(row["return_mean"])
            for row in csv.DictReader(file)
            if row["variant"] == "scale,target" and row["seed"] == "1"
        ]
    assert run.evals["scale,target"][1].tolist() == wanted
    steps, values = report.series(run, "fit", "r2_reward")["none"]
    assert steps.tolist() == [1000, 2000, 3000] and values.shape == (3, 3)


def test_a_torn_last_line_is_not_read(tmp_path):
    folder = fake_run(tmp_path / "run", steps=3000)
    for name in ("eval.csv", "metrics.jsonl"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-7])
    run = report.read_run(folder)
    # The last seed's line is torn, so that evaluation is not whole and does not count.
    assert run.steps.tolist() == [1000, 2000]
    assert len(run.metrics["time"]) == 2
    assert "<b>" in report.headline(run)[0]


def test_every_cut_of_the_files_can_be_read(tmp_path):
    folder = fake_run(tmp_path / "run", variants=("none", "scale"), steps=2000, seeds=2)
    whole = {name: (folder / name).read_bytes() for name in ("eval.csv", "metrics.jsonl")}
    for share in np.linspace(0, 1, 30):
        for name, data in whole.items():
            (folder / name).write_bytes(data[: int(share * len(data))])
        report.headline(report.read_run(folder))


def test_a_step_logged_twice_counts_once_and_null_is_nan(tmp_path):
    folder = fake_run(tmp_path / "run", algo="model-free", seeds=1, steps=2000)
    with open(folder / "eval.csv", "a") as file:
        file.write("none,0,2000,2000,77.0,0,0,77,77\n")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind":"learn","variant":"none","seed":0,"step":3000,"q_mean":null}\n')
    run = report.read_run(folder)
    assert run.evals["none"].shape == (1, 2) and run.evals["none"][0, -1] == 77.0
    assert report.series(run, "learn", "q_mean")["SAC"][0].tolist() == [1000, 2000]


@pytest.mark.parametrize("name", ["eval.csv", "metrics.jsonl", "config.json"])
def test_a_damaged_file_is_named_in_one_line(tmp_path, name):
    folder = fake_run(tmp_path / "run", steps=2000)
    lines = (folder / name).read_text().splitlines(keepends=True)
    lines[len(lines) // 2] = "none,zero,{\n"
    (folder / name).write_text("".join(lines))
    with pytest.raises(UsageError, match=re.escape(name)) as caught:
        report.read_run(folder)
    assert "\n" not in str(caught.value)


def test_report_is_whole_and_needs_nothing_else(tmp_path):
    variants = (*VARIANTS, "none;model.learning_rate=0.001")
    folder = fake_run(tmp_path / "run", variants=variants)
    page = report.write_report(folder).read_text()
    for text in (
        *variants,
        "preset quick",
        "cheetah-run",
        "10,000 environment steps",
        "3 seeds",
        "The model's story".replace("'", "&#x27;"),
        "abc1234",
        "learn.utd",
    ):
        assert text in page, text
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:|//|file:)""", page)
    assert not re.search(r"<(link|script|iframe)\b|@import|https?://", page)
    assert "<th>frames</th>" in page and "(10,000 frames)" in page
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob(".*")), "a temporary file was left"


def test_sac_report_leaves_the_model_out(tmp_path):
    page = report.write_report(fake_run(tmp_path / "run", algo="model-free", seeds=1)).read_text()
    assert "model&#x27;s story" not in page and "critic&#x27;s story" in page
    assert "One seed has no interval" in page


@pytest.mark.parametrize("keep", ["nothing", "header"])
def test_a_run_just_begun_has_a_report(tmp_path, keep):
    folder = fake_run(tmp_path / "run", steps=2000)
    (folder / "metrics.jsonl").unlink()
    header = (folder / "eval.csv").read_text().splitlines()[0] + "\n"
    (folder / "eval.csv").write_text(header if keep == "header" else "")
    assert "No evaluation has been written yet" in report.write_report(folder).read_text()


def test_headline_says_what_was_measured_and_no_cause(tmp_path):
    run = report.read_run(fake_run(tmp_path / "run"))
    sentences = report.headline(run)
    final = {v: x[:, -1] for v, x in run.evals.items()}
    assert sentences[0].startswith("<b>scale,target</b> has the highest of 4 mean final returns")
    lead = statistics.difference(final["scale"], final["scale,target"])
    assert f"The difference to scale is {statistics.text(lead)}." in sentences[0]
    [scale] = [x for x in sentences if x.startswith("<b>scale</b>")]
    gap = statistics.difference(final["none"], final["scale"])
    fits = report.reward_fit(run, "scale"), report.reward_fit(run, "none")
    assert statistics.text(gap) in scale and "{:.2f} against {:.2f}.".format(*fits) in scale
    for word in ("explanation", "because", "must have", "does not explain", "too small"):
        assert word not in " ".join(sentences)


def test_headline_of_a_run_with_values_that_are_not_finite(tmp_path):
    folder = fake_run(tmp_path / "run", variants=("none", "scale"), steps=1000)
    text = (folder / "eval.csv").read_text()
    (folder / "eval.csv").write_text(
        re.sub(r"^(none,.,1000,1000),[^,]*", r"\1,nan", text, flags=re.M)
    )
    sentences = report.headline(report.read_run(folder))
    assert sentences[0].startswith("<b>scale</b> has the highest of 2")
    assert "to none is not defined" in sentences[0]
    report.write_report(folder)


def test_styles_are_the_same_everywhere_and_differ():
    names = ["SAC", *VARIANTS, *(f"scale;model.learning_rate={i}" for i in range(9))]
    looks = figures.styles(names)
    assert len({tuple(look.values()) for look in looks.values()}) == len(names)
    assert figures.styles(["MBPO scale,target", "MBPO"]) == {
        "MBPO scale,target": looks["scale,target"],
        "MBPO": looks["none"],
    }
    agent = figures.styles(["simba", "MBPO simba", "MBPO simba scale", "MBPO scale"])
    assert agent["MBPO simba scale"] == looks["scale"]
    assert len({tuple(look.values()) for look in agent.values()}) == 4


def test_labels_name_the_agent_and_the_rule_of_trust(tmp_path):
    def labels(name, **arguments):
        run = report.read_run(fake_run(tmp_path / name, steps=1000, seeds=1, **arguments))
        return [report.label(run, v) for v in run.config["variants"]]

    variants = ("none", "scale", "none;model.learning_rate=0.001")
    assert labels("a", algo="model-free") == ["SAC"]
    assert labels("b", algo="model-free", agent="simba") == ["simba"]
    assert labels("c", algo="model-free", agent="module:toy", trust="m2ac") == ["module:toy"]
    rate = "model.learning_rate=0.001"
    assert labels("d", variants=variants) == ["MBPO", "MBPO scale", f"MBPO {rate}"]
    assert labels("e", variants=variants, agent="simba", trust="m2ac") == [
        "MBPO simba trust=m2ac",
        "MBPO simba scale trust=m2ac",
        f"MBPO simba {rate} trust=m2ac",
    ]
    page = report.write_report(tmp_path / "e").read_text()
    assert "cheetah-run: MBPO simba trust=m2ac, preset quick" in page
    assert ">simba</span>" in report.write_report(tmp_path / "b").read_text()


def test_an_old_folder_is_read_as_one_of_today(tmp_path):
    old = report.read_run(fake_run(tmp_path / "old", algo="model-free", old=True, steps=1000))
    new = report.read_run(fake_run(tmp_path / "new", algo="model-free", steps=1000))
    assert not config.difference(old.config, new.config)
    assert report.label(old, "none") == "SAC" and old.repeat == 1
    assert old.frames.tolist() == old.steps.tolist() == [1000]
    page = report.write_report(old.folder).read_text()
    assert "sac.utd" in page, "its configuration is shown as it was written"


def test_frames_are_drawn_where_a_step_has_several(tmp_path, monkeypatch):
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
    assert "3,000 environment steps (6,000 frames)" in page and "2 frames a step" in page
    assert "5.0 environment steps (10.0 frames) a second" in page
    main = drawn[0]
    assert main.xlabel == "frames" and main.lines["none"][0].tolist() == [2000, 4000, 6000]
    dotted = figures.Panel({}, "y", dotted=main.lines, mark=500.0).framed(2)
    assert dotted.dotted["none"][0].tolist() == [4000, 8000, 12000] and dotted.mark == 1000
    assert main.framed(1) is main
    drawn.clear()
    report.write_report(fake_run(tmp_path / "once", steps=3000))
    assert {panel.xlabel for panel in drawn if not panel.published} == {"environment steps"}


# What a shell, a notebook or a cluster may leave in the variable.
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
def test_figures_are_drawn_whatever_backend_is_set(tmp_path, backend):
    folder = fake_run(tmp_path / "run", variants=("none",), seeds=1, steps=1000)
    done = subprocess.run(
        [sys.executable, "-c", _DRAW, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "MPLBACKEND": backend},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{backend} False\n", "the variable is as it was"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_channels_what_a_rule_kept_the_critic_and_the_machine(tmp_path):
    folder = fake_run(tmp_path / "run", env="quadruped-walk", trust="m2ac", repeat=2, steps=2000)
    page = report.write_report(folder).read_text()
    for text in (
        "How much of each channel",
        "Rule of trust: <b>m2ac</b>",
        "How far are rollouts trusted?",
        "Penalty",
        "the critic expects",
        "Beside published results",
        "SimbaV2 results/baseline/simba_utd2.csv (SimBa)",
        "A processor, 2 cores; Linux",
        "0.10.2",
        "<pre>python experiments/run.py --env=quadruped-walk</pre>",
    ):
        assert text in page, text
    run = report.read_run(folder)
    skills = last_channels(run)
    assert skills["none"].shape == (3, 17) and np.isnan(skills["none"][:, 0]).all()
    # At the last step a share of all is learned.
    np.testing.assert_allclose(skills["scale"][:, 16], 0.8 * 16 / 17)
    old = report.write_report(fake_run(tmp_path / "old", env="Pendulum-v1", old=True))
    assert "How much of each channel" not in old.read_text(), "the channels' names are not known"


def test_a_page_without_channels_a_rule_or_published_curves(tmp_path):
    folder = fake_run(tmp_path / "run", env="Pendulum-v1", steps=2000)
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r', "r2_state_dims": \[[^]]*\]', "", lines))
    page = report.write_report(folder).read_text()
    assert "No rule of trust" in page and "How far are rollouts trusted?" not in page
    assert "Beside published" not in page and "How much of each channel" not in page
