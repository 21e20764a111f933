"""Studies: refused commands, the state of runs on other machines, lines, and current figures."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import scripts
from dynajax import make_config
from dynajax.launch import status
from dynajax.launch.study import StudyRun
from fake_runs import fake_run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sweep():
    """Return the module of the command sweep."""
    with scripts.loaded(ROOT / "launch/sweep.py") as module:
        yield module


@pytest.fixture
def planned(tmp_path):
    """Return a run of a study with 3,000 steps, which has not started."""
    (tmp_path / "launch").mkdir()
    config = make_config("cheetah-run", fixes=["none", "scale"], steps=3000, preset="paper")
    return StudyRun("run", config, ())


@pytest.mark.parametrize("ahead", [-5000.0, 0.0, 5000.0])
def test_state_does_not_depend_on_the_clocks_of_machines(planned, tmp_path, monkeypatch, ahead):
    """Write a note, and read it on a machine whose clock goes wrong by more than an hour."""
    status.write_note(tmp_path, planned.name, state="running")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + ahead)
    assert status.run_status(planned, tmp_path).state == "running"
    path = status.note_path(tmp_path, planned.name)
    os.utime(path, (now - 90, now - 90))
    assert status.run_status(planned, tmp_path).state == "stopped"
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_queued_run_is_not_started_unless_something_will_start_it(planned, tmp_path):
    """Kill a launcher before it starts a run, then write the note of a SLURM job."""

    def state() -> str:
        return status.run_status(planned, tmp_path).state

    status.write_note(tmp_path, planned.name, state="queued", on="here", attempts=0)
    with open(tmp_path / "launch" / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state() == "queued"
    assert state() == "missing"
    (tmp_path / "launch" / "lock").unlink()
    assert state() == "missing"
    (tmp_path / planned.name).mkdir()
    assert state() == "stopped"
    status.write_note(tmp_path, planned.name, on="slurm")
    assert state() == "stopped"  # it was not submitted
    status.write_note(tmp_path, planned.name, job="17")
    assert state() == "queued"


STUDY = 'tasks = ["Pendulum-v1"]\nsteps = 400\n'


def write(folder: Path, text: str = STUDY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--on=slurm --parallel=7", "--parallel=7: it has no effect with --on=slurm"),
        ("--on=ray --parallel=7", "--parallel=7: it has no effect with --on=ray"),
        ("--on=slurm --address=foo", "--address=foo: it has no effect without --on=ray"),
        ("--address=foo", "--address=foo: it has no effect without --on=ray"),
        ("--status --on=ray", "--on=ray: it has no effect with --status"),
        ("--status --parallel=2", "--parallel=2: it has no effect with --status"),
        ("--status --attempts=2", "--attempts=2: it has no effect with --status"),
        ("--status --address=foo", "--address=foo: it has no effect with --status"),
        (
            "--on=ray --address=foo",
            "--address=foo: Ray cannot connect (Invalid address format: foo)",
        ),
        ("--on=slurm", "--on=slurm: resources.gpus = 0.5: SLURM gives whole GPUs"),
    ],
)
def test_refused_command_writes_nothing(sweep, tmp_path, monkeypatch, capsys, flags, reason):
    def refuse(address, **_):
        raise ValueError(f"Invalid address format: {address}")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=refuse))
    # The import of submitit would close the stream of absl's log, which is that of pytest here.
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace())
    path = write(tmp_path, STUDY + "[resources]\ngpus = 0.5\n")
    monkeypatch.chdir(tmp_path)
    assert scripts.run(sweep, monkeypatch, str(path), *flags.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {reason}")
    assert list(tmp_path.iterdir()) == [path]


def test_copy_of_a_study_file_resumes_its_study(sweep, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        sweep, "_execute", lambda plan, path, names, out: started.append((plan.name, out))
    )
    monkeypatch.chdir(tmp_path)
    original, copy = write(tmp_path), write(tmp_path / "runs" / "first")
    (copy.parent / "launch").mkdir()
    (tmp_path / "launch").mkdir()  # as in a clone, where it is no folder of a study
    (copy.parent / "launch" / "lock").touch()
    for arguments in ([original.name], ["runs/first/study.toml"], [str(copy), "--out=other"]):
        scripts.run(sweep, monkeypatch, *arguments)
    monkeypatch.chdir(copy.parent)
    scripts.run(sweep, monkeypatch, "study.toml")
    assert started == [
        ("study", tmp_path / "runs" / "study"),
        ("first", copy.parent),
        ("first", tmp_path / "other"),
        ("first", copy.parent),
    ]


def test_state_in_a_folder_that_cannot_be_written(planned, tmp_path, monkeypatch):
    status.write_note(tmp_path, planned.name, state="running")

    def refuse(**_):
        raise PermissionError

    monkeypatch.setattr(status.tempfile, "TemporaryFile", refuse)
    assert status.run_status(planned, tmp_path).state == "running"


def test_relay_prints_starts_evaluations_and_ends(sweep, planned, tmp_path, capsys):
    relay = sweep.Relay(planned, tmp_path)
    relay.print_news()
    assert capsys.readouterr().out == ""
    status.write_note(tmp_path, planned.name, state="running", attempts=1)
    relay.print_news()
    assert capsys.readouterr().out == "run: running\n"

    folder = fake_run(tmp_path / "run", variants=("none", "scale"), steps=3000, seeds=2)
    whole = (folder / "eval.csv").read_text().splitlines(keepends=True)
    (folder / "eval.csv").write_text("".join(whole[:8]))  # the second evaluation is incomplete
    relay.print_news()
    relay.print_news()
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("run: step 1,000 of 3,000, return none: ") and " | scale: " in line

    (folder / "eval.csv").write_text("".join(whole))
    status.write_note(tmp_path, planned.name, state="running", attempts=2, message="started again")
    relay.print_news()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run: running, start 2 (started again)"
    assert [line.split(",  ")[0].split(", return")[0] for line in lines[1:]] == [
        "run: step 2,000 of 3,000",
        "run: step 3,000 of 3,000",
    ]
    status.write_note(tmp_path, planned.name, state="done", message="")
    relay.print_news()
    assert capsys.readouterr().out == "run: done, start 2\n"
    # A later launcher does not repeat what was printed before.
    again = sweep.Relay(planned, tmp_path)
    again.print_news()
    assert "step" not in capsys.readouterr().out


def test_figures_are_drawn_again_exactly_if_their_content_changes(sweep, tmp_path, monkeypatch):
    """Drop a task, add it again, and change an evaluation, without any change of times."""
    folders = [fake_run(tmp_path / name, env=name, steps=2000) for name in ("a-b", "c-d")]
    drawn = []

    def draw(command, **_):
        drawn.append([Path(x).name for x in command if "=" not in x and (tmp_path / x).is_dir()])
        (tmp_path / "table.md").write_text("table\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", draw)
    monkeypatch.setattr(sys, "argv", ["dynajax sweep"])
    for _ in range(2):
        assert sweep._compare(folders, tmp_path) == 0
    assert drawn == [["a-b", "c-d"]]
    future = time.time() + 1000
    os.utime(folders[0] / "eval.csv", (future, future))
    sweep._compare(folders, tmp_path)
    assert len(drawn) == 1, "only a time has changed"
    sweep._compare(folders[:1], tmp_path)
    assert drawn[1:] == [["a-b"]]
    sweep._compare(folders, tmp_path)
    before = (folders[1] / "eval.csv").stat()
    text = (folders[1] / "eval.csv").read_text()
    (folders[1] / "eval.csv").write_text(text.replace(",5.0,", ",6.0,"))
    os.utime(folders[1] / "eval.csv", ns=(before.st_atime_ns, before.st_mtime_ns))
    sweep._compare(folders, tmp_path)
    assert drawn[2:] == [["a-b", "c-d"]] * 2
