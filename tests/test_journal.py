"""The journal, handed what happened: what it writes, in which order, and that it can go on."""

import contextlib
import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import UsageError, report
from dynajax.runs.writer import RunWriter
from dynajax.runtime.program import build
from dynajax.types import Evaluation, TrainingInterval

ROWS = 4
SECONDS = {"update": 1.5, "fit": 0.5, "other": 1.0}


@pytest.fixture(scope="module")
def program(make, spec):
    """Two variants with two seeds; nothing of it is ever compiled."""
    settings = {"eval.episodes": 3, "model.fit_every": 5}
    return build(make(settings, fixes=["none", "scale,target"], seeds=2, seed=5), spec)


@pytest.fixture(scope="module")
def state(program):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.shapes())


@contextlib.contextmanager
def opened(program, folder, quiet=True):
    """The journal of a run that begins, or goes on, and the step where it does."""
    journal = RunWriter(
        folder, program.config, program.spec, program.placement, "test", {"actor": 7}, quiet, False
    )
    with journal:
        restored = journal.restore(program.shapes())
        step = 0 if restored is None else restored.step
        journal.begin(step, 4 << 20, ())
        yield journal, step


def rows(value):
    """A figure that tells the rows apart."""
    return value + np.arange(ROWS) / 8


def interval(step, fits=(), evaluated=True, dropped=0) -> TrainingInterval:
    returns = rows(step)[:, None] + np.arange(3.0)
    lengths = np.full((ROWS, 3), 50)
    return TrainingInterval(
        step=step,
        learn={"critic_loss": rows(1000 + step)},
        fits=[(at, {"score": rows(at), "fit_steps": np.full(ROWS, 20)}) for at in fits],
        train_return=rows(-step) if evaluated else None,
        dropped=np.full(ROWS, dropped),
        seconds=SECONDS,
        evaluation=Evaluation(returns, lengths, None, returns / 2, returns / 4)
        if evaluated
        else None,
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def without_times(folder):
    """What has to be the same in a run that was interrupted."""
    return [
        {k: v for k, v in line.items() if k not in ("wall_seconds", "steps_per_second", "seconds")}
        for line in lines(folder)
    ]


def test_what_is_written_and_in_which_order(program, state, tmp_path):
    with opened(program, tmp_path) as (journal, step):
        assert step == 0 and journal.saved_step == 0
        journal.write(interval(10))
        journal.write(interval(20, fits=(10, 15)))
        journal.save(20, state, {"age": np.arange(ROWS)}, SECONDS)
        assert journal.saved_step == 20
    names = [("none", 5), ("none", 6), ("scale,target", 5), ("scale,target", 6)]
    table = list(csv.DictReader((tmp_path / "eval.csv").open()))
    assert [(x["variant"], int(x["seed"]), int(x["step"])) for x in table] == [
        (*name, step) for step in (10, 20) for name in names
    ]
    for line, value in zip(table, [*rows(10), *rows(20)], strict=True):
        returns = value + np.arange(3.0)
        assert [float(line[f"return_{k}"]) for k in range(3)] == list(returns)
        assert float(line["return_mean"]) == returns.mean()
        assert float(line["return_std"]) == pytest.approx(returns.std())
        assert float(line["length_mean"]) == 50
    # Fits in their order, a line a row, then the evaluation's figures and the times.
    order = [(line["kind"], line["step"]) for line in lines(tmp_path)]
    assert order == [
        *[("learn", 10)] * 4,
        ("time", 10),
        *[("fit", 10)] * 4,
        *[("fit", 15)] * 4,
        *[("learn", 20)] * 4,
        ("time", 20),
    ]
    for kind, step, first in (("fit", 15, 15), ("learn", 20, 1020)):
        chosen = [x for x in lines(tmp_path) if (x["kind"], x["step"]) == (kind, step)]
        assert [(x["variant"], x["seed"]) for x in chosen] == names
        figure = "score" if kind == "fit" else "critic_loss"
        assert [x[figure] for x in chosen] == list(rows(first))
    learn = [x for x in lines(tmp_path) if x["kind"] == "learn"][-4:]
    assert [x["train_return"] for x in learn] == list(rows(-20))
    assert [x["start_value"] for x in learn] == list((rows(20) + 1) / 4)
    assert [x["start_return"] for x in learn] == list((rows(20) + 1) / 2)
    time = lines(tmp_path)[-1]
    assert time["wall_seconds"] == 3.0 and time["seconds"] == SECONDS and time["dropped"] == 0
    assert time["steps_per_second"] > 0
    info = json.loads((tmp_path / "config.json").read_text())
    assert info["command"] == "test" and info["parameters"] == {"actor": 7}
    assert list((tmp_path / "tensorboard").iterdir())


def test_nothing_is_said_of_learning_where_none_was(program, tmp_path):
    with opened(program, tmp_path) as (journal, _):
        journal.write(interval(10)._replace(learn={}))
    assert [line["kind"] for line in lines(tmp_path)] == ["time"]


def test_an_interrupted_run_leaves_the_logs_of_an_uninterrupted_one(program, state, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    host = {"age": np.arange(ROWS)}
    with opened(program, whole) as (journal, _):
        journal.write(interval(10))
        journal.write(interval(20, fits=(10, 15)))
        journal.write(interval(30, fits=(20, 25)))

    with opened(program, parts) as (journal, _):
        journal.write(interval(10))
        journal.save(10, state, host, SECONDS)
        journal.write(interval(13, fits=(10,), evaluated=False))
        journal.save(13, state, host, SECONDS)
    # Of an interval that was interrupted only the fits.
    assert [x["kind"] for x in lines(parts)] == ["learn"] * 4 + ["time"] + ["fit"] * 4
    with opened(program, parts) as (journal, step):
        assert step == journal.saved_step == 13
        journal.write(interval(20, fits=(15,)))
        journal.save(20, state, host, SECONDS)
        # Killed after these lines, and before they were saved.
        journal.write(interval(30, fits=(20, 25)))
    with opened(program, parts) as (journal, step):
        assert step == 20
        journal.write(interval(30, fits=(20, 25)))

    assert without_times(parts) == without_times(whole)
    assert (parts / "eval.csv").read_bytes() == (whole / "eval.csv").read_bytes()


def test_what_an_engine_keeps_comes_back(program, state, tmp_path):
    host = {"age": np.arange(ROWS), "score": np.arange(6.0).reshape(2, 3) / 7}
    moved = state._replace(shared=state.shared._replace(step=jnp.asarray(9, jnp.int32)))
    with opened(program, tmp_path) as (journal, _):
        journal.save(10, moved, host, SECONDS)
    journal = RunWriter(
        tmp_path, program.config, program.spec, program.placement, "test", {}, True, False
    )
    with journal:
        restored = journal.restore(program.shapes())
    assert restored.step == 10 and restored.meta["seconds"] == SECONDS
    assert restored.host.keys() == host.keys()
    for name, value in host.items():
        np.testing.assert_array_equal(restored.host[name], value)
    for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_the_user_is_told(program, state, tmp_path, capsys):
    with opened(program, tmp_path, quiet=False) as (journal, _):
        journal.write(interval(10))
        journal.save(10, state, {}, SECONDS)
    text = capsys.readouterr().out
    assert "mbpo with sac on walk, preset paper, 100 steps, 50 at random" in text
    assert "4 rows: fixes none | scale,target; seeds 5 to 6" in text
    assert "1 MiB of device memory a row" in text and "actor 7" in text
    assert f"folder {tmp_path}" in text and "going on" not in text
    assert "step 10/100  return none 11.1 ± 0.1, scale,target 11.3 ± 0.1" in text
    with opened(program, tmp_path, quiet=False):
        assert "going on from step 10" in capsys.readouterr().out
    with opened(program, tmp_path):
        assert not capsys.readouterr().out


def test_lost_transitions_are_told(program, tmp_path, capsys):
    with opened(program, tmp_path, quiet=False) as (journal, _):
        journal.write(interval(10, dropped=3))
        assert "warning" not in capsys.readouterr().out
        journal.write(interval(1010, dropped=1003))
        assert "warning: every transition of the last 1000 steps" in capsys.readouterr().out
        journal.write(interval(1020, dropped=1003))
        assert "warning" not in capsys.readouterr().out
        lost = interval(1030)
        lost = lost._replace(evaluation=lost.evaluation._replace(lengths=np.zeros((ROWS, 3), int)))
        journal.write(lost)
        assert "warning: every episode of the evaluation" in capsys.readouterr().out


def test_a_log_that_is_shorter_than_its_checkpoint_is_refused(program, state, tmp_path):
    with opened(program, tmp_path) as (journal, _):
        journal.write(interval(10))
        journal.save(10, state, {}, SECONDS)
    (tmp_path / "eval.csv").write_text("variant\n")
    with pytest.raises(UsageError, match=r"eval\.csv is shorter"), opened(program, tmp_path):
        pass


# --- whose folder it is --------------------------------------------------------------------------


def test_evaluations_without_a_checkpoint_are_not_written_over(program, state, tmp_path):
    with opened(program, tmp_path) as (journal, _):
        for step in (10, 20):
            journal.write(interval(step))
            journal.save(step, state, {}, SECONDS)
    written = (tmp_path / "eval.csv").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with (
        pytest.raises(UsageError, match="has evaluations, and there is no checkpoint"),
        opened(program, tmp_path),
    ):
        pass
    assert (tmp_path / "eval.csv").read_bytes() == written
    # One alone is what a run leaves that was killed before its first checkpoint.
    first = written.splitlines(keepends=True)[: 1 + ROWS]
    (tmp_path / "eval.csv").write_bytes(b"".join(first))
    with opened(program, tmp_path) as (_, step):
        assert step == 0


@pytest.mark.parametrize("name", ["eval.csv", "metrics.jsonl"])
def test_files_of_others_are_not_written_over(program, tmp_path, name):
    (tmp_path / name).write_text("precious")
    with (
        pytest.raises(UsageError, match=f"has {name} and no config.json"),
        opened(program, tmp_path),
    ):
        pass
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("text", ["[]", "null", '{"config": null}', '{"config": 5}', "{", "{}"])
def test_a_config_that_is_none_is_refused(program, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with (
        pytest.raises(UsageError, match=r"its config\.json cannot be read"),
        opened(program, tmp_path),
    ):
        pass
    assert (tmp_path / "config.json").read_text() == text


def test_a_folder_is_claimed_anew_until_something_is_saved(program, make, spec, state, tmp_path):
    other = build(make({"learn.utd": 3}, seeds=2), spec)
    with opened(other, tmp_path):
        pass
    with opened(program, tmp_path) as (journal, _):
        journal.write(interval(10))
        journal.save(10, state, {}, SECONDS)
    with (
        pytest.raises(UsageError, match=r"another configuration .*learn\.utd"),
        opened(other, tmp_path),
    ):
        pass
    assert report.read_run(tmp_path).evals.keys() == {"none", "scale,target"}
