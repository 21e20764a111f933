"""`results/scripts/collect.py`: finished runs are copied once."""

import json
from pathlib import Path

import pytest

from dynajax.report.run import read_run
from fake_runs import fake_run
from scripts import loaded

SCRIPT = Path(__file__).resolve().parents[1] / "results/scripts/collect.py"


@pytest.fixture
def collect(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    with loaded(SCRIPT) as module:
        yield module


def finished_run(folder: Path) -> Path:
    """Write a run directory as a run leaves it when it has ended."""
    fake_run(folder)
    (folder / "report.html").touch()
    return folder


def test_only_the_values_of_single_dimensions_are_left_out(collect):
    fits = [
        {"kind": "fit", "step": step, "r2_reward": None, "r2_state": 0.1 + 0.2} for step in range(3)
    ]
    lines = [json.dumps({**fit, "r2_state_dims": [0.5, 0.25]}) for fit in fits]
    assert list(map(json.loads, collect.without_dimensions(lines))) == fits


def test_damaged_run_does_not_stop_the_others(collect, tmp_path, capsys):
    for name in ("a", "b"):
        finished_run(tmp_path / "study" / name)
    (tmp_path / "study/a/config.json").write_text("{")
    assert collect.main([str(tmp_path / "study"), str(tmp_path / "results")]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("a: not copied (") and second == "b: copied"


def test_interrupted_copy_is_repeated(collect, tmp_path, capsys):
    finished_run(tmp_path / "study/run")
    (tmp_path / "results/run").mkdir(parents=True)
    assert collect.main([str(tmp_path / "study"), str(tmp_path / "results")]) == 0
    assert capsys.readouterr().out == "run: copied\n"
    assert (tmp_path / "results/run/config.json").exists()


def test_only_finished_runs_are_copied_and_only_once(collect, tmp_path, capsys):
    study, results = tmp_path / "study", tmp_path / "results"
    finished = finished_run(study / "finished")
    running = fake_run(study / "running")
    config = json.loads((finished / "config.json").read_text())
    config["command"] = f"python experiments/run.py --out={finished}"
    (finished / "config.json").write_text(json.dumps(config))
    lines = (running / "eval.csv").read_text().splitlines(keepends=True)
    (running / "eval.csv").write_text("".join(lines[:13]))

    assert collect.main([str(study), str(results)]) == 0
    assert capsys.readouterr().out == "finished: copied\nrunning: not finished\n"
    assert [path.name for path in results.iterdir()] == ["finished"]
    copy, original = read_run(results / "finished"), read_run(finished)
    copied = json.loads((results / "finished" / "config.json").read_text())
    assert copied["command"].endswith("--out=runs/study/finished")
    assert (copy.steps == original.steps).all()
    assert {k: len(v) for k, v in copy.metrics.items()} == {
        k: len(v) for k, v in original.metrics.items()
    }
    collect.main([str(study), str(results)])
    assert capsys.readouterr().out == "finished: there already\nrunning: not finished\n"
