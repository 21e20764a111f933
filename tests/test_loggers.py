"""Loggers: content and order of entries, with and without interruptions."""

import csv
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dynajax.config import Config
from dynajax.runs.loggers import LOGGERS, Entry, Loggers, Record, _scalars, learner_names
from dynajax.types import Evaluation, UsageError

CONFIG = Config(seeds=2, seed=3)
S, EVERY, FIT_EVERY = 2, 1000, 250
NAME = "{}/3/{}".format(CONFIG.variants[0].name, "{}")  # scalars of the first learner


def numbers(step: int) -> np.ndarray:
    return step + np.arange(S) / 4


def write(logs: Loggers, step: int, fits: range) -> None:
    """Log an evaluation and the fits before it, which are passed in reverse order."""
    logs.write(
        step,
        fits=[(fit_step, {"nll": numbers(fit_step)}) for fit_step in reversed(fits)],
        learn={
            "critic_loss": numbers(step),
            "undefined": np.full(S, np.nan),
            "count": np.arange(S),
        },
        evaluation=Evaluation(numbers(step)[:, None] + [[-1.0, 1.0]], np.full((S, 2), 7)),
        frames=np.full(S, step),
        time={"wall_seconds": step / 2},
    )


def log_run(folder: Path, names: tuple[str, ...], stop: int = 3 * EVERY) -> dict[str, int]:
    """Log an uninterrupted run and return its offsets."""
    folder.mkdir(exist_ok=True)
    logs = Loggers(folder, CONFIG, 0, {}, names)
    for step in range(EVERY, stop + 1, EVERY):
        write(logs, step, range(step - EVERY, step, FIT_EVERY))
    offsets = logs.offsets()
    logs.close()
    return offsets


def log_interrupted_run(folder: Path, names: tuple[str, ...]) -> None:
    """Log a run that is saved at step 1600 with its fits, killed after step 2000, and resumed."""
    folder.mkdir()
    logs = Loggers(folder, CONFIG, 0, {}, names)
    write(logs, 1000, range(0, 1000, FIT_EVERY))
    logs.write(1600, fits=[(step, {"nll": numbers(step)}) for step in (1000, 1250, 1500)])
    offsets = logs.offsets()
    write(logs, 2000, range(1750, 2000, FIT_EVERY))
    logs.close()
    logs = Loggers(folder, CONFIG, 1600, offsets, names)
    write(logs, 2000, range(1750, 2000, FIT_EVERY))
    write(logs, 3000, range(2000, 3000, FIT_EVERY))
    logs.close()


def test_files(tmp_path):
    log_run(tmp_path / "run", ("files",), EVERY)
    table = list(csv.reader((tmp_path / "run" / "eval.csv").open()))
    columns = ["variant", "seed", "step", "frames", "return_mean", "return_std", "length_mean"]
    assert table[0][:7] == columns
    assert table[1][1:] == ["3", "1000", "1000", "1000.0", "1.0", "7.0", "999.0", "1001.0"]
    assert table[2][1:] == ["4", "1000", "1000", "1000.25", "1.0", "7.0", "999.25", "1001.25"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    order = [(line["kind"], line["step"], line.get("seed")) for line in lines]
    fits = [("fit", at, seed) for at in range(0, 1000, FIT_EVERY) for seed in (3, 4)]
    assert order == [*fits, ("learn", 1000, 3), ("learn", 1000, 4), ("time", 1000, None)]
    assert lines[-2]["critic_loss"] == 1000.25 and lines[-2]["count"] == 1
    assert lines[-2]["undefined"] is None


def test_files_of_a_resumed_run_equal_those_of_an_uninterrupted_run(tmp_path):
    log_run(tmp_path / "whole", ("files",))
    log_interrupted_run(tmp_path / "resumed", ("files",))
    for name in ("eval.csv", "metrics.jsonl"):
        texts = [(tmp_path / run / name).read_text() for run in ("whole", "resumed")]
        assert texts[0] == texts[1] and texts[0]


def test_files_shorter_than_at_the_checkpoint_are_refused(tmp_path):
    offsets = log_run(tmp_path, ("files",), EVERY)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"metrics.jsonl is shorter") as caught:
        Loggers(tmp_path, CONFIG, EVERY, offsets)
    assert "--out" in str(caught.value) and "\n" not in str(caught.value)


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars that TensorBoard shows: each start purges events from its step on."""
    scalars: list[tuple[str, int, float]] = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")  # a record: size, checksum, event, checksum
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                scalars = [scalar for scalar in scalars if scalar[1] < event.step]
            scalars += [
                (value.tag, event.step, value.simple_value) for value in event.summary.value
            ]
    return {tag: [(at, x) for t, at, x in scalars if t == tag] for tag, _, _ in scalars}


def test_tensorboard_of_a_resumed_run_equals_that_of_an_uninterrupted_run(tmp_path):
    log_run(tmp_path / "whole", ("tensorboard",))
    log_interrupted_run(tmp_path / "resumed", ("tensorboard",))
    whole = read_tensorboard(tmp_path / "whole")
    assert [step for step, _ in whole[NAME.format("evaluation/return")]] == [1000, 2000, 3000]
    assert not any("undefined" in name for name in whole)
    assert read_tensorboard(tmp_path / "resumed") == whole


@pytest.mark.parametrize("saved", [0, EVERY])
def test_tensorboard_keeps_the_evaluation_at_the_checkpoint(tmp_path, saved):
    """With a checkpoint the evaluation at its step stays; without one all events are purged."""
    names = ("files", "tensorboard")
    offsets = log_run(tmp_path, names, EVERY)
    logs = Loggers(tmp_path, CONFIG, saved, offsets if saved else {}, names)
    if not saved:
        write(logs, 1000, range(0, 1000, FIT_EVERY))
    write(logs, 2000, range(1000, 2000, FIT_EVERY))
    logs.close()
    shown = read_tensorboard(tmp_path)
    assert [step for step, _ in shown[NAME.format("evaluation/return")]] == [1000, 2000]
    assert [step for step, _ in shown[NAME.format("fit/nll")]] == [*range(0, 2000, FIT_EVERY)]


def wandb_records(path: Path) -> list[Any]:
    """Return the records of an offline run's file.

    Another process writes the file, so wait until it is complete.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    kinds: list[str | None] = []
    deadline = time.monotonic() + 30
    while "exit" not in kinds and time.monotonic() < deadline:
        data, offset, payload, records = path.read_bytes(), 7, b"", []
        while offset + 7 <= len(data):
            if (left := 32768 - offset % 32768) < 7:  # the end of a block is padding
                offset += left
                continue
            size, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
            if offset + 7 + size > len(data):
                break  # not written yet
            payload += data[offset + 7 : offset + 7 + size]
            offset += 7 + size
            if kind in (1, 4):  # a full record, or the last part of one
                try:
                    records.append(Record.FromString(payload))
                except DecodeError:
                    break  # a part of it is not written yet
                payload = b""
        kinds = [record.WhichOneof("record_type") for record in records]
    return records


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    """Use the real wandb offline: a resumed run has the same id, and no metric is dropped."""
    import wandb  # noqa: F401 -- the extra `test` has it

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = ("files", "wandb")
    offsets = log_run(tmp_path, names, EVERY)
    logs = Loggers(
        tmp_path, dataclasses.replace(CONFIG, steps=CONFIG.steps + EVERY), EVERY, offsets, names
    )
    write(logs, 2000, range(1000, 2000, FIT_EVERY))
    logs.close()
    first, second = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    shown: dict[str, list[tuple[int, float]]] = {}
    for path in (first, second):
        records = wandb_records(path)
        (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        assert run.run_id == (tmp_path / "wandb-id").read_text() in path.name
        assert run.project == "dynajax"
        for record in records:
            if record.WhichOneof("record_type") == "history":
                for item in record.history.item:
                    name = item.key or "/".join(item.nested_key)
                    value = json.loads(item.value_json)
                    shown.setdefault(name, []).append((record.history.step.num, value))
    assert shown[NAME.format("fit/nll")] == [(at, at) for at in range(0, 2000, FIT_EVERY)]
    for kind in ("learn/critic_loss", "evaluation/return"):
        assert shown[NAME.format(kind)] == [(1000, 1000), (2000, 2000)]


def test_wandb_that_cannot_start_is_a_usage_error(tmp_path, monkeypatch):
    import wandb

    def init(**arguments: Any) -> None:
        raise wandb.errors.UsageError("no API key configured\nTraceback ...")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UsageError, match=r"--wandb.*no API key configured.*wandb login") as caught:
        Loggers(tmp_path, CONFIG, 0, {}, ("wandb",))
    assert "\n" not in str(caught.value)


def test_custom_logger(tmp_path, monkeypatch):
    steps = []

    class Steps:
        def __init__(self, folder: Path, config: Config, step: int, offsets: Any) -> None: ...

        def write(self, record: Record) -> None:
            steps.extend((entry.step, entry.kind) for entry in record.entries)

        def offsets(self) -> dict[str, int]:
            return {"custom": len(steps)}

        def close(self) -> None:
            steps.append("closed")

    monkeypatch.setitem(LOGGERS, "custom", Steps)
    offsets = log_run(tmp_path, ("custom",), EVERY)
    fits = [(at, "fit") for at in range(0, 1000, FIT_EVERY)]
    assert steps == [*fits, (1000, "learn"), (1000, "evaluation"), "closed"]
    assert offsets == {"custom": 6}


def test_without_loggers_nothing_is_written(tmp_path):
    assert log_run(tmp_path / "run", ()) == {}
    assert not list((tmp_path / "run").iterdir())


def test_metrics_per_dimension_are_only_in_the_json_file(tmp_path):
    values = np.array([[0.123456, np.nan], [1.0, -2.0]])
    logs = Loggers(tmp_path, CONFIG, 0, {}, ("files",))
    logs.write(10, fits=[(10, {"nll": numbers(10), "r2_state_dims": values})])
    logs.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["r2_state_dims"] for line in lines] == [[0.1235, None], [1.0, -2.0]]
    entry = Entry(10, "fit", {"nll": numbers(10), "r2_state_dims": values})
    scalars = _scalars(learner_names(CONFIG), entry)
    assert list(scalars) == [NAME.format("fit/nll"), NAME.format("fit/nll").replace("/3/", "/4/")]
