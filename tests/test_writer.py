"""Run writer: files and messages, their order, and resuming."""

import contextlib
import csv
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import UsageError, report
from dynajax.runs.loggers import learner_names
from dynajax.runs.progress import Progress, header
from dynajax.runs.writer import RunWriter
from dynajax.runtime.program import build
from dynajax.types import Evaluation, TrainingInterval

NUM_LEARNERS = 4
SECONDS = {"update": 1.5, "fit": 0.5, "other": 1.0}


@pytest.fixture(scope="module")
def program(make, spec):
    """Return a program of two variants with two seeds, which no test compiles."""
    settings = {"eval.episodes": 3, "model.fit_every": 5}
    return build(make(settings, fixes=["none", "scale,target"], seeds=2, seed=5), spec)


@pytest.fixture(scope="module")
def state(program):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.shapes())


@contextlib.contextmanager
def open_writer(program, folder, quiet=True):
    """Yield the writer of a run that starts or resumes, and the step where it does."""
    progress = Progress(program.config, quiet)
    writer = RunWriter(
        folder,
        program.config,
        program.spec,
        program.placement,
        "test",
        {"actor": 7},
        progress,
        False,
    )
    with writer:
        restored = writer.restore(program.shapes())
        step = 0 if restored is None else restored.step
        writer.begin(step, 4 << 20, ())
        yield writer, step


def per_learner(value):
    """Return a metric that differs between learners."""
    return value + np.arange(NUM_LEARNERS) / 8


def interval(step, fits=(), evaluated=True, dropped=0) -> TrainingInterval:
    """Return an interval that ends at `step`, with metrics that depend on step and learner."""
    returns = per_learner(step)[:, None] + np.arange(3.0)
    lengths = np.full((NUM_LEARNERS, 3), 50)
    return TrainingInterval(
        step=step,
        learn={"critic_loss": per_learner(1000 + step)},
        fits=[
            (
                fit_step,
                {"holdout_mse": per_learner(fit_step), "fit_steps": np.full(NUM_LEARNERS, 20)},
            )
            for fit_step in fits
        ],
        train_return=per_learner(-step) if evaluated else None,
        dropped=np.full(NUM_LEARNERS, dropped),
        frames=np.full(NUM_LEARNERS, 2 * step),
        seconds=SECONDS,
        evaluation=Evaluation(returns, lengths, None, returns / 2, returns / 4)
        if evaluated
        else None,
    )


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def metrics_without_times(folder):
    """Return the metrics that an interrupted and an uninterrupted run have in common."""
    return [
        {k: v for k, v in line.items() if k not in ("wall_seconds", "steps_per_second", "seconds")}
        for line in metrics(folder)
    ]


def test_files_and_order_of_entries(program, state, tmp_path):
    with open_writer(program, tmp_path) as (writer, step):
        assert step == 0 and writer.saved_step == 0
        writer.write(interval(10))
        writer.write(interval(20, fits=(10, 15)))
        writer.save(20, state, {"age": np.arange(NUM_LEARNERS)}, SECONDS)
        assert writer.saved_step == 20
    names = [("none", 5), ("none", 6), ("scale,target", 5), ("scale,target", 6)]
    table = list(csv.DictReader((tmp_path / "eval.csv").open()))
    assert [(x["variant"], int(x["seed"]), int(x["step"])) for x in table] == [
        (*name, step) for step in (10, 20) for name in names
    ]
    for line, value in zip(table, [*per_learner(10), *per_learner(20)], strict=True):
        returns = value + np.arange(3.0)
        assert [float(line[f"return_{k}"]) for k in range(3)] == list(returns)
        assert float(line["return_mean"]) == returns.mean()
        assert float(line["return_std"]) == pytest.approx(returns.std())
        assert float(line["length_mean"]) == 50
    # Fits in the order of steps with one line per learner, then learning metrics, then times.
    order = [(line["kind"], line["step"]) for line in metrics(tmp_path)]
    assert order == [
        *[("learn", 10)] * 4,
        ("time", 10),
        *[("fit", 10)] * 4,
        *[("fit", 15)] * 4,
        *[("learn", 20)] * 4,
        ("time", 20),
    ]
    for kind, step, first in (("fit", 15, 15), ("learn", 20, 1020)):
        entries = [x for x in metrics(tmp_path) if (x["kind"], x["step"]) == (kind, step)]
        assert [(x["variant"], x["seed"]) for x in entries] == names
        name = "holdout_mse" if kind == "fit" else "critic_loss"
        assert [x[name] for x in entries] == list(per_learner(first))
    learn = [x for x in metrics(tmp_path) if x["kind"] == "learn"][-4:]
    assert [x["train_return"] for x in learn] == list(per_learner(-20))
    assert [x["start_value"] for x in learn] == list((per_learner(20) + 1) / 4)
    assert [x["start_return"] for x in learn] == list((per_learner(20) + 1) / 2)
    time = metrics(tmp_path)[-1]
    assert time["wall_seconds"] == 3.0 and time["seconds"] == SECONDS and time["dropped"] == 0
    assert time["steps_per_second"] > 0
    info = json.loads((tmp_path / "config.json").read_text())
    assert info["command"] == "test" and info["parameters"] == {"actor": 7}
    assert list((tmp_path / "tensorboard").iterdir())


def test_no_learning_metrics_before_learning_starts(program, tmp_path):
    with open_writer(program, tmp_path) as (writer, _):
        writer.write(interval(10)._replace(learn={}))
    assert [line["kind"] for line in metrics(tmp_path)] == ["time"]


def test_interrupted_run_has_the_logs_of_an_uninterrupted_one(program, state, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    host = {"age": np.arange(NUM_LEARNERS)}
    with open_writer(program, whole) as (writer, _):
        writer.write(interval(10))
        writer.write(interval(20, fits=(10, 15)))
        writer.write(interval(30, fits=(20, 25)))

    with open_writer(program, parts) as (writer, _):
        writer.write(interval(10))
        writer.save(10, state, host, SECONDS)
        writer.write(interval(13, fits=(10,), evaluated=False))
        writer.save(13, state, host, SECONDS)
    # Only the fits of an interrupted interval are logged.
    assert [x["kind"] for x in metrics(parts)] == ["learn"] * 4 + ["time"] + ["fit"] * 4
    with open_writer(program, parts) as (writer, step):
        assert step == writer.saved_step == 13
        writer.write(interval(20, fits=(15,)))
        writer.save(20, state, host, SECONDS)
        # The run is killed after writing these lines, before it saves a checkpoint.
        writer.write(interval(30, fits=(20, 25)))
    with open_writer(program, parts) as (writer, step):
        assert step == 20
        writer.write(interval(30, fits=(20, 25)))

    assert metrics_without_times(parts) == metrics_without_times(whole)
    assert (parts / "eval.csv").read_bytes() == (whole / "eval.csv").read_bytes()


def test_restore_returns_state_and_host_arrays(program, state, tmp_path):
    host = {"age": np.arange(NUM_LEARNERS), "score": np.arange(6.0).reshape(2, 3) / 7}
    moved = state._replace(shared=state.shared._replace(step=jnp.asarray(9, jnp.int32)))
    with open_writer(program, tmp_path) as (writer, _):
        writer.save(10, moved, host, SECONDS)
    quiet = Progress(program.config, quiet=True)
    writer = RunWriter(
        tmp_path, program.config, program.spec, program.placement, "test", {}, quiet, False
    )
    with writer:
        restored = writer.restore(program.shapes())
    assert restored.step == 10 and restored.meta["seconds"] == SECONDS
    assert restored.host.keys() == host.keys()
    for name, value in host.items():
        np.testing.assert_array_equal(restored.host[name], value)
    for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(a, b)


def test_printed_messages(program, state, tmp_path, capsys):
    with open_writer(program, tmp_path, quiet=False) as (writer, _):
        writer.write(interval(10))
        writer.save(10, state, {}, SECONDS)
    text = capsys.readouterr().out
    assert header(program.config, tmp_path) == [
        f"walk, seeds 5 to 6, in {tmp_path}: MBPO (Janner et al., 2019) with none | scale,target; "
        "agent sac, preset paper",
        "100 agent steps, 50 with random actions",
    ]
    assert text.splitlines()[0].startswith("4 learners; ")
    assert "1 MiB of device memory per learner" in text and "actor 7" in text
    assert "resuming" not in text
    assert "step 10/100  return none 11.1 ± 0.1, scale,target 11.3 ± 0.1" in text
    with open_writer(program, tmp_path, quiet=False):
        assert "resuming from step 10" in capsys.readouterr().out
    with open_writer(program, tmp_path):
        assert not capsys.readouterr().out


def test_dropped_transitions_are_reported(program, tmp_path, capsys):
    with open_writer(program, tmp_path, quiet=False) as (writer, _):
        writer.write(interval(10, dropped=3))
        assert "warning" not in capsys.readouterr().out
        writer.write(interval(1010, dropped=1003))
        assert "warning: every transition of the last 1000 steps" in capsys.readouterr().out
        writer.write(interval(1020, dropped=1003))
        assert "warning" not in capsys.readouterr().out


def test_evaluation_without_a_finite_episode_is_reported_by_learner(program, tmp_path, capsys):
    """Its return is not known, and its policy never replaces one with a return."""
    with open_writer(program, tmp_path, quiet=False) as (writer, _):
        evaluated = interval(10)
        returns = np.array(evaluated.evaluation.returns)
        returns[0], returns[1, 0] = np.nan, np.nan
        evaluated = evaluated._replace(evaluation=evaluated.evaluation._replace(returns=returns))
        writer.write(evaluated)
        printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if "warning" in line]
    variant, seed = learner_names(program.config)[0]
    assert f"every evaluation episode of {variant} (seed {seed}) ended because" in line
    lines = list(csv.DictReader((tmp_path / "eval.csv").open(newline="")))
    assert [math.isnan(float(x["return_mean"])) for x in lines] == [True] + [False] * 3
    # The mean of the others; an episode that was not finite is left out.
    assert float(lines[1]["return_mean"]) == returns[1, 1:].mean()


def test_log_shorter_than_at_the_checkpoint_is_refused(program, state, tmp_path):
    with open_writer(program, tmp_path) as (writer, _):
        writer.write(interval(10))
        writer.save(10, state, {}, SECONDS)
    (tmp_path / "eval.csv").write_text("variant\n")
    with pytest.raises(UsageError, match=r"eval\.csv is shorter"), open_writer(program, tmp_path):
        pass


# --- Checks of the run directory -----------------------------------------------------------------


def test_evaluations_without_a_checkpoint_are_not_overwritten(program, state, tmp_path):
    with open_writer(program, tmp_path) as (writer, _):
        for step in (10, 20):
            writer.write(interval(step))
            writer.save(step, state, {}, SECONDS)
    written = (tmp_path / "eval.csv").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with (
        pytest.raises(UsageError, match="has evaluations, but there is no checkpoint"),
        open_writer(program, tmp_path),
    ):
        pass
    assert (tmp_path / "eval.csv").read_bytes() == written
    # A run that was killed before its first checkpoint has one evaluation.
    first = written.splitlines(keepends=True)[: 1 + NUM_LEARNERS]
    (tmp_path / "eval.csv").write_bytes(b"".join(first))
    with open_writer(program, tmp_path) as (_, step):
        assert step == 0


@pytest.mark.parametrize("name", ["eval.csv", "metrics.jsonl"])
def test_logs_without_a_config_are_not_overwritten(program, tmp_path, name):
    (tmp_path / name).write_text("precious")
    with (
        pytest.raises(UsageError, match=f"contains {name} but no config.json"),
        open_writer(program, tmp_path),
    ):
        pass
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("text", ["[]", "null", '{"config": null}', '{"config": 5}', "{", "{}"])
def test_invalid_config_is_refused(program, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with (
        pytest.raises(UsageError, match=r"its config\.json cannot be read"),
        open_writer(program, tmp_path),
    ):
        pass
    assert (tmp_path / "config.json").read_text() == text


def test_folder_can_be_reused_until_something_is_saved(program, make, spec, state, tmp_path):
    other = build(make({"learn.utd": 3}, seeds=2), spec)
    with open_writer(other, tmp_path):
        pass
    with open_writer(program, tmp_path) as (writer, _):
        writer.write(interval(10))
        writer.save(10, state, {}, SECONDS)
    with (
        pytest.raises(UsageError, match=r"another configuration .*learn\.utd"),
        open_writer(other, tmp_path),
    ):
        pass
    assert report.read_run(tmp_path).evals.keys() == {"none", "scale,target"}
