"""Checkpoints: exact round trips, and the files on disk."""

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
    pieces,
    read_with_orbax,
    real_buffer,
    restore,
    save,
)
from dynajax.runs.checkpoint import Checkpoints
from dynajax.runtime import sharding
from dynajax.types import ReplayBuffer, UsageError


def test_round_trip_is_bit_for_bit(tmp_path):
    state = make_state(5)
    nan = state.learners.agent.log_temperature.at[0].set(jnp.nan).at[1].set(-0.0)
    state = state._replace(
        learners=state.learners._replace(agent=state.learners.agent._replace(log_temperature=nan))
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


def test_learners_without_a_model(tmp_path):
    state = make_state(5)
    state = state._replace(learners=state.learners._replace(model=None, synthetic=None))
    Checkpoints(tmp_path).save(1, state, {}, {})
    assert_same(Checkpoints(tmp_path).restore(state).state, state)


class OtherAgentState(NamedTuple):
    """State of another agent, with lists, dictionaries and None."""

    weights: Any
    unused: Any
    count: Any


def test_any_tree_in_the_learner_state(tmp_path):
    state = make_state(5)
    heads = [jnp.ones((S, 2)), (jnp.zeros((S, 3), jnp.int8), None)]
    agent = OtherAgentState({"a.b": heads}, None, jnp.arange(S) > 0)
    state = state._replace(learners=state.learners._replace(agent=agent, synthetic=None))
    Checkpoints(tmp_path).save(1, state, {}, {})
    assert_same(Checkpoints(tmp_path).restore(jax.tree.map(jnp.zeros_like, state)).state, state)
    other = state._replace(
        learners=state.learners._replace(agent=agent._replace(unused=jnp.ones(S)))
    )
    with pytest.raises(
        UsageError, match="learners/agent/unused is missing in the checkpoint and float32"
    ):
        Checkpoints(tmp_path).restore(other)


def test_orbax_alone_can_read_a_checkpoint(tmp_path):
    """Read it in a process that cannot import dynajax."""
    state = make_state(5)
    Checkpoints(tmp_path).save(50, state, {"pending.obs": np.arange(3.0)}, {})
    program = f"""
import sys; sys.modules["dynajax"] = None
import numpy as np
import orbax.checkpoint as ocp
tree = ocp.PyTreeCheckpointer().restore("{newest(tmp_path)}")
learners = tree["learners"]
agent, model = learners["agent"], learners["model"]
np.savez("{tmp_path}/copy", agent["actor"]["Dense_0"]["kernel"], agent["critic"]["Dense_0"]["bias"],
         model["params"]["Dense_0"]["kernel"], model["stats"]["transform"]["skip"], tree["shared"]["step"],
         learners["config"]["learn"]["discount"], learners["synthetic"]["packed"],
         agent["actor_opt_state"]["0"]["mu"]["Dense_0"]["bias"], learners["key"],
         tree["host"]["pending.obs"])
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    learners = state.learners
    want = [
        learners.agent.actor["Dense_0"]["kernel"],
        learners.agent.critic["Dense_0"]["bias"],
        learners.model.params["Dense_0"]["kernel"],
        learners.model.stats.transform.skip,
        state.shared.step,
        learners.config.learn.discount,
        learners.synthetic.packed,
        learners.agent.actor_opt_state[0].mu["Dense_0"]["bias"],
        learners.key,
        np.arange(3.0),
    ]
    with np.load(tmp_path / "copy.npz", allow_pickle=False) as copy:
        assert_same(list(copy.values()), want)


def test_number_of_files_does_not_depend_on_the_number_of_leaves(tmp_path):
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


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="JAX shares memory with numpy only on CPU"
)
def test_restored_arrays_own_their_memory():
    buffer = np.zeros(4096, np.uint8)
    aligned = buffer[-buffer.ctypes.data % 64 :][:2048].view(np.float32)
    shared = jax.device_put(aligned)
    assert shared.unsafe_buffer_pointer() == aligned.ctypes.data
    assert sharding.put(shared, shared).unsafe_buffer_pointer() != aligned.ctypes.data


def test_replay_buffer_wraps_around(tmp_path):
    for count in (0, 1, 5, 8, 11, 16, 17, 40, 43):
        checkpoints = Checkpoints(tmp_path, keep=1)
        checkpoints.restore(make_state(0))
        save(checkpoints, count)
        restored = checkpoints.restore(make_state(0))
        assert_same(restored.state, make_state(count))


def test_repeated_saves_with_one_object(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3, 6, 9, 12, 12, 30)
    assert_same(restore(tmp_path)[1].state, make_state(30))


def test_only_new_pieces_are_written_and_unused_ones_deleted(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 3)
    assert pieces(tmp_path) == ["000001-0-3"]
    first = data_file(tmp_path / "replay" / "000001-0-3")
    before = first.stat()
    save(checkpoints, 5)
    assert pieces(tmp_path) == ["000001-0-3", "000002-3-5"]
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for name, slots in (("000001-0-3", slice(0, 3)), ("000002-3-5", slice(3, 5))):
        real = read_with_orbax(tmp_path / "replay" / name)["learners"]["real_buffer"]
        want = jax.tree.map(lambda x, slots=slots: x[:, slots], real_buffer(5))
        assert_same(ReplayBuffer(real["packed"], real["valid"], None, D, A), want)
    # The checkpoint does not contain the buffer, so its size does not depend on the capacity.
    assert "real_buffer" not in read_with_orbax(newest(tmp_path))["learners"]
    Checkpoints(tmp_path / "large").save(1, make_state(5, capacity=800), {}, {})
    small, large = (
        jax.tree.map(np.shape, read_with_orbax(newest(folder)))
        for folder in (tmp_path, tmp_path / "large")
    )
    assert small == large
    # The buffer at 11 starts with transition 3, but the checkpoint at 5 needs the first piece.
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
