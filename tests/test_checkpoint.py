"""Checkpoints come back bit for bit, from any moment at which the run was stopped."""

import errno
import functools
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

from dynajax import replay
from dynajax.agents.sac import SACState
from dynajax.config import Config
from dynajax.record import checkpoint, tree
from dynajax.record.checkpoint import Checkpoints
from dynajax.runtime import placement
from dynajax.types import (
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
    return replay.pack(Transition(*map(jnp.asarray, data)), jnp.asarray(valid))


@functools.cache
def make_state(count: int, seed: int = 0, capacity: int = N, width: int = 4) -> TrainState:
    """A state with every kind of leaf that training has."""
    random = np.random.default_rng(seed + count)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal((S, *shape)), jnp.float32)

    params = {"Dense_0": {"kernel": normal(D, width), "bias": normal(width)}}
    optimiser = jax.vmap(optax.adam(1e-3).init)(params)
    agent = SACState(params, params, params, normal(), optimiser, optimiser, optimiser)
    elites = jnp.asarray(random.integers(0, 5, (S, 2)), jnp.int32)
    code = Code(normal(D), normal(D + 1), normal(D + 1), normal())
    model = Model(
        params,
        optimiser,
        code,
        normal(5),
        normal(5),
        normal(D + 1),
        normal(D + 1) > 0,
        elites,
        elites[:, 0],
    )
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(S) + seed + count)
    config = jax.tree.map(lambda x: jnp.full(S, x, jnp.float32), Config())
    imagined = Transition(normal(6, 1), normal(6, 1), normal(6), normal(6), normal(6, 1))
    synthetic = replay.pack(imagined, normal(6) > 0, normal(6))
    real, trust = ring(count, capacity), (normal(), {"threshold": normal(D)})
    row = Row(config, jnp.arange(S), keys, keys + 1, agent, real, model, synthetic, trust)
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


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def data_file(folder: Path) -> Path:
    """The file of the arrays' numbers, all others being descriptions."""
    return max(files(folder), key=lambda p: p.stat().st_size * (p.name != "meta.json"))


def opened(folder: Path) -> Any:
    """What Orbax alone makes of a checkpoint or a piece."""
    return orbax.checkpoint.PyTreeCheckpointer().restore(folder)


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


class Beliefs(NamedTuple):
    """What another algorithm might keep in a row."""

    weights: Any
    unused: Any
    count: Any


def test_any_tree_in_a_row(tmp_path):
    state = make_state(5)
    heads = [jnp.ones((S, 2)), (jnp.zeros((S, 3), jnp.int8), None)]
    agent = Beliefs({"a.b": heads}, None, jnp.arange(S) > 0)
    state = state._replace(rows=state.rows._replace(agent=agent, synthetic=None))
    Checkpoints(tmp_path).save(1, state, {}, {})
    assert_same(Checkpoints(tmp_path).restore(jax.tree.map(jnp.zeros_like, state)).state, state)
    other = state._replace(rows=state.rows._replace(agent=agent._replace(unused=jnp.ones(S))))
    with pytest.raises(UsageError, match="rows/agent/unused is missing there and float32"):
        Checkpoints(tmp_path).restore(other)


def test_orbax_alone_opens_it(tmp_path):
    """As a user would who has no dynajax, in a process that cannot import it."""
    state = make_state(5)
    Checkpoints(tmp_path).save(50, state, {"pending.obs": np.arange(3.0)}, {})
    program = f"""
import sys; sys.modules["dynajax"] = None
import numpy as np
import orbax.checkpoint as ocp
tree = ocp.PyTreeCheckpointer().restore("{newest(tmp_path)}")
actor, critic = tree["rows"]["agent"]["actor"], tree["rows"]["agent"]["critic"]
model = tree["rows"]["model"]
np.savez("{tmp_path}/copy", actor["Dense_0"]["kernel"], critic["Dense_0"]["bias"],
         model["params"]["Dense_0"]["kernel"], model["code"]["skip"], tree["shared"]["step"],
         tree["rows"]["config"]["learn"]["discount"], tree["rows"]["synthetic"]["packed"],
         tree["rows"]["agent"]["actor_optimiser"]["0"]["mu"]["Dense_0"]["bias"], tree["rows"]["key"],
         tree["host"]["pending.obs"])
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    rows = state.rows
    want = [
        rows.agent.actor["Dense_0"]["kernel"],
        rows.agent.critic["Dense_0"]["bias"],
        rows.model.params["Dense_0"]["kernel"],
        rows.model.code.skip,
        state.shared.step,
        rows.config.learn.discount,
        rows.synthetic.packed,
        rows.agent.actor_optimiser[0].mu["Dense_0"]["bias"],
        rows.key,
        np.arange(3.0),
    ]
    with np.load(tmp_path / "copy.npz", allow_pickle=False) as copy:
        assert_same(list(copy.values()), want)


def test_files_do_not_grow_with_the_leaves(tmp_path):
    save(Checkpoints(tmp_path), 5)
    assert len(jax.tree.leaves(make_state(5))) > 50
    assert len(files(newest(tmp_path))) < 40
    for path in tmp_path.rglob("*"):
        assert path.suffix not in {".pkl", ".pickle"}
        assert not path.is_file() or b"cnumpy" not in path.read_bytes()


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
    for name, slots in (("000001-0-3", slice(0, 3)), ("000002-3-5", slice(3, 5))):
        real = opened(tmp_path / "replay" / name)["rows"]["real"]
        want = jax.tree.map(lambda x, slots=slots: x[:, slots], ring(5))
        assert_same(Replay(real["packed"], real["valid"], None, D, A), want)
    # The checkpoint itself holds nothing of the ring: its size is not its capacity's.
    assert "real" not in opened(newest(tmp_path))["rows"]
    Checkpoints(tmp_path / "large").save(1, make_state(5, capacity=800), {}, {})
    small, large = (
        jax.tree.map(np.shape, opened(newest(folder))) for folder in (tmp_path, tmp_path / "large")
    )
    assert small == large
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


def test_no_flipped_bit_is_believed(tmp_path, capfd):
    """Whichever file it is in, the checkpoint is passed over, and quietly but for the warning."""
    save(Checkpoints(tmp_path), 5, 11)
    random = np.random.default_rng(0)
    for folder in (newest(tmp_path), tmp_path / "replay" / "000002-5-11"):
        for path in files(folder):
            whole = path.read_bytes()
            spoilt = bytearray(whole)
            spoilt[random.integers(len(spoilt))] ^= 1 << random.integers(8)
            path.write_bytes(spoilt)
            with pytest.warns(UserWarning, match="damaged"):
                assert restore(tmp_path)[1].step == 50
            path.write_bytes(whole)
    assert restore(tmp_path)[1].step == 110
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change",
    [lambda x: x + 1, lambda x: x.view(np.int32), lambda x: x.reshape(-1)],
    ids=["numbers", "dtype", "shape"],
)
def test_a_leaf_is_checked_beyond_its_file(tmp_path, monkeypatch, change):
    """Something else than was saved, in files that are as they were written."""
    save(Checkpoints(tmp_path), 5)
    write, name = tree._write_arrays, "rows/agent/actor/Dense_0/kernel"

    def wrong(folder: Path, arrays: dict[str, np.ndarray]) -> None:
        write(folder, arrays | ({name: change(arrays[name])} if name in arrays else {}))

    with monkeypatch.context() as patch:
        patch.setattr(tree, "_write_arrays", wrong)
        save(Checkpoints(tmp_path), 11)
    with pytest.warns(UserWarning, match=f"{name} in .* fails its checksum"):
        assert restore(tmp_path)[1].step == 50


def test_another_format_is_one_clear_line(tmp_path):
    save(Checkpoints(tmp_path), 5)
    path = newest(tmp_path) / "meta.json"
    content = json.loads(path.read_text())["content"]
    del content["format"]  # version 0.1.0 had none
    text = json.dumps(content)
    path.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "content": content}))
    with pytest.raises(UsageError, match="another version of dynajax") as caught:
        restore(tmp_path)
    assert str(newest(tmp_path)) in str(caught.value) and "--out" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_processes_write_plain_files(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    state, host = make_state(5), {"empty": np.zeros((S, 0)), ".odd/name": np.arange(3)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(50, state, host, {})
    _, restored = restore(tmp_path)
    assert_same((restored.state, restored.host), (state, host))
    with np.load(newest(tmp_path) / "arrays.npz", allow_pickle=False) as arrays:
        assert_same(arrays["rows/agent/log_temperature"], state.rows.agent.log_temperature)
    save(checkpoints, 11)
    flip(newest(tmp_path))
    with pytest.warns(UserWarning, match="damaged"):
        assert_same(restore(tmp_path)[1].state, state)


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
from dynajax.record import checkpoint, tree

write, calls = tree._write_arrays, 0

def killed(path, arrays):
    global calls
    calls += 1
    write(path, dict(list(arrays.items())[: len(arrays) // calls]))
    if calls == 2:  # 1 is the piece's, 2 the checkpoint's
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints = checkpoint.Checkpoints(Path(sys.argv[2]))
t.save(checkpoints, 5)
tree._write_arrays = killed
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
    # How many files OCDBT writes is not always the same, so moments are counted from a rename on.
    fatal, moment, reached = (99, 0), (0, 0), []

    def counted(function, renames=False):
        def wrapper(*args, **kwargs):
            nonlocal moment
            moment = (moment[0], moment[1] + 1)
            reached.append(moment)
            if moment >= fatal:
                raise Stopped
            result = function(*args, **kwargs)
            moment = (moment[0] + 1, 0) if renames else moment
            return result

        return wrapper

    def attempt(folder: Path, at: tuple[int, int]) -> None:
        nonlocal fatal, moment
        checkpoints = Checkpoints(folder)
        save(checkpoints, 5)
        fatal, moment = at, (0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted(os.fsync))
            patch.setattr(Path, "rename", counted(Path.rename, renames=True))
            patch.setattr(Path, "write_text", counted(Path.write_text))
            patch.setattr(tree, "_write_arrays", counted(tree._write_arrays))
            patch.setattr(checkpoint.shutil, "rmtree", counted(checkpoint.shutil.rmtree))
            save(checkpoints, 30)

    attempt(tmp_path / "whole", fatal)
    steps = set()
    for at in sorted({*reached[::5], *(m for m in reached if m[0] == reached[-1][0])}):
        folder = tmp_path / "{}-{}".format(*at)
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
    write, calls = tree._write_arrays, 0

    def full(path: Path, arrays: dict[str, np.ndarray]) -> None:
        nonlocal calls
        calls += 1
        write(path, dict(list(arrays.items())[: len(arrays) // 2]))
        if calls == when:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(tree, "_write_arrays", full)
        with pytest.raises(UsageError, match="No space left on device") as caught:
            save(checkpoints, 11)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert pieces(tmp_path) == ["000001-0-5"]
    assert not (tmp_path / "partial").exists()
    assert_same(restore(tmp_path)[1].state, make_state(5))
    save(checkpoints, 12)
    assert_same(restore(tmp_path)[1].state, make_state(12))


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_checkpoint as t
from dynajax.record import checkpoint, tree

def save(count):
    try:
        t.save(checkpoints, count)
    except checkpoint.UsageError as error:
        print(error)

checkpoints = checkpoint.Checkpoints(Path(sys.argv[2]))
save(5)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
save(11)
print("unforeseen", file=sys.stderr, flush=True)
tree.os.posix_fallocate = lambda *arguments: None
save(12)
"""


def test_files_that_the_system_refuses(tmp_path):
    """Real refusals, in a process of its own; one that no reservation foresees is noisier."""
    process = subprocess.run(
        [sys.executable, "-c", FULL, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "cannot save a checkpoint (File too large)" in line and str(tmp_path) in line
    assert process.stderr.startswith("unforeseen\n")
    assert_same(restore(tmp_path)[1].state, make_state(5))
    assert pieces(tmp_path) == ["000001-0-5"]
    assert not (tmp_path / "partial").exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot save a checkpoint"):
        save(Checkpoints(tmp_path / "file" / "checkpoints"), 5)


@pytest.mark.parametrize("damage", [None, truncate, flip, remove])
def test_quiet_and_without_threads(tmp_path, capfd, caplog, damage):
    before = set(threading.enumerate())  # tqdm's monitor, if a test before this one has trained
    save(Checkpoints(tmp_path), 5, 11)
    if damage:
        damage(newest(tmp_path))
        with pytest.warns(UserWarning):
            restore(tmp_path)
        time.sleep(0.1)  # requests that a failed one left behind would speak up now
    else:
        restore(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    # Idle threads of a closed event loop take a moment to end.
    deadline = time.monotonic() + 5
    while not set(threading.enumerate()) <= before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before
