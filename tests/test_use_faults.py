"""Faults that were found by use; each test fails without the repair."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dynajax
from dynajax.diagnose import data
from dynajax.envs import spec
from dynajax.runs import lock
from dynajax.runs.directory import write_atomically
from dynajax.types import UsageError

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, str(ROOT / "experiments" / "run.py")]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_file_system_without_locks_gives_a_warning(monkeypatch, tmp_path, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with open(tmp_path / "lock", "a") as file, pytest.warns(UserWarning, match="has no locks"):
        assert lock.try_lock(file)


def test_lock_of_another_process_is_respected(monkeypatch, tmp_path):
    with open(tmp_path / "lock", "a") as first, open(tmp_path / "lock", "a") as second:
        assert lock.try_lock(first)
        assert not lock.try_lock(second)


def test_files_respect_the_umask(tmp_path):
    script = (
        "import os, pathlib; os.umask(0o077)\n"
        "from dynajax.runs.directory import write_atomically\n"
        f"write_atomically(pathlib.Path({str(tmp_path / 'file')!r}), b'')"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    write_atomically(tmp_path / "other", b"")
    before = os.umask(0)
    os.umask(before)
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o666 & ~before


def test_diagnosis_takes_large_seeds():
    recording = data.collect(spec("Pendulum-v1", time_limit=200, repeat=1), 30, 20240101)
    assert len(recording.episode) == 30


def test_closed_standard_output_is_no_error(tmp_path):
    command = " ".join([*RUN, "--fields", ">&-"])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_deleted_working_directory_gives_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && {' '.join(RUN)} --fields"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "working directory was deleted" in done.stderr


def test_unknown_flag_names_the_setting(tmp_path):
    done = subprocess.run([*RUN, "--learning_rate=3"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--set agent.learning_rate=VALUE" in done.stderr


def test_python_arguments_are_parsed_as_flags_are():
    config = dynajax.make_config(
        "Pendulum-v1",
        fixes="scale,target",
        steps="3000",
        seeds=2.0,
        seed=np.int64(3),
        settings=None,
        vary={"learn.discount": 0.9},
    )
    assert (config.steps, config.seeds, config.seed) == (3000, 2, 3)
    assert all(type(x) is int for x in (config.steps, config.seeds, config.seed))
    assert [v.name for v in config.variants] == ["scale,target;learn.discount=0.9"]


@pytest.mark.parametrize(("name", "value"), [("steps", "many"), ("seeds", 1.5), ("seed", None)])
def test_python_arguments_that_are_no_whole_numbers_give_one_line(name, value):
    with pytest.raises(UsageError, match=f"^--{name}={value}: it must be a whole number$"):
        dynajax.make_config("Pendulum-v1", **{name: value})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"fixes": [["scale", "target"]]}, "--fix=[['scale', 'target']]: it must be a string"),
        ({"fixes": 3}, "--fix=3: it must be a string"),
        ({"settings": ["learn.utd=10"]}, "--set ['learn.utd=10']: it must be a dictionary"),
        ({"settings": {3: 4}}, "--set {3: 4}: it must be a dictionary"),
        ({"vary": "learn.discount=0.9"}, "--vary 'learn.discount=0.9': it must be a dictionary"),
        (
            {"agent": dynajax.Agent},
            "--agent=<class 'dynajax.agents.base.Agent'>: it must be a name",
        ),
        ({"trust": 3}, "--trust=3: it must be a name"),
        ({"env": None}, "--env=None: it must be a name"),
        ({"steps": 1e18}, "--steps=1e+18: it must be at most 2147483647"),
    ],
)
def test_python_arguments_of_a_wrong_type_give_one_line(arguments, text):
    with pytest.raises(UsageError) as error:
        dynajax.make_config(**{"env": "Pendulum-v1"} | arguments)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


def test_none_stands_for_the_default():
    config = dynajax.make_config("Pendulum-v1", fixes=None, vary=None, settings=None)
    assert config == dynajax.make_config("Pendulum-v1")


def test_python_arguments_are_split_at_commas_as_flags_are():
    config = dynajax.make_config("Pendulum-v1", vary={"learn.discount": "0.9,0.95"})
    assert [v.name for v in config.variants] == [
        "none;learn.discount=0.9",
        "none;learn.discount=0.95",
    ]
    with pytest.raises(UsageError, match="--steps=True: it must be a whole number"):
        dynajax.make_config("Pendulum-v1", steps=True)
    with pytest.raises(UsageError, match="it takes a configuration from"):
        dynajax.train("Pendulum-v1")


@pytest.mark.parametrize("flags", [["--fields"], ["--help"]])
def test_output_on_a_full_device_gives_one_line(tmp_path, flags):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*RUN, *flags], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "No space left on device; free some space" in done.stderr


def test_unknown_flag_of_a_command_without_settings_has_no_hint_about_them(tmp_path):
    plot = [sys.executable, str(ROOT / "experiments" / "plot.py"), "--learning_rate=3"]
    done = subprocess.run(plot, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "--set" not in done.stderr and "--help" in done.stderr


def test_warning_of_a_command_is_one_line(tmp_path):
    lines = [
        "import warnings",
        "from dynajax.cli import common",
        "common.run(lambda arguments: warnings.warn('the file system' + chr(10) + 'has no locks'))",
    ]
    (tmp_path / "warn.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "warn.py"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "warning: the file system has no locks\n")
