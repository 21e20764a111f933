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
TASKS = ("humanoid-stand", "quadruped-run")


@pytest.fixture
def pilot(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    with loaded(SCRIPT) as module:
        yield module


def fill(folder, levels):
    """Write runs whose returns have the given factors by arm."""
    for task in TASKS:
        for arm, level in levels.items():
            algo = "model-free" if arm == "model-free" else "mbpo"
            out = folder / f"{task}-x-seed-2000-{arm}"
            fake_run(out, env=task, algo=algo, level=level, variants=("none",), seeds=3, seed=2000)


def test_study_has_the_arms_of_the_pilot(pilot):
    runs = study.load(ROOT / "launch/studies/seven-pilot.toml").runs
    found = [pilot.arm(Path(run.name)) for run in runs]
    assert list(dict.fromkeys(found)) == list(pilot.ARMS)
    assert {run.config.env for run in runs} == set(TASKS)
    assert sorted({run.config.seed for run in runs}) == pilot.SEEDS
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
    assert [(row["arm"], row["learners"]) for row in rows] == [("tenth", "6"), ("half", "6")]


def test_tasks_at_the_floor_are_not_counted(pilot, tmp_path):
    fill(tmp_path, {"model-free": 0.001, "tenth": 0.002})
    with pytest.raises(UsageError, match="at the floor"):
        pilot.main([str(tmp_path)])


def test_task_that_one_arm_lifts_counts_for_all(pilot):
    levels = {"model-free": 5, "tenth": 6, "half": 200}
    found = [
        pilot.Learner(task, arm, seed, level if task == "humanoid-stand" else 100)
        for task in TASKS
        for arm, level in levels.items()
        for seed in pilot.SEEDS
    ]
    assert [list(x.effects) for x in pilot.compare(found)] == [list(TASKS)] * 2


def test_arms_with_missing_runs_are_not_selected(pilot):
    found = [
        pilot.Learner(task, arm, seed, 100)
        for task in TASKS
        for arm in ("model-free", "half")
        for seed in pilot.SEEDS
    ]
    better = [pilot.Learner(task, "tenth", seed, 900) for task in TASKS for seed in (2000, 2001)]
    arms = pilot.compare(found + better)
    assert [x.complete for x in arms] == [False, True]
    assert pilot.select(arms) == "half"
    # A third seed twice is not the third seed, and one task is not two.
    better += [pilot.Learner(task, "tenth", 2001, 900) for task in TASKS]
    assert not pilot.compare(found + better)[0].complete
    one = [x for x in found if x.task == TASKS[0]]
    assert not any(x.complete for x in pilot.compare(one))


def test_pilot_can_be_repeated_on_other_tasks(pilot):
    found = [
        pilot.Learner(task, arm, seed, level)
        for task in ("quadruped-walk", "hopper-stand")
        for arm, level in (("model-free", 100), ("tenth", 200))
        for seed in pilot.SEEDS
    ]
    assert pilot.select(pilot.compare(found)) == "tenth"


def test_folders_that_are_no_arm_are_refused(pilot, tmp_path):
    fill(tmp_path, {"other": 1.0})
    with pytest.raises(UsageError, match="ends with no arm"):
        pilot.main([str(tmp_path)])
