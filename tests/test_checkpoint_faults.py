"""Checkpoints: damaged files, interrupted saves, and errors of the operating system."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import (
    S,
    assert_same,
    data_file,
    files,
    make_state,
    newest,
    pieces,
    restore,
    save,
)
from dynajax.runs import checkpoint, serialization
from dynajax.runs.checkpoint import Checkpoints
from dynajax.types import Shared, UsageError


def truncate_data(folder: Path) -> None:
    path = data_file(folder)
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(folder: Path) -> None:
    path = data_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def remove_data(folder: Path) -> None:
    data_file(folder).unlink()


def truncate_json(folder: Path) -> None:
    path = folder / "meta.json"
    path.write_text(path.read_text()[:-40])


def change_json(folder: Path) -> None:
    path = folder / "meta.json"
    path.write_text(path.read_text().replace('"count": ', '"count": 1'))


def remove_json(folder: Path) -> None:
    (folder / "meta.json").unlink()


@pytest.mark.parametrize(
    "damage", [truncate_data, flip_bit, remove_data, truncate_json, change_json, remove_json]
)
def test_damaged_newest_falls_back(tmp_path, damage):
    save(Checkpoints(tmp_path), 5, 11)
    bad = newest(tmp_path)
    damage(bad)
    with pytest.warns(UserWarning) as caught:
        checkpoints, restored = restore(tmp_path)
    (text,) = [str(w.message) for w in caught]
    assert str(bad) in text and "damaged" in text and "\n" not in text
    assert (restored.step, restored.meta) == (50, {"count": 5})
    assert_same(restored.state, make_state(5))
    # The next save deletes the damaged checkpoint.
    save(checkpoints, 12)
    assert not bad.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(restore(tmp_path)[1].state, make_state(12))


@pytest.mark.parametrize("damage", [truncate_data, flip_bit, remove_data])
def test_damaged_piece_falls_back(tmp_path, damage):
    save(Checkpoints(tmp_path), 5, 11)
    damage(tmp_path / "replay" / "000002-5-11")
    with pytest.warns(UserWarning, match="000002-5-11"):
        _, restored = restore(tmp_path)
    assert_same(restored.state, make_state(5))


def test_a_flipped_bit_in_any_file_is_detected(tmp_path, capfd):
    """The checkpoint is skipped with a warning and no other output."""
    save(Checkpoints(tmp_path), 5, 11)
    random = np.random.default_rng(0)
    for folder in (newest(tmp_path), tmp_path / "replay" / "000002-5-11"):
        for path in files(folder):
            intact = path.read_bytes()
            damaged = bytearray(intact)
            damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
            path.write_bytes(damaged)
            with pytest.warns(UserWarning, match="damaged"):
                assert restore(tmp_path)[1].step == 50
            path.write_bytes(intact)
    assert restore(tmp_path)[1].step == 110
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change",
    [lambda x: x + 1, lambda x: x.view(np.int32), lambda x: x.reshape(-1)],
    ids=["values", "dtype", "shape"],
)
def test_wrong_arrays_in_intact_files_are_detected(tmp_path, monkeypatch, change):
    """The checksums of the arrays detect what the checksums of the files cannot."""
    save(Checkpoints(tmp_path), 5)
    write, name = serialization._write_arrays, "learners/agent/actor/Dense_0/kernel"

    def write_wrong(folder: Path, arrays: dict[str, np.ndarray]) -> None:
        write(folder, arrays | ({name: change(arrays[name])} if name in arrays else {}))

    with monkeypatch.context() as patch:
        patch.setattr(serialization, "_write_arrays", write_wrong)
        save(Checkpoints(tmp_path), 11)
    with pytest.warns(UserWarning, match=f"{name} in .* fails its checksum"):
        assert restore(tmp_path)[1].step == 50


def test_another_format_is_refused(tmp_path):
    save(Checkpoints(tmp_path), 5)
    path = newest(tmp_path) / "meta.json"
    content = json.loads(path.read_text())["content"]
    content["format"] -= 1
    text = json.dumps(content)
    path.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "content": content}))
    with pytest.raises(UsageError, match=r"the checkpoint format is \d, but must be") as caught:
        restore(tmp_path)
    assert str(newest(tmp_path)) in str(caught.value) and "--out" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_processes_write_npz_files(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    state, host = make_state(5), {"empty": np.zeros((S, 0)), ".odd/name": np.arange(3)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(50, state, host, {})
    _, restored = restore(tmp_path)
    assert_same((restored.state, restored.host), (state, host))
    with np.load(newest(tmp_path) / "arrays.npz", allow_pickle=False) as arrays:
        assert_same(arrays["learners/agent/log_temperature"], state.learners.agent.log_temperature)
    save(checkpoints, 11)
    flip_bit(newest(tmp_path))
    with pytest.warns(UserWarning, match="damaged"):
        assert_same(restore(tmp_path)[1].state, state)


def test_all_checkpoints_damaged(tmp_path):
    save(Checkpoints(tmp_path), 5, 11)
    for path in tmp_path.glob("*-step-*"):
        flip_bit(path)
    with pytest.raises(UsageError) as caught:
        Checkpoints(tmp_path).restore(make_state(0))
    text = str(caught.value)
    assert str(tmp_path) in text and "--out" in text and "delete" in text and "\n" not in text
    assert len(list(tmp_path.glob("*-step-*"))) == 2, "restoring must not delete anything"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("reader", ["read_text", "read_bytes"])
def test_file_that_the_system_cannot_read_is_not_taken_for_damaged(
    tmp_path, monkeypatch, reader, number
):
    """Otherwise the run would go back to an older checkpoint, and delete the intact one."""
    save(Checkpoints(tmp_path), 5, 11)
    before, read = files(tmp_path), getattr(Path, reader)

    def failing(path, *arguments, **options):
        if newest(tmp_path) in path.parents:
            raise OSError(number, os.strerror(number))
        return read(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, reader, failing)
        with pytest.raises(UsageError, match=os.strerror(number)) as refused:
            restore(tmp_path)
    assert "\n" not in str(refused.value) and files(tmp_path) == before
    assert restore(tmp_path)[1].step == 110


def test_missing_devices_are_not_taken_for_damage(tmp_path, monkeypatch):
    save(Checkpoints(tmp_path), 5)

    def missing():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "local_devices", missing)
    with pytest.raises(UsageError, match="JAX finds no such device"):
        serialization.read(newest(tmp_path), serialization.read_meta(newest(tmp_path)))


def test_abandoned_pieces_are_not_reused(tmp_path):
    """A run reaches 11 transitions, falls back to 5, and continues differently."""
    save(Checkpoints(tmp_path), 5, 11)
    flip_bit(newest(tmp_path))
    with pytest.warns(UserWarning):
        checkpoints, _ = restore(tmp_path)
    other = make_state(11)
    real = jax.tree.map(
        lambda x: x.at[:, :3].set(jnp.zeros((), x.dtype)), other.learners.real_buffer
    )
    other = other._replace(learners=other.learners._replace(real_buffer=real))
    checkpoints.save(110, other, {}, {})
    assert pieces(tmp_path) == ["000001-0-5", "000003-5-11"]
    assert_same(restore(tmp_path)[1].state, other)


def test_state_older_than_the_pieces_rewrites_them(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5, 11, 7)
    _, restored = restore(tmp_path)
    assert restored.step == 70
    assert_same(restored.state, make_state(7))


def test_new_run_in_an_old_folder(tmp_path):
    """Without a restore, old pieces are not reused, and the newest save is restored."""
    save(Checkpoints(tmp_path), 5, 11)
    save(Checkpoints(tmp_path), 3)
    _, restored = restore(tmp_path)
    assert restored.step == 30
    assert_same(restored.state, make_state(3))


def test_leftover_files_are_ignored_and_deleted(tmp_path):
    save(Checkpoints(tmp_path), 5)
    orphan = tmp_path / "replay" / "000002-5-11"
    for leftover in (tmp_path / "partial" / "arrays.orbax-checkpoint-tmp", orphan):
        leftover.mkdir(parents=True)
        (leftover / "0").write_bytes(b"x")
    checkpoints, restored = restore(tmp_path)
    assert_same(restored.state, make_state(5))
    save(checkpoints, 11)
    assert pieces(tmp_path) == ["000001-0-5", "000003-5-11"]
    assert not (tmp_path / "partial").exists()
    assert_same(restore(tmp_path)[1].state, make_state(11))


def run_script(script: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a script in a new process, with the folder of the tests and `folder` as arguments."""
    return subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import checkpoints as helpers
from dynajax.runs import checkpoint, serialization

write, calls = serialization._write_arrays, 0

def write_and_die(path, arrays):
    global calls
    calls += 1
    write(path, dict(list(arrays.items())[: len(arrays) // calls]))
    if calls == 2:  # the first call writes the piece, the second one the checkpoint
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints = checkpoint.Checkpoints(Path(sys.argv[2]))
helpers.save(checkpoints, 5)
serialization._write_arrays = write_and_die
helpers.save(checkpoints, 11)
"""


def test_kill_during_a_save(tmp_path):
    process = run_script(KILLED, tmp_path)
    assert (process.returncode, process.stdout, process.stderr) == (-signal.SIGKILL, "", "")
    assert (tmp_path / "partial").exists()
    assert pieces(tmp_path) == ["000001-0-5", "000002-5-11"]
    checkpoints, restored = restore(tmp_path)
    assert_same(restored.state, make_state(5))
    save(checkpoints, 13)
    assert pieces(tmp_path) == ["000001-0-5", "000003-5-13"]
    assert not (tmp_path / "partial").exists()
    assert_same(restore(tmp_path)[1].state, make_state(13))


class Killed(BaseException):
    """Simulates a kill."""


def test_kill_at_every_file_operation(tmp_path, monkeypatch):
    """All file operations fail from a certain one on, as if the process had been killed."""
    # OCDBT writes a varying number of files. An operation is therefore identified by the number of
    # renames before it and the number of operations since the last one.
    fatal, moment, reached = (99, 0), (0, 0), []

    def counted(function, renames=False):
        def wrapper(*args, **kwargs):
            nonlocal moment
            moment = (moment[0], moment[1] + 1)
            reached.append(moment)
            if moment >= fatal:
                raise Killed
            result = function(*args, **kwargs)
            moment = (moment[0] + 1, 0) if renames else moment
            return result

        return wrapper

    def save_until(folder: Path, at: tuple[int, int]) -> None:
        nonlocal fatal, moment
        checkpoints = Checkpoints(folder)
        save(checkpoints, 5)
        fatal, moment = at, (0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted(os.fsync))
            patch.setattr(Path, "rename", counted(Path.rename, renames=True))
            patch.setattr(Path, "write_text", counted(Path.write_text))
            patch.setattr(serialization, "_write_arrays", counted(serialization._write_arrays))
            patch.setattr(checkpoint.shutil, "rmtree", counted(checkpoint.shutil.rmtree))
            save(checkpoints, 30)

    save_until(tmp_path / "complete", fatal)
    steps = set()
    for at in sorted({*reached[::5], *(m for m in reached if m[0] == reached[-1][0])}):
        folder = tmp_path / "{}-{}".format(*at)
        with pytest.raises(Killed):
            save_until(folder, at)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, restored = restore(folder)
        steps.add(restored.step)
        assert_same(restored.state, make_state(restored.step // 10))
    assert steps == {50, 300}


def test_checkpoint_with_another_structure_is_refused(tmp_path):
    save(Checkpoints(tmp_path), 5)
    for other in (
        make_state(0, width=6),
        make_state(0, capacity=9),
        make_state(0)._replace(shared=Shared(jnp.float32(0), jnp.int32(0))),
        make_state(0)._replace(learners=make_state(0).learners._replace(model=None)),
    ):
        with pytest.raises(UsageError, match="the structure of the checkpoint differs") as caught:
            Checkpoints(tmp_path).restore(other)
        assert "\n" not in str(caught.value)
    assert_same(restore(tmp_path)[1].state, make_state(5))


ORBAX_FULL = ValueError(
    "RESOURCE_EXHAUSTED: Error writing local file: No space left on device [os_error_code='28']"
)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ORBAX_FULL])
@pytest.mark.parametrize("when", [1, 2])
def test_full_disk(tmp_path, monkeypatch, error, when):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 5)
    write, calls = serialization._write_arrays, 0

    def write_to_full_disk(path: Path, arrays: dict[str, np.ndarray]) -> None:
        nonlocal calls
        calls += 1
        write(path, dict(list(arrays.items())[: len(arrays) // 2]))
        if calls == when:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(serialization, "_write_arrays", write_to_full_disk)
        with pytest.raises(UsageError, match="No space left on device") as caught:
            save(checkpoints, 11)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert pieces(tmp_path) == ["000001-0-5"]
    assert not (tmp_path / "partial").exists()
    assert_same(restore(tmp_path)[1].state, make_state(5))
    save(checkpoints, 12)
    assert_same(restore(tmp_path)[1].state, make_state(12))


FILE_SIZE_LIMIT = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import checkpoints as helpers
from dynajax.runs import checkpoint, serialization

def save(count):
    try:
        helpers.save(checkpoints, count)
    except checkpoint.UsageError as error:
        print(error)

checkpoints = checkpoint.Checkpoints(Path(sys.argv[2]))
save(5)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
save(11)
print("without reservation", file=sys.stderr, flush=True)
serialization.os.posix_fallocate = lambda *arguments: None
save(12)
"""


def test_file_size_limit(tmp_path):
    """Exceed a limit of the operating system, with and without the reservation of disk space.

    Without it the error is the same, but Orbax may print tracebacks.
    """
    process = run_script(FILE_SIZE_LIMIT, tmp_path)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "cannot save a checkpoint (File too large)" in line and str(tmp_path) in line
    assert process.stderr.startswith("without reservation\n")
    assert_same(restore(tmp_path)[1].state, make_state(5))
    assert pieces(tmp_path) == ["000001-0-5"]
    assert not (tmp_path / "partial").exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot save a checkpoint"):
        save(Checkpoints(tmp_path / "file" / "checkpoints"), 5)


@pytest.mark.parametrize("damage", [None, truncate_data, flip_bit, remove_data])
def test_no_output_and_no_remaining_threads(tmp_path, capfd, caplog, damage):
    before = set(threading.enumerate())  # such as tqdm's monitor, if an earlier test has trained
    save(Checkpoints(tmp_path), 5, 11)
    if damage:
        damage(newest(tmp_path))
        with pytest.warns(UserWarning):
            restore(tmp_path)
        time.sleep(0.1)  # pending requests would print now
    else:
        restore(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    # The idle threads of a closed event loop take a moment to end.
    deadline = time.monotonic() + 5
    while not set(threading.enumerate()) <= before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before
