"""Several processes of one run, including two real ones on this machine."""

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
from sizes import as_flags
from test_run import SETTINGS as RUN_SETTINGS
from test_run import _text, finish, start, wait_for

# With large minibatches the run lasts long enough to be interrupted.
SETTINGS = RUN_SETTINGS | {"learn.batch": 3000}
FLAGS = [
    "--env=Pendulum-v1",
    "--preset=paper",
    "--fix=scale,target",
    "--seeds=3",
    "--steps=400",
    *as_flags(SETTINGS),
]


def start_two(out: Path, *more: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(out, f"--process={i}/2@127.0.0.1:{port}", *more, command=FLAGS) for i in range(2)]


def wait_for_step(out: Path, step: int, two: list[subprocess.Popen]) -> None:
    for process in two:
        wait_for(lambda: f",{step}," in _text(out / "eval.csv"), process)


def checkpoints(out: Path, process: int) -> list[Path]:
    return sorted((out / "checkpoints" / f"process-{process}").glob("*-step-*"))


def assert_same_logs(one: Path, two: Path) -> None:
    """Check that a run of one process and a run of two have the same logs up to rounding."""
    tables = [list(csv.DictReader((o / "eval.csv").open())) for o in (one, two)]
    assert len(tables[1]) == 12
    for a, b in zip(*tables, strict=True):
        assert (a["variant"], a["seed"], a["step"]) == (b["variant"], b["seed"], b["step"])
        assert float(a["return_0"]) == pytest.approx(float(b["return_0"]), rel=0.02)
    logs = [[json.loads(x) for x in (o / "metrics.jsonl").open()] for o in (one, two)]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        same = ("kind", "seed", "step")
        assert [a.get(n) for n in same] == [b.get(n) for n in same]
        if a["kind"] == "fit":
            assert a["holdout_mse"] == pytest.approx(b["holdout_mse"], rel=0.02)


def assert_networks_by_learner(out: Path) -> None:
    """Check that policies and models are found by learner, whichever process trained them."""
    lines = list(csv.DictReader((out / "eval.csv").open()))
    last = {int(line["seed"]): line for line in lines if line["step"] == "400"}
    episodes = [name for name in last[0] if re.fullmatch(r"return_\d+", name)]
    for learner, (process, place) in enumerate([(0, 0), (0, 1), (1, 0)]):
        policy = load_policy(out, learner, "last")
        returns = [float(last[learner][name]) for name in episodes]
        assert (policy.seed, policy.step) == (learner, 400)
        assert policy.score == pytest.approx(np.mean(returns), rel=1e-9)
        path = checkpoints(out, process)[-1]
        leaves = serialization.read(
            path, serialization.read_meta(path), lambda name: "model/params" in name
        )
        model = load_model(out, learner)
        for name, leaf in serialization.flatten(model.model.params).items():
            np.testing.assert_array_equal(leaf, leaves[f"learners/model/params/{name}"][place])


def test_two_interrupted_and_killed_processes_match_one(tmp_path):
    """Train learners 0 and 1, and learner 2; rounding differs because the batch sizes differ."""
    out = tmp_path / "run"
    two = start_two(out)
    wait_for_step(out, 100, two)
    for i, process in enumerate(two):
        wait_for(lambda i=i: any(checkpoints(out, i)), process)
    time.sleep(0.3)
    two[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in two]
    assert [code for code, *_ in ends] == [exit_status.INTERRUPTED] * 2, ends
    assert "3 learners in 2 processes" in ends[0][1] and "learners" not in ends[1][1]
    saved = [checkpoints(out, i) for i in range(2)]
    names = [[path.name for path in paths] for paths in saved]
    assert names[0] == names[1] and len(names[0]) == 2
    # Simulate that this process was killed before it could save.
    shutil.rmtree(saved[1][1])

    # The processes stop up to 100 steps after the signal. An evaluation that the first ones have
    # recorded would not show that the next ones have joined each other.
    steps = [int(name.rpartition("-")[2]) for name in names[0]]
    assert steps[1] < 300
    # With 400 steps process 0 may have taken its last step before the other one is killed.
    two = start_two(out, "--steps=600")
    wait_for_step(out, steps[1] // 100 * 100 + 100, two)
    two[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    (code, printed, err), _ = (finish(process) for process in two)
    assert time.monotonic() - begin < 60
    assert f"resuming from step {steps[0]}" in printed
    assert code not in (0, exit_status.INTERRUPTED)
    assert "another process of this run has ended" in err or "another task died" in err

    ends = [finish(process) for process in start_two(out)]
    assert [code for code, *_ in ends] == [0, 0], ends
    assert "resuming" in ends[0][1] and "report" in ends[0][1] and "report" not in ends[1][1]
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"process-0", "process-1"}

    run = settings.make(
        "Pendulum-v1", preset="paper", fixes=["scale,target"], seeds=3, steps=400, settings=SETTINGS
    )
    one = train(run, tmp_path / "one", quiet=True)
    assert one.learner_indices == range(3)
    extra = {p.name for p in out.iterdir()} - {p.name for p in one.folder.iterdir()}
    assert extra == {"report.html", "curves.png"}
    assert_same_logs(one.folder, out)
    assert_networks_by_learner(out)
    with pytest.raises(UsageError, match="contains a run with 2 processes, but this run has 1"):
        train(run, out, quiet=True)


@pytest.fixture
def third_of_four(monkeypatch):
    """Make this process number 2 of 4; return the bytes that it sends and a list of their answers."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    sent, answers = [], []

    def exchange(data):
        sent.append(data)
        return np.stack([data if a is None else a for a in answers])

    monkeypatch.setattr(distributed, "_exchange", exchange)
    return sent, answers


def test_learners_are_shared_equally_and_in_order(third_of_four):
    for learners in range(4, 20):
        shares = [distributed.share(learners, i) for i in range(4)]
        assert [i for s in shares for i in s] == list(range(learners))
        sizes = [len(s) for s in shares]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert distributed.share(10) == range(6, 8)
    with pytest.raises(UsageError, match="4 processes for 3 learners"):
        distributed.share(3)


def test_gather_is_exact_and_in_order(third_of_four):
    sent, answers = third_of_four
    arrays = {"a": np.arange(6) / 3, "b": np.arange(12, dtype=np.int32).reshape(6, 2)}

    def part(i):
        share = distributed.share(6, i)
        return {name: x[share.start : share.stop] for name, x in arrays.items()}

    for i in range(4):  # what each process would send
        answers[:] = [None] * 4
        distributed.gather(part(i), 6)
    answers[:] = [sent[0], sent[1], None, sent[3]]
    found = distributed.gather(part(2), 6)
    for name, x in arrays.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)


def test_processes_with_different_flags_are_refused(third_of_four):
    sent, answers = third_of_four
    answers[:] = [None] * 4
    distributed.check_same("steps 100")
    distributed.check_same("steps 200")
    answers[:] = [sent[0], sent[0], None, sent[1]]
    with pytest.raises(UsageError, match="process 3 was started with other flags"):
        distributed.check_same("steps 100")


@pytest.mark.parametrize(
    "flag",
    ["", "2", "0/2", "0/2@host", "x/2@host:80", "0/2@:80", "0/2@host:p", "2/2@host:80", "auto"],
)
def test_invalid_process_flag_is_refused(flag):
    with pytest.raises(UsageError, match="--process=") as caught:
        distributed.connect(flag)
    assert "\n" not in str(caught.value) and "I/N@HOST:PORT" in str(caught.value)
