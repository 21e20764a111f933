"""Several processes of one run, two of them for real on this machine."""

import csv
import json
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dynajax import UsageError, cli, processes, settings, train
from test_run import FLAGS as RUN_FLAGS
from test_run import _text, finish, last_state, start, wait_for

FLAGS = [f for f in RUN_FLAGS if f not in ("--fix=none", "--steps=400")] + [
    "--seeds=3",
    "--steps=300",
]


def start_two(out: Path) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(out, f"--process={i}/2@127.0.0.1:{port}", command=FLAGS) for i in range(2)]


def wait_for_step(out: Path, step: int, two: list[subprocess.Popen]) -> None:
    for process in two:
        wait_for(lambda: f",{step}," in _text(out / "eval.csv"), process)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of two processes: rows 0 and 1, and row 2."""
    out = tmp_path_factory.mktemp("two") / "run"
    (code, printed, err), (other_code, other_printed, other_err) = map(finish, start_two(out))
    assert (code, other_code) == (0, 0), err + other_err
    assert "3 rows in 2 processes" in printed and "report" in printed
    assert "rows" not in other_printed and "report" not in other_printed
    return out


def test_as_in_one_process(whole, tmp_path):
    values = dict(f.removeprefix("--set=").split("=") for f in FLAGS if "--set" in f)
    run = settings.make("Pendulum-v1", fixes=["scale,target"], seeds=3, steps=300, settings=values)
    one = train(run, tmp_path / "one", quiet=True)
    assert one.rows == range(3)
    tables = [list(csv.DictReader((out / "eval.csv").open())) for out in (one.folder, whole)]
    assert len(tables[1]) == 9
    for a, b in zip(*tables, strict=True):
        assert (a["variant"], a["seed"], a["step"]) == (b["variant"], b["seed"], b["step"])
        assert float(a["return_0"]) == pytest.approx(float(b["return_0"]), rel=0.02)
    logs = [
        [json.loads(line) for line in (out / "metrics.jsonl").open()] for out in (one.folder, whole)
    ]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        assert [a.get(n) for n in ("kind", "seed", "step")] == [
            b.get(n) for n in ("kind", "seed", "step")
        ]
        if a["kind"] == "fit":
            assert a["score"] == pytest.approx(b["score"], rel=0.02)
    names = [{p.name for p in out.iterdir()} for out in (one.folder, whole)]
    assert names[1] - names[0] == {"report.html", "curves.png"}
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {"process-0", "process-1"}
    with pytest.raises(UsageError, match="holds a run of 2 processes, and this is one of 1"):
        train(run, whole, quiet=True)


def test_interrupted_and_killed_it_goes_on_bit_for_bit(whole, tmp_path):
    out = tmp_path / "run"
    two = start_two(out)
    wait_for_step(out, 100, two)
    for i, process in enumerate(two):
        wait_for(lambda i=i: any(checkpoints(out, i)), process)
    time.sleep(0.3)
    two[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in two]
    assert [code for code, *_ in ends] == [cli.INTERRUPTED] * 2, ends
    saved = [checkpoints(out, i) for i in range(2)]
    names = [[path.name for path in paths] for paths in saved]
    assert names[0] == names[1] and len(names[0]) == 2
    # As if this one had been killed before it could save.
    shutil.rmtree(saved[1][1])

    two = start_two(out)
    wait_for_step(out, 200, two)
    two[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    (code, printed, err), _ = (finish(process) for process in two)
    assert time.monotonic() - begin < 60
    assert "going on from step 100" in printed
    assert code not in (0, cli.INTERRUPTED)
    assert "another process of this run has ended" in err or "another task died" in err

    ends = [finish(process) for process in start_two(out)]
    assert [code for code, *_ in ends] == [0, 0], ends
    assert (out / "eval.csv").read_bytes() == (whole / "eval.csv").read_bytes()
    for i in range(2):
        assert part_of(out, i) == part_of(whole, i)


def checkpoints(out: Path, process: int) -> list[Path]:
    return sorted((out / "checkpoints" / f"process-{process}").glob("*-step-*"))


def part_of(out: Path, process: int) -> dict:
    """`last_state` of a process."""
    copy = out.parent / f"{out.name}-{process}"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(out / "checkpoints" / f"process-{process}")
    return last_state(copy)


@pytest.fixture
def third_of_four(monkeypatch):
    """The bytes that this process, number 2 of 4, tells the others; they answer with theirs."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    said, answers = [], []

    def exchange(data):
        said.append(data)
        return np.stack([data if a is None else a for a in answers])

    monkeypatch.setattr(processes, "_exchange", exchange)
    return said, answers


def test_shares_are_equal_and_in_order(third_of_four):
    for rows in range(4, 20):
        shares = [processes.share(rows, i) for i in range(4)]
        assert [r for s in shares for r in s] == list(range(rows))
        sizes = [len(s) for s in shares]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert processes.share(10) == range(6, 8)
    with pytest.raises(UsageError, match="4 processes for 3 rows"):
        processes.share(3)


def test_gathered_rows_are_in_order_and_exact(third_of_four):
    said, answers = third_of_four
    rows = {"a": np.arange(6) / 3, "b": np.arange(12, dtype=np.int32).reshape(6, 2)}

    def part(i):
        share = processes.share(6, i)
        return {name: x[share.start : share.stop] for name, x in rows.items()}

    for i in range(4):  # what each would say
        answers[:] = [None] * 4
        processes.gather(part(i), 6)
    answers[:] = [said[0], said[1], None, said[3]]
    found = processes.gather(part(2), 6)
    for name, x in rows.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)


def test_other_flags_are_noticed(third_of_four):
    said, answers = third_of_four
    answers[:] = [None] * 4
    processes.check_same("steps 100")
    processes.check_same("steps 200")
    answers[:] = [said[0], said[0], None, said[1]]
    with pytest.raises(UsageError, match="process 3 was started with other flags"):
        processes.check_same("steps 100")


@pytest.mark.parametrize(
    "flag",
    ["", "2", "0/2", "0/2@host", "x/2@host:80", "0/2@:80", "0/2@host:p", "2/2@host:80", "auto"],
)
def test_a_wrong_flag_gets_one_line(flag):
    with pytest.raises(UsageError, match="--process=") as caught:
        processes.connect(flag)
    assert "\n" not in str(caught.value) and "I/N@HOST:PORT" in str(caught.value)
