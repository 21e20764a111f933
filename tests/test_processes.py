"""Several processes of one run, two of them for real on this machine."""

import csv
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dynajax import UsageError, load_model, load_policy, settings, train
from dynajax.runs import serialization
from dynajax.runtime import distributed, exit_status
from test_run import FLAGS as RUN_FLAGS
from test_run import _text, finish, start, wait_for

# Large minibatches, so that an interruption comes before the end.
FLAGS = [f for f in RUN_FLAGS if f not in ("--fix=none", "--steps=400", "--set=learn.batch=20")] + [
    "--seeds=3",
    "--steps=300",
    "--set=learn.batch=3000",
]


def start_two(out: Path) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(out, f"--process={i}/2@127.0.0.1:{port}", command=FLAGS) for i in range(2)]


def wait_for_step(out: Path, step: int, two: list[subprocess.Popen]) -> None:
    for process in two:
        wait_for(lambda: f",{step}," in _text(out / "eval.csv"), process)


def checkpoints(out: Path, process: int) -> list[Path]:
    return sorted((out / "checkpoints" / f"process-{process}").glob("*-step-*"))


def test_two_processes_interrupted_and_killed_come_to_what_one_does(tmp_path):
    """Rows 0 and 1, and row 2; to rounding, for other batches round differently."""
    out = tmp_path / "run"
    two = start_two(out)
    wait_for_step(out, 100, two)
    for i, process in enumerate(two):
        wait_for(lambda i=i: any(checkpoints(out, i)), process)
    time.sleep(0.3)
    two[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in two]
    assert [code for code, *_ in ends] == [exit_status.INTERRUPTED] * 2, ends
    assert "3 rows in 2 processes" in ends[0][1] and "rows" not in ends[1][1]
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
    assert code not in (0, exit_status.INTERRUPTED)
    assert "another process of this run has ended" in err or "another task died" in err

    ends = [finish(process) for process in start_two(out)]
    assert [code for code, *_ in ends] == [0, 0], ends
    assert "going on" in ends[0][1] and "report" in ends[0][1] and "report" not in ends[1][1]
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"process-0", "process-1"}

    values = dict(f.removeprefix("--set=").split("=") for f in FLAGS if "--set" in f)
    run = settings.make(
        "Pendulum-v1", preset="paper", fixes=["scale,target"], seeds=3, steps=300, settings=values
    )
    one = train(run, tmp_path / "one", quiet=True)
    assert one.learner_indices == range(3)
    extra = {p.name for p in out.iterdir()} - {p.name for p in one.folder.iterdir()}
    assert extra == {"report.html", "curves.png"}
    tables = [list(csv.DictReader((o / "eval.csv").open())) for o in (one.folder, out)]
    assert len(tables[1]) == 9
    for a, b in zip(*tables, strict=True):
        assert (a["variant"], a["seed"], a["step"]) == (b["variant"], b["seed"], b["step"])
        assert float(a["return_0"]) == pytest.approx(float(b["return_0"]), rel=0.02)
    logs = [[json.loads(x) for x in (o / "metrics.jsonl").open()] for o in (one.folder, out)]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        same = ("kind", "seed", "step")
        assert [a.get(n) for n in same] == [b.get(n) for n in same]
        if a["kind"] == "fit":
            assert a["score"] == pytest.approx(b["score"], rel=0.02)
    # What was trained is to be had by the run's rows, whichever process had them.
    last = {int(line["seed"]): line for line in tables[1] if line["step"] == "300"}
    episodes = [name for name in last[0] if re.fullmatch(r"return_\d+", name)]
    for row, (process, place) in enumerate([(0, 0), (0, 1), (1, 0)]):
        policy = load_policy(out, row, "last")
        returns = [float(last[row][name]) for name in episodes]
        assert (policy.seed, policy.step) == (row, 300)
        assert policy.score == pytest.approx(np.mean(returns), rel=1e-9)
        path = checkpoints(out, process)[-1]
        leaves = serialization.read(
            path, serialization.read_meta(path), lambda name: "model/params" in name
        )
        model = load_model(out, row)
        for name, leaf in serialization.flatten(model.model.params).items():
            np.testing.assert_array_equal(leaf, leaves[f"learners/model/params/{name}"][place])
    with pytest.raises(UsageError, match="holds a run of 2 processes, and this is one of 1"):
        train(run, out, quiet=True)


@pytest.fixture
def third_of_four(monkeypatch):
    """The bytes that this process, number 2 of 4, tells the others; they answer with theirs."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    said, answers = [], []

    def exchange(data):
        said.append(data)
        return np.stack([data if a is None else a for a in answers])

    monkeypatch.setattr(distributed, "_exchange", exchange)
    return said, answers


def test_shares_are_equal_and_in_order(third_of_four):
    for rows in range(4, 20):
        shares = [distributed.share(rows, i) for i in range(4)]
        assert [r for s in shares for r in s] == list(range(rows))
        sizes = [len(s) for s in shares]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert distributed.share(10) == range(6, 8)
    with pytest.raises(UsageError, match="4 processes for 3 learners"):
        distributed.share(3)


def test_gathered_rows_are_in_order_and_exact(third_of_four):
    said, answers = third_of_four
    rows = {"a": np.arange(6) / 3, "b": np.arange(12, dtype=np.int32).reshape(6, 2)}

    def part(i):
        share = distributed.share(6, i)
        return {name: x[share.start : share.stop] for name, x in rows.items()}

    for i in range(4):  # what each would say
        answers[:] = [None] * 4
        distributed.gather(part(i), 6)
    answers[:] = [said[0], said[1], None, said[3]]
    found = distributed.gather(part(2), 6)
    for name, x in rows.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)


def test_other_flags_are_noticed(third_of_four):
    said, answers = third_of_four
    answers[:] = [None] * 4
    distributed.check_same("steps 100")
    distributed.check_same("steps 200")
    answers[:] = [said[0], said[0], None, said[1]]
    with pytest.raises(UsageError, match="process 3 was started with other flags"):
        distributed.check_same("steps 100")


@pytest.mark.parametrize(
    "flag",
    ["", "2", "0/2", "0/2@host", "x/2@host:80", "0/2@:80", "0/2@host:p", "2/2@host:80", "auto"],
)
def test_a_wrong_flag_gets_one_line(flag):
    with pytest.raises(UsageError, match="--process=") as caught:
        distributed.connect(flag)
    assert "\n" not in str(caught.value) and "I/N@HOST:PORT" in str(caught.value)
