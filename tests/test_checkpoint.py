"""Checkpoints come back bit for bit."""

import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import (
    A,
    D,
    S,
    assert_same,
    data_file,
    files,
    make_state,
    newest,
    opened,
    pieces,
    restore,
    ring,
    save,
)
from dynajax.runs.checkpoint import Checkpoints
from dynajax.runtime import sharding
from dynajax.types import Replay, UsageError


def test_round_trip_is_bit_for_bit(tmp_path):
    state = make_state(5)
    nan = state.learners.agent.log_temperature.at[0].set(jnp.nan).at[1].set(-0.0)
    state = state._replace(
        rows=state.learners._replace(agent=state.learners.agent._replace(log_temperature=nan))
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
    state = state._replace(learners=state.learners._replace(model=None, synthetic=None))
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
    state = state._replace(learners=state.learners._replace(agent=agent, synthetic=None))
    Checkpoints(tmp_path).save(1, state, {}, {})
    assert_same(Checkpoints(tmp_path).restore(jax.tree.map(jnp.zeros_like, state)).state, state)
    other = state._replace(
        learners=state.learners._replace(agent=agent._replace(unused=jnp.ones(S)))
    )
    with pytest.raises(UsageError, match="learners/agent/unused is missing there and float32"):
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
    rows = state.learners
    want = [
        rows.agent.actor["Dense_0"]["kernel"],
        rows.agent.critic["Dense_0"]["bias"],
        rows.model.params["Dense_0"]["kernel"],
        rows.model.code.skip,
        state.shared.step,
        rows.config.learn.discount,
        rows.synthetic_buffer.packed,
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
    assert sharding.put(shared, shared).unsafe_buffer_pointer() != aligned.ctypes.data


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
