"""`results/scripts/pilot.py`: the pilot of the study on seven tasks selects as registered."""

import csv
import dataclasses
from pathlib import Path

import pytest

from dynajax import UsageError
from dynajax.launch import study
from fake_runs import fake_run
from scripts import loaded

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "results/scripts/pilot.py"


@pytest.fixture
def pilot(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    with loaded(SCRIPT) as module:
        yield module


def fill(folder, levels):
    """Write runs whose returns have the given factors by arm."""
    for task in ("quadruped-run", "humanoid-stand"):
        for arm, level in levels.items():
            algo = "model-free" if arm == "model-free" else "mbpo"
            out = folder / f"{task}-x-seed-2000-{arm}"
            fake_run(out, env=task, algo=algo, level=level, variants=("none",), seeds=2, seed=2000)


def test_study_has_the_arms_of_the_pilot(pilot):
    runs = study.load(ROOT / "launch/studies/seven-pilot.toml").runs
    found = [pilot.arm(Path(run.name)) for run in runs]
    assert list(dict.fromkeys(found)) == list(pilot.ARMS)
    assert {run.config.env for run in runs} == set(pilot.TASKS)
    assert {run.config.seed for run in runs} == {2000, 2001, 2002}
    configs = {repr(dataclasses.replace(run.config, env="", seed=0)) for run in runs}
    assert len(configs) == len(pilot.ARMS)


@pytest.mark.parametrize(
    ("tenth", "half", "selected"),
    [(1.0, 1.02, "tenth"), (1.0, 2.0, "half"), (2.0, 1.0, "tenth")],
)
def test_simpler_of_two_close_arms_is_selected(pilot, tmp_path, capsys, tenth, half, selected):
    fill(tmp_path, {"model-free": 1.0, "tenth": tenth, "half": half})
    assert pilot.main([str(tmp_path)]) == 0
    assert f"selected: {selected}" in capsys.readouterr().out
    with (tmp_path / "pilot.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["learners"]) for row in rows] == [("tenth", "4"), ("half", "4")]


def test_tasks_at_the_floor_are_not_counted(pilot, tmp_path):
    fill(tmp_path, {"model-free": 0.001, "tenth": 0.002})
    with pytest.raises(UsageError, match="at the floor"):
        pilot.main([str(tmp_path)])


def test_task_that_one_arm_lifts_counts_for_all(pilot):
    levels = {"model-free": 5, "tenth": 6, "half": 200}
    found = [
        pilot.Learner(task, arm, level if task == "humanoid-stand" else 100)
        for task in pilot.TASKS
        for arm, level in levels.items()
        for _ in range(2)
    ]
    assert [list(x.effects) for x in pilot.compare(found)] == [list(pilot.TASKS)] * 2


def test_arms_with_missing_runs_are_not_selected(pilot):
    found = [
        pilot.Learner(task, arm, 100) for task in pilot.TASKS for arm in ("model-free", "half")
    ]
    found.append(pilot.Learner("quadruped-run", "tenth", 900))
    arms = pilot.compare(found)
    assert [x.complete for x in arms] == [False, True]
    assert pilot.select(arms) == "half"


def test_folders_that_are_no_arm_are_refused(pilot, tmp_path):
    fill(tmp_path, {"other": 1.0})
    with pytest.raises(UsageError, match="ends with no arm"):
        pilot.main([str(tmp_path)])
