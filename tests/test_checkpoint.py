"""Checkpoints come back bit for bit, from any moment at which the run was stopped."""

import errno
import functools
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynajax.config import Config
from dynajax.record import checkpoint
from dynajax.record.checkpoint import Checkpoints
from dynajax.runtime import placement
from dynajax.types import (
    Agent,
    Code,
    Model,
    Replay,
    Row,
    Shared,
    TrainState,
    Transition,
    UsageError,
)

S, N, D, A = 2, 8, 3, 2


def transitions(numbers: np.ndarray) -> Transition:
    """The transitions with these numbers, (S, n, ...); each number has contents of its own."""
    x = np.arange(1, S + 1)[:, None] * 1000 + numbers.astype(np.float32)
    wide = x[..., None] + np.linspace(0, 0.5, D, dtype=np.float32)
    return Transition(wide, -wide[..., :A], x / 7, (numbers % 3 > 0) * np.ones_like(x), wide + 1)


def ring(count: int, capacity: int = N) -> Replay:
    """The real replay as it is when `count` transitions have been inserted."""
    numbers = np.arange(max(0, count - capacity), count)
    data = jax.tree.map(
        lambda x: np.zeros((S, capacity, *x.shape[2:]), np.float32), transitions(numbers)
    )
    valid = np.zeros((S, capacity), bool)
    for whole, new in zip((*data, valid), (*transitions(numbers), numbers % 5 != 2), strict=True):
        whole[:, numbers % capacity] = new
    return Replay(Transition(*map(jnp.asarray, data)), jnp.asarray(valid))


@functools.cache
def make_state(count: int, seed: int = 0, capacity: int = N, width: int = 4) -> TrainState:
    """A state with every kind of leaf that training has."""
    random = np.random.default_rng(seed + count)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal((S, *shape)), jnp.float32)

    params = {"Dense_0": {"kernel": normal(D, width), "bias": normal(width)}}
    optimiser = jax.vmap(optax.adam(1e-3).init)(params)
    agent = Agent(params, params, params, normal(), optimiser, optimiser, optimiser)
    elites = jnp.asarray(random.integers(0, 5, (S, 2)), jnp.int32)
    code = Code(normal(D), normal(D + 1), normal(D + 1), normal())
    model = Model(params, optimiser, code, normal(5), normal(5), elites, elites[:, 0])
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(S) + seed + count)
    config = jax.tree.map(lambda x: jnp.full(S, x, jnp.float32), Config())
    synthetic = Replay(Transition(*(normal(6, 1) for _ in range(5))), normal(6) > 0)
    row = Row(config, jnp.arange(S), keys, keys + 1, agent, ring(count, capacity), model, synthetic)
    return TrainState(Shared(jnp.asarray(count, jnp.int32), jnp.asarray(3, jnp.int32)), row)


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def save(checkpoints: Checkpoints, *counts: int) -> None:
    for count in counts:
        checkpoints.save(count * 10, make_state(count), {}, {"count": count})


def pieces(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "replay").iterdir())


def newest(folder: Path) -> Path:
    return sorted(folder.glob("*-step-*"))[-1]


def data_file(folder: Path) -> Path:
    return folder / "arrays" / "bytes" / "0"


def restore(folder: Path, keep: int = 2) -> tuple[Checkpoints, checkpoint.Restored]:
    checkpoints = Checkpoints(folder, keep)
    restored = checkpoints.restore(make_state(0))
    assert restored is not None
    return checkpoints, restored


def test_round_trip_is_bit_for_bit(tmp_path):
    state = make_state(5)
    nan = state.rows.agent.log_temperature.at[0].set(jnp.nan).at[1].set(-0.0)
    state = state._replace(
        rows=state.rows._replace(agent=state.rows.agent._replace(log_temperature=nan))
    )
    host = {
        "actions": np.zeros((S, 0, A), np.float32),
        "episode": np.asarray(7, np.int64),
        ".odd/name": np.random.default_rng(0).random((2, 3)).T,
        "alive": np.asarray([True, False]),
    }
    meta = {"seeds": [1, 2**40], "offsets": {"a.jsonl": 12}, "x": 0.1, "nan": float("inf")}
    assert Checkpoints(tmp_path / "new").restore(state) is None
    assert Checkpoints(tmp_path / "new").latest_step() is None
    Checkpoints(tmp_path / "new").save(50, state, host, meta)
    assert Checkpoints(tmp_path / "new").latest_step() == 50
    restored = Checkpoints(tmp_path / "new").restore(jax.tree.map(jnp.zeros_like, state))
    assert (restored.step, restored.meta) == (50, meta)
    assert_same(restored.state, state)
    assert_same(restored.host, host)
    for array in restored.host.values():
        assert array.flags.writeable


def test_rows_without_a_model(tmp_path):
    state = make_state(5)
    state = state._replace(rows=state.rows._replace(model=None, synthetic=None))
    Checkpoints(tmp_path).save(1, state, {}, {})
    assert_same(Checkpoints(tmp_path).restore(state).state, state)


def test_restored_arrays_can_be_donated(tmp_path):
    state = make_state(3)
    Checkpoints(tmp_path).save(1, state, {}, {})
    restored = Checkpoints(tmp_path).restore(state)
    add = jax.jit(lambda s: jax.tree.map(lambda x: (x + 1).astype(x.dtype), s), donate_argnums=0)
    assert_same(add(restored.state), add(jax.tree.map(jnp.copy, state)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only on CPU is numpy's memory shared")
def test_restored_arrays_own_their_memory():
    room = np.zeros(4096, np.uint8)
    aligned = room[-room.ctypes.data % 64 :][:2048].view(np.float32)
    shared = jax.device_put(aligned)
    assert shared.unsafe_buffer_pointer() == aligned.ctypes.data
    assert placement.put(shared, shared).unsafe_buffer_pointer() != aligned.ctypes.data


def test_ring_wraps(tmp_path):
    for count in (0, 1, 5, 8, 11, 16, 17, 40, 43):
        checkpoints = Checkpoints(tmp_path, keep=1)
        checkpoints.restore(make_state(0))
        save(checkpoints, count)
        restored = checkpoints.restore(make_state(0))
        assert_same(restored.state, make_state(count))


def test_one_object_saves_many_times(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3, 6, 9, 12, 12, 30)
    assert_same(restore(tmp_path)[1].state, make_state(30))


def test_only_new_pieces_are_written_and_old_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 3)
    assert pieces(tmp_path) == ["000001-0-3"]
    first = data_file(tmp_path / "replay" / "000001-0-3")
    before = first.stat()
    save(checkpoints, 5)
    assert pieces(tmp_path) == ["000001-0-3", "000002-3-5"]
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    row = 4 * (2 * D + A + 2) + 1
    assert first.stat().st_size == S * 3 * row
    assert data_file(tmp_path / "replay" / "000002-3-5").stat().st_size == S * 2 * row
    # The checkpoint itself holds nothing of the ring: its size is not its capacity's.
    small = data_file(newest(tmp_path)).stat().st_size
    Checkpoints(tmp_path / "large").save(1, make_state(5, capacity=800), {}, {})
    assert data_file(newest(tmp_path / "large")).stat().st_size == small
    # At 11 the oldest slot is 3, but the checkpoint at 5 still needs the first piece.
    save(checkpoints, 11)
    assert pieces(tmp_path) == ["000001-0-3", "000002-3-5", "000003-5-11"]
    save(checkpoints, 14)
    assert pieces(tmp_path) == ["000002-3-5", "000003-5-11", "000004-11-14"]
    save(checkpoints, 40)
    assert pieces(tmp_path) == ["000003-5-11", "000004-11-14", "000005-32-40"]
    assert [p.name for p in sorted(tmp_path.glob("*-step-*"))] == [
        "000004-step-140",
        "000005-step-400",
    ]
    assert not (tmp_path / "partial").exists()


def truncate(folder: Path) -> None:
    path = data_file(folder)
    os.truncate(path, path.stat().st_size // 2)


def flip(folder: Path) -> None:
    path = data_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def remove(folder: Path) -> None:
    data_file(folder).unlink()


def spoil_json(folder: Path) -> None:
    path = folder / "meta.json"
    path.write_text(path.read_text()[:-40])


def change_json(folder: Path) -> None:
    path = folder / "meta.json"
    path.write_text(path.read_text().replace('"count": ', '"count": 1'))


def remove_json(folder: Path) -> None:
    (folder / "meta.json").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, remove, spoil_json, change_json, remove_json])
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
    # The run goes on, and the damaged one is gone.
    save(checkpoints, 12)
    assert not bad.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(restore(tmp_path)[1].state, make_state(12))


@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_damaged_piece_falls_back(tmp_path, damage):
    save(Checkpoints(tmp_path), 5, 11)
    damage(tmp_path / "replay" / "000002-5-11")
    with pytest.warns(UserWarning, match="000002-5-11"):
        _, restored = restore(tmp_path)
    assert_same(restored.state, make_state(5))


def test_all_damaged_is_one_clear_line(tmp_path):
    save(Checkpoints(tmp_path), 5, 11)
    for path in tmp_path.glob("*-step-*"):
        flip(path)
    with pytest.raises(UsageError) as caught:
        Checkpoints(tmp_path).restore(make_state(0))
    text = str(caught.value)
    assert str(tmp_path) in text and "--out" in text and "delete" in text and "\n" not in text
    assert len(list(tmp_path.glob("*-step-*"))) == 2, "a restore must delete nothing"


def test_abandoned_pieces_are_not_reused(tmp_path):
    """A run goes to 11, falls back to 5, and takes another way from there."""
    save(Checkpoints(tmp_path), 5, 11)
    flip(newest(tmp_path))
    with pytest.warns(UserWarning):
        checkpoints, _ = restore(tmp_path)
    other = make_state(11)
    real = jax.tree.map(lambda x: x.at[:, :3].set(jnp.zeros((), x.dtype)), other.rows.real)
    other = other._replace(rows=other.rows._replace(real=real))
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
    """Without a restore nothing that lies there is built upon, and the newest save counts."""
    save(Checkpoints(tmp_path), 5, 11)
    save(Checkpoints(tmp_path), 3)
    _, restored = restore(tmp_path)
    assert restored.step == 30
    assert_same(restored.state, make_state(3))


def test_leftovers_are_ignored_and_cleaned(tmp_path):
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


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_checkpoint as t
from dynajax.record import checkpoint

write, calls = checkpoint._write_bytes, 0

def killed(path, data):
    global calls
    calls += 1
    write(path, data[: len(data) // calls])
    if calls == 2:  # 1 is the piece's, 2 the checkpoint's
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints = checkpoint.Checkpoints(Path(sys.argv[2]))
t.save(checkpoints, 5)
checkpoint._write_bytes = killed
t.save(checkpoints, 11)
"""


def test_killed_in_the_middle_of_a_save(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert (process.returncode, process.stdout, process.stderr) == (-signal.SIGKILL, "", "")
    assert (tmp_path / "partial").exists()
    assert pieces(tmp_path) == ["000001-0-5", "000002-5-11"]
    checkpoints, restored = restore(tmp_path)
    assert_same(restored.state, make_state(5))
    save(checkpoints, 13)
    assert pieces(tmp_path) == ["000001-0-5", "000003-5-13"]
    assert not (tmp_path / "partial").exists()
    assert_same(restore(tmp_path)[1].state, make_state(13))


class Stopped(BaseException):
    """Stands for a kill: nothing after it runs."""


def test_stop_at_every_moment(tmp_path, monkeypatch):
    """From some call of the file system on none works, as if the process had been killed."""
    fatal, calls = 0, 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if fatal and calls >= fatal:
                raise Stopped
            return function(*args, **kwargs)

        return wrapper

    def attempt(folder: Path, at: int) -> None:
        nonlocal fatal, calls
        checkpoints = Checkpoints(folder)
        save(checkpoints, 5)
        fatal, calls = at, 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted(os.fsync))
            patch.setattr(Path, "rename", counted(Path.rename))
            patch.setattr(Path, "write_text", counted(Path.write_text))
            patch.setattr(checkpoint, "_write_bytes", counted(checkpoint._write_bytes))
            patch.setattr(checkpoint.shutil, "rmtree", counted(checkpoint.shutil.rmtree))
            save(checkpoints, 30)

    attempt(tmp_path / "whole", 0)
    steps = set()
    for at in {*range(1, calls, 3), calls}:
        folder = tmp_path / str(at)
        with pytest.raises(Stopped):
            attempt(folder, at)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, restored = restore(folder)
        steps.add(restored.step)
        assert_same(restored.state, make_state(restored.step // 10))
    assert steps == {50, 300}


def test_template_mismatch(tmp_path):
    save(Checkpoints(tmp_path), 5)
    for other in (
        make_state(0, width=6),
        make_state(0, capacity=9),
        make_state(0)._replace(shared=Shared(jnp.float32(0), jnp.int32(0))),
        make_state(0)._replace(rows=make_state(0).rows._replace(model=None)),
    ):
        with pytest.raises(UsageError, match="another configuration or version") as caught:
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
    write, calls = checkpoint._write_bytes, 0

    def full(path: Path, data: np.ndarray) -> None:
        nonlocal calls
        calls += 1
        write(path, data[: len(data) // 2])
        if calls == when:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_bytes", full)
        with pytest.raises(UsageError, match="No space left on device") as caught:
            save(checkpoints, 11)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert pieces(tmp_path) == ["000001-0-5"]
    assert not (tmp_path / "partial").exists()
    assert_same(restore(tmp_path)[1].state, make_state(5))
    save(checkpoints, 12)
    assert_same(restore(tmp_path)[1].state, make_state(12))


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot save a checkpoint"):
        save(Checkpoints(tmp_path / "file" / "checkpoints"), 5)


def test_quiet_and_without_threads(tmp_path, capfd, caplog):
    before = set(threading.enumerate())  # tqdm's monitor, if a test before this one has trained
    save(Checkpoints(tmp_path), 5, 11)
    restore(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    # Idle threads of a closed event loop take a moment to end.
    deadline = time.monotonic() + 5
    while not set(threading.enumerate()) <= before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before
