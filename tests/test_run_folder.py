"""A run folder that exists: nothing changes before it is certain that the run proceeds."""

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import dynajax
from dynajax import UsageError
from dynajax.runs import directory, loggers
from dynajax.train import run_folder
from sizes import NETWORKS, SMALL_OF_ANY


def make(steps=40, **settings):
    sizes = SMALL_OF_ANY | NETWORKS["sac"] | {"random_steps": 10, "eval.every": 20}
    return dynajax.make_config(
        "Pendulum-v1",
        agent="sac",
        algo="model-free",
        preset="paper",
        steps=steps,
        settings=sizes | {"eval.episodes": 1} | settings,
    )


def contents(folder: Path) -> dict:
    """Return the content and the time of change of each file."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    dynajax.train(make(), folder, quiet=True)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("steps", [20, 40])
def test_start_of_a_finished_run_changes_nothing(folder, steps):
    before = contents(folder)
    assert dynajax.train(make(steps), folder, quiet=True).finished
    assert contents(folder) == before


def test_refused_run_adds_no_lock(folder):
    (folder / "lock").unlink()
    with pytest.raises(UsageError, match=r"another configuration \(learn\.utd"):
        dynajax.train(make(**{"learn.utd": 3}), folder, quiet=True)
    assert not (folder / "lock").exists()


def test_run_that_is_extended_writes_its_configuration(folder):
    dynajax.train(make(60), folder, quiet=True)
    info = json.loads((folder / "config.json").read_text())
    assert info["config"]["steps"] == 60 and len(info["commands"]) == 2


def test_every_version_of_the_code_is_recorded(folder, monkeypatch):
    for steps, commit in ((60, "new"), (80, "newer")):
        monkeypatch.setattr(directory, "git_commit", lambda commit=commit: commit)
        dynajax.train(make(steps), folder, quiet=True)
    info = json.loads((folder / "config.json").read_text())
    assert info["git_commit"] == "newer"
    assert info["git_commits"][-2:] == directory.git_commits(info)[-2:] == ["new", "newer"]
    dynajax.write_report(folder)
    assert "new, newer" in (folder / "report.html").read_text()
    # Earlier versions recorded the last one only.
    assert (
        directory.git_commits({"git_commit": "old"}) == ["old"] and directory.git_commits({}) == []
    )


def test_commit_is_that_of_the_clone_that_tracks_the_file(tmp_path):
    tracked, installed = tmp_path / "tracked.py", tmp_path / ".venv" / "installed.py"
    installed.parent.mkdir()
    for file in (tracked, installed):
        file.touch()
    assert directory.git_commit(tracked) is None
    git = ["git", "-C", tmp_path, "-c", "user.name=A", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "tracked.py"], ["commit", "-q", "-m", "First"]):
        subprocess.run([*git, *command], check=True)
    assert len(directory.git_commit(tracked)) == 10
    assert directory.git_commit(installed) is None


def test_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(directory.os, "fsync", lambda number: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        directory.write_atomically(tmp_path / "file", b"new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]


def spoil(path: Path) -> None:
    """Change a digit of a file without changing its size."""
    path.write_bytes(path.read_bytes().replace(b"20", b"21", 1))


@pytest.mark.parametrize("steps", [40, 60])
@pytest.mark.parametrize("name", ["eval.csv", "metrics.jsonl"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil, "has other content than"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is shorter than"),
        (Path.unlink, "is shorter than"),
    ],
)
def test_changed_log_is_refused_and_nothing_changes(folder, steps, name, change, words):
    (folder / "metrics.jsonl").open("a").write('{"kind": "of a killed continuation"}\n')
    change(folder / name)
    before = contents(folder)
    with pytest.raises(UsageError, match=f"{name} {words} when the checkpoint") as caught:
        dynajax.train(make(steps), folder, quiet=True)
    assert "restore it" in str(caught.value) and "\n" not in str(caught.value)
    assert contents(folder) == before


CHANGES = {
    "carriage returns": lambda data: data.replace(b"\n", b"\r\n"),
    "some carriage returns": lambda data: data.replace(b"\n", b"\r\n", 2),
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"),
    "no last line end": lambda data: data[:-1],
}


@pytest.mark.parametrize("name", ["eval.csv", "metrics.jsonl"])
@pytest.mark.parametrize("change", CHANGES)
def test_log_with_other_line_ends_is_restored(finished, tmp_path, name, change):
    original = (finished / name).read_bytes()
    (tmp_path / name).write_bytes(CHANGES[change](original))
    offsets = {name: len(original), f"{name} crc32": loggers.zlib.crc32(original)}
    loggers.Files(tmp_path, make(), 40, offsets).close()
    assert (tmp_path / name).read_bytes() == original


def test_resumed_run_with_changed_line_ends_loses_no_evaluation(folder, tmp_path):
    path = folder / "eval.csv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    dynajax.train(make(60), folder, quiet=True)
    lines = list(csv.DictReader(path.open()))
    assert [line["step"] for line in lines] == ["20", "40", "60"]
    assert all(line["return_0"] for line in lines)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
        lambda path: path.rename(path.with_name("moved")),
        lambda path: path.with_name("new").write_bytes(path.read_bytes()),
    ],
)
def test_log_that_changes_during_the_run_is_noticed(finished, tmp_path, change):
    logs = loggers.Files(tmp_path, make(), 0, {})
    logs._json_line({"kind": "time"})
    path = tmp_path / "metrics.jsonl"
    change(path)
    if (new := path.with_name("new")).exists():
        new.replace(path)  # as `sed -i` does
    with pytest.raises(UsageError, match=r"metrics\.jsonl"):
        logs._json_line({"kind": "time"})
    logs.close()


def test_failed_start_of_a_logger_changes_no_file(folder, monkeypatch):
    def refuse(*_):
        raise UsageError("--wandb: cannot start a run")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", refuse)
    (folder / "metrics.jsonl").open("a").write('{"kind": "of a killed continuation"}\n')
    before = contents(folder)
    with pytest.raises(UsageError, match="--wandb"):
        dynajax.train(make(60), folder, quiet=True, wandb=True)
    assert contents(folder) == before


class Online:
    """A logger that starts a run of a service when it is made."""

    started, closed = 0, 0

    def __init__(self, *_):
        Online.started += 1

    def close(self):
        Online.closed += 1


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Online)
    monkeypatch.setattr(Online, "started", 0)
    monkeypatch.setattr(Online, "closed", 0)
    return Online


def test_changed_log_is_refused_before_another_logger_starts(folder, online):
    spoil(folder / "eval.csv")
    before = contents(folder)
    with pytest.raises(UsageError, match="has other content than"):
        dynajax.train(make(60), folder, quiet=True, wandb=True)
    assert contents(folder) == before and online.started == 0


def test_failed_start_of_a_logger_closes_the_others(folder, online, monkeypatch):
    monkeypatch.setattr(loggers.Files, "__init__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loggers.Loggers(folder, make(), 40, {}, ("wandb", "files"))
    assert online.started == online.closed == 1


def test_folder_of_a_process_killed_during_its_first_save_can_be_used(tmp_path):
    dynajax.train(make(20), tmp_path, quiet=True)
    (tmp_path / "eval.csv").write_text("")
    checkpoints = tmp_path / "checkpoints"
    (saved,) = checkpoints.glob("*-step-*")
    (checkpoints / "partial").mkdir()
    saved.rename(checkpoints / "partial" / saved.name)
    other = make(20, **{"learn.utd": 1})
    assert dynajax.train(other, tmp_path, quiet=True).finished


def test_log_of_a_new_run_is_empty_until_its_first_evaluation(tmp_path):
    logs = loggers.Files(tmp_path, make(), 0, {})
    assert (tmp_path / "eval.csv").read_bytes() == b""
    logs.close()
    # A process that was killed before it wrote config.json leaves such files.
    assert dynajax.train(make(20), tmp_path, quiet=True).finished


@pytest.mark.parametrize("home", [True, False])
def test_path_without_a_home_folder_is_refused_in_one_line(monkeypatch, home):
    user = "~no_such_user" if home else "~"
    if not home:  # as in a container with an unknown user id
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    with pytest.raises(UsageError) as out:
        run_folder(make(), f"{user}/run")
    assert str(out.value).startswith(f"--out={user}/run: {user} is no known home folder; ")
    with pytest.raises(UsageError, match=f"^{user}/run: {user} is no known home folder; "):
        dynajax.load_policy(f"{user}/run")
