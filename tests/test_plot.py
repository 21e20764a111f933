"""Compare runs with experiments/plot.py."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynajax import report
from fake_runs import fake_run

ROOT = Path(__file__).parents[1]


def plot(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run experiments/plot.py in a separate process."""
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments/plot.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )


def test_plot_compares_runs_with_the_model_free_agent(tmp_path):
    for env, level in (("cheetah-run", 1.0), ("humanoid-walk", 0.5)):
        fake_run(tmp_path / f"{env}-mbpo", env=env, level=level)
        fake_run(tmp_path / f"{env}-sac", env=env, algo="model-free", level=level, steps=5000)
    done = plot(*sorted(tmp_path.iterdir()), f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out/table.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 10
    line = next(r for r in table if (r["task"], r["variant"]) == ("humanoid-walk", "MBPO + scale"))
    run = report.read_run(tmp_path / "humanoid-walk-mbpo")
    sac = report.read_run(tmp_path / "humanoid-walk-sac").evals["none"][:, 4].mean()
    expected = run.evals["scale"][:, 4].mean()  # the IQM of three seeds is their mean
    assert float(line["final_iqm"]) == pytest.approx(expected, abs=0.01)
    assert float(line["model_free_100"]) == pytest.approx(100 * expected / sac, abs=0.1)
    assert (line["steps"], line["frames"]) == ("5000", "5000")
    assert (line["preset"], line["seeds"]) == ("quick", "3")
    assert float(line["low"]) <= expected <= float(line["high"])
    assert (
        "compared at 5,000 agent steps" in done.stdout and "| MBPO + scale, target |" in done.stdout
    )
    for name in ("comparison.png", "headline.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "compared at 5,000 agent steps" in (tmp_path / "out/table.md").read_text()


def test_plot_joins_seeds_and_separates_settings(tmp_path):
    fake_run(tmp_path / "a", variants=("scale",), seeds=2)
    fake_run(tmp_path / "b", variants=("scale",), seeds=2, seed=2)
    fake_run(tmp_path / "c", variants=("scale",), settings={"utd": 1})
    fake_run(tmp_path / "d", variants=("scale",), preset="paper")
    done = plot(*(tmp_path / name for name in "abcd"), f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out/table.csv") as file:
        seeds = {row["variant"]: row["seeds"] for row in csv.DictReader(file)}
    assert seeds == {
        "MBPO + scale": "4",
        "MBPO + scale (learn.utd=1)": "3",
        "MBPO + scale (preset=paper)": "3",
    }
    assert "presets paper and quick" in done.stdout
    assert "there is no run of SAC (model-free)" in done.stdout


def test_plot_compares_each_agent_with_its_model_free_run_by_frames(tmp_path):
    fake_run(tmp_path / "a", algo="model-free", steps=4000)
    fake_run(tmp_path / "b", variants=("scale",), steps=4000)
    fake_run(tmp_path / "c", algo="model-free", agent="simba", repeat=2, level=2.0, steps=3000)
    fake_run(tmp_path / "d", variants=("scale",), agent="simba", repeat=2, level=3.0, steps=3000)
    done = plot(*(tmp_path / name for name in "abcd"), f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out/table.csv") as file:
        table = {row["variant"]: row for row in csv.DictReader(file)}
    assert list(table) == [
        "SAC (model-free)",
        "SimBa (model-free)",
        "MBPO + scale (SAC)",
        "MBPO + scale (SimBa)",
    ]
    assert {row["frames"] for row in table.values()} == {"4000"}
    assert [row["steps"] for row in table.values()] == ["4000", "2000", "4000", "2000"]
    for name, base in (
        ("MBPO + scale (SAC)", "SAC (model-free)"),
        ("MBPO + scale (SimBa)", "SimBa (model-free)"),
        ("SimBa (model-free)", "SimBa (model-free)"),
    ):
        share = 100 * float(table[name]["final_iqm"]) / float(table[base]["final_iqm"])
        assert float(table[name]["model_free_100"]) == pytest.approx(share, abs=0.1)
    assert "compared at 4,000 frames" in done.stdout and "model-free = 100" in done.stdout
    done = plot(*(tmp_path / name for name in "abd"), f"--out={tmp_path / 'out'}")
    assert "there is no run of SimBa (model-free)" in done.stdout


# One process tries all command lines, because starting Python takes most of the time.
_TRY_ALL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from absl import flags
from dynajax.cli import common, plot
for arguments in json.loads(sys.argv[2]):
    flags.FLAGS.unparse_flags()
    sys.argv = ["plot.py", *arguments]
    try:
        status = common.run(plot.main)
    except SystemExit as stop:
        status = stop.code
    print(status, file=sys.stderr)
"""


def test_plot_refuses_bad_input_with_one_line(tmp_path):
    (tmp_path / "other").mkdir()
    empty = fake_run(tmp_path / "empty", steps=2000)
    (empty / "eval.csv").unlink()
    cases = (
        ([], "name at least one run's folder"),
        ([tmp_path / "other"], "not a run directory"),
        ([empty], "no evaluation yet"),
        ([fake_run(tmp_path / "whole", steps=1000), f"--out={empty / 'config.json'}"], "--out="),
        (["--ouut=x", empty], "ouut"),
        ([tmp_path / "whole", "--format=svg"], "png, pdf, or both"),
        ([tmp_path / "whole", "--published=simbo"], "no curves of simbo; choose all, or from sac"),
    )
    tried = json.dumps([[str(a) for a in arguments] for arguments, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", _TRY_ALL, str(ROOT / "experiments"), tried],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    lines = done.stderr.splitlines()
    assert done.stdout == "" and len(lines) == 2 * len(cases), done.stderr
    for (_, text), message, status in zip(cases, lines[::2], lines[1::2], strict=True):
        assert message.startswith("error: ") and text in message and status == "2"


def test_plot_of_a_missing_folder_exits_with_status_2(tmp_path):
    done = plot(tmp_path / "missing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'missing'}: there is no such folder\n"


def test_plot_help_fits_a_screen():
    lines = plot("--help").stdout.splitlines()
    assert "--out" in "\n".join(lines) and len(lines) <= 30


def test_plot_writes_pdf_and_removes_figures_of_other_tasks(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "aggregate.png").touch()
    fake_run(tmp_path / "a", variants=("scale",), seeds=2)
    fake_run(tmp_path / "b", variants=("scale",), seeds=1, seed=2, steps=1000)
    done = plot(tmp_path / "b", tmp_path / "a", f"--out={out}", "--format=png,pdf")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {
        *("comparison.pdf", "comparison.png", "headline.pdf", "headline.png"),
        *("table.csv", "table.md"),
    }
    assert (out / "comparison.pdf").read_bytes().startswith(b"%PDF")
    with open(out / "table.csv") as file:
        assert [row["steps"] for row in csv.DictReader(file)] == ["10000"]  # of the longer run
    assert done.stderr.startswith("note: cheetah-run: MBPO + scale: seed 2 covers only 1,000 of")
    assert done.stderr.removeprefix("note: ").strip() in (out / "table.md").read_text()
    # Figures of another kind would show earlier runs.
    done = plot(tmp_path / "b", tmp_path / "a", f"--out={out}", "--format=pdf")
    assert not list(out.glob("*.png")) and len(list(out.glob("*.pdf"))) == 2
