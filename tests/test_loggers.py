"""What is logged arrives, in the order of steps, whatever interrupts the run."""

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
from dynajax.runs.loggers import LOGGERS, Entry, Loggers, Record, _scalars, row_names
from dynajax.types import Evaluation, UsageError

CONFIG = Config(seeds=2, seed=3)
S, EVERY, FIT_EVERY = 2, 1000, 250
NAME = "{}/3/{}".format(CONFIG.variants[0].name, "{}")  # of the first row's scalars


def numbers(step: int) -> np.ndarray:
    return step + np.arange(S) / 4


def write(logs: Loggers, step: int, fits: range) -> None:
    """An evaluation with the fits before it, their order being of no matter."""
    logs.write(
        step,
        fits=[(at, {"nll": numbers(at)}) for at in reversed(fits)],
        learn={"critic_loss": numbers(step), "nothing": np.full(S, np.nan), "count": np.arange(S)},
        evaluation=Evaluation(numbers(step)[:, None] + [[-1.0, 1.0]], np.full((S, 2), 7)),
        time={"wall_seconds": step / 2},
    )


def whole_run(folder: Path, names: tuple[str, ...], stop: int = 3 * EVERY) -> dict[str, int]:
    folder.mkdir(exist_ok=True)
    logs = Loggers(folder, CONFIG, 0, {}, names)
    for step in range(EVERY, stop + 1, EVERY):
        write(logs, step, range(step - EVERY, step, FIT_EVERY))
    offsets = logs.offsets()
    logs.close()
    return offsets


def interrupted_run(folder: Path, names: tuple[str, ...]) -> None:
    """Saved at 1600, where the fits were logged; killed beyond 2000; resumed."""
    folder.mkdir()
    logs = Loggers(folder, CONFIG, 0, {}, names)
    write(logs, 1000, range(0, 1000, FIT_EVERY))
    logs.write(1600, fits=[(at, {"nll": numbers(at)}) for at in (1000, 1250, 1500)])
    offsets = logs.offsets()
    write(logs, 2000, range(1750, 2000, FIT_EVERY))
    logs.close()
    logs = Loggers(folder, CONFIG, 1600, offsets, names)
    write(logs, 2000, range(1750, 2000, FIT_EVERY))
    write(logs, 3000, range(2000, 3000, FIT_EVERY))
    logs.close()


def test_files(tmp_path):
    whole_run(tmp_path / "run", ("files",), EVERY)
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
    assert lines[-2]["nothing"] is None


def test_a_resumed_run_has_the_files_of_a_whole_one(tmp_path):
    whole_run(tmp_path / "whole", ("files",))
    interrupted_run(tmp_path / "resumed", ("files",))
    for name in ("eval.csv", "metrics.jsonl"):
        texts = [(tmp_path / run / name).read_text() for run in ("whole", "resumed")]
        assert texts[0] == texts[1] and texts[0]


def test_files_shorter_than_the_checkpoint_says(tmp_path):
    offsets = whole_run(tmp_path, ("files",), EVERY)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"metrics.jsonl is shorter") as caught:
        Loggers(tmp_path, CONFIG, EVERY, offsets)
    assert "--out" in str(caught.value) and "\n" not in str(caught.value)


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars as TensorBoard shows them: a start removes what was there from its step on."""
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


def test_tensorboard_keeps_what_a_resume_does_not_repeat(tmp_path):
    whole_run(tmp_path / "whole", ("tensorboard",))
    interrupted_run(tmp_path / "resumed", ("tensorboard",))
    whole = board(tmp_path / "whole")
    assert [at for at, _ in whole[NAME.format("evaluation/return")]] == [1000, 2000, 3000]
    assert not any("nothing" in name for name in whole)
    assert board(tmp_path / "resumed") == whole


@pytest.mark.parametrize("saved", [0, EVERY])
def test_tensorboard_at_the_step_of_a_resume(tmp_path, saved):
    """Saved right after an evaluation, which stays; a start without a checkpoint begins anew."""
    names = ("files", "tensorboard")
    offsets = whole_run(tmp_path, names, EVERY)
    logs = Loggers(tmp_path, CONFIG, saved, offsets if saved else {}, names)
    if not saved:
        write(logs, 1000, range(0, 1000, FIT_EVERY))
    write(logs, 2000, range(1000, 2000, FIT_EVERY))
    logs.close()
    shown = board(tmp_path)
    assert [at for at, _ in shown[NAME.format("evaluation/return")]] == [1000, 2000]
    assert [at for at, _ in shown[NAME.format("fit/nll")]] == [*range(0, 2000, FIT_EVERY)]


def wandb_records(path: Path) -> list[Any]:
    """The records of an offline run's file, once its writer, another process, has written them."""
    from wandb.proto.wandb_internal_pb2 import Record

    kinds: list[str | None] = []
    deadline = time.monotonic() + 30
    while "exit" not in kinds and time.monotonic() < deadline:
        data, at, whole, records = path.read_bytes(), 7, b"", []
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:  # no record begins at the very end of a block
                at += left
                continue
            size, part = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole += data[at + 7 : at + 7 + size]
            at += 7 + size
            if part in (1, 4):  # all of a record, or its last part
                records.append(Record.FromString(whole))
                whole = b""
        kinds = [record.WhichOneof("record_type") for record in records]
    return records


def test_wandb_has_everything_in_one_run(tmp_path, monkeypatch):
    """The real wandb, offline: a resume goes on with the run, and no metric comes too late."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = ("files", "wandb")
    offsets = whole_run(tmp_path, names, EVERY)
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


def test_wandb_that_cannot_start_is_one_clear_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**arguments: Any) -> None:
        raise wandb.errors.UsageError("no API key configured\nTraceback ...")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UsageError, match=r"--wandb.*no API key configured.*wandb login") as caught:
        Loggers(tmp_path, CONFIG, 0, {}, ("wandb",))
    assert "\n" not in str(caught.value)


def test_a_logger_of_ones_own_is_a_class_and_an_entry(tmp_path, monkeypatch):
    steps = []

    class Steps:
        def __init__(self, folder: Path, config: Config, step: int, offsets: Any) -> None: ...

        def write(self, record: Record) -> None:
            steps.extend((entry.step, entry.kind) for entry in record.entries)

        def offsets(self) -> dict[str, int]:
            return {"own": len(steps)}

        def close(self) -> None:
            steps.append("closed")

    monkeypatch.setitem(LOGGERS, "own", Steps)
    offsets = whole_run(tmp_path, ("own",), EVERY)
    fits = [(at, "fit") for at in range(0, 1000, FIT_EVERY)]
    assert steps == [*fits, (1000, "learn"), (1000, "evaluation"), "closed"]
    assert offsets == {"own": 6}


def test_no_loggers_write_nothing(tmp_path):
    assert whole_run(tmp_path / "run", ()) == {}
    assert not list((tmp_path / "run").iterdir())


def test_figures_of_every_channel_are_lists_in_the_file_and_nowhere_else(tmp_path):
    values = np.array([[0.123456, np.nan], [1.0, -2.0]])
    logs = Loggers(tmp_path, CONFIG, 0, {}, ("files",))
    logs.write(10, fits=[(10, {"nll": numbers(10), "r2_state_dims": values})])
    logs.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["r2_state_dims"] for line in lines] == [[0.1235, None], [1.0, -2.0]]
    entry = Entry(10, "fit", {"nll": numbers(10), "r2_state_dims": values})
    scalars = _scalars(row_names(CONFIG), entry)
    assert list(scalars) == [NAME.format("fit/nll"), NAME.format("fit/nll").replace("/3/", "/4/")]
