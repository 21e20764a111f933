"""Write the report of a run from the command line."""

from pathlib import Path

import pytest

import scripts
from fake_runs import fake_run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch):
    """Return a function that runs experiments/report.py and returns its exit status."""
    with scripts.loaded(ROOT / "experiments/report.py") as module:
        yield lambda *arguments: scripts.run(module, monkeypatch, *map(str, arguments))


def test_report_of_several_runs(command, tmp_path, capsys):
    fake_run(tmp_path / "a", algo="model-free", seeds=1, steps=1000)
    fake_run(tmp_path / "b", variants=("none",), steps=2000)
    # The second run is still training.
    lines = (tmp_path / "b/eval.csv").read_text().splitlines(keepends=True)
    (tmp_path / "b/eval.csv").write_text("".join(lines[:4]))
    assert command(tmp_path / "a", tmp_path / "b") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Final return ") and printed[0].endswith(", 1 seed.")
    assert f"report: {tmp_path / 'a/report.html'}" in printed
    assert any(line.startswith("So far: Final return ") for line in printed)
    for name in "ab":
        assert (tmp_path / name / "report.html").read_text().startswith("<!doctype html>")
        assert (tmp_path / name / "curves.png").exists()


def test_report_of_a_wrong_folder_is_refused_in_one_line(command, tmp_path, capsys):
    run = fake_run(tmp_path / "runs/a", steps=1000)
    (run / "curves.png").mkdir()
    for arguments, message in (
        ((), "name at least one run's folder"),
        ((tmp_path / "missing",), "missing: there is no such folder"),
        ((run / "eval.csv",), "eval.csv: there is no such folder"),
        ((tmp_path / "runs",), "runs: not a run directory, it has no config.json"),
        ((run,), f"{run}: the report cannot be written"),
    ):
        assert command(*arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1
