"""The benchmark command, and how its measurements alternate."""

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynajax.profiling import benchmark
from sizes import SMALL, as_flags

ROOT = Path(__file__).parents[1]


def test_interleave_alternates_and_times_repeated_runs():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = benchmark.interleave(runs, 0, least=4)
    blocks = ["".join(block) for _, block in itertools.groupby(order)]
    assert [block[0] for block in blocks] == list("abc") * 6  # two rounds to warm up
    assert min(map(len, blocks)) > 1
    assert [s.shape for s in seconds.values()] == [(4,)] * 3


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "experiments/bench.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    out, settings = tmp_path_factory.mktemp("bench"), as_flags(SMALL)
    done = bench(
        "--env=pendulum-swingup",
        "--learners=1,2",
        "--seconds=0.01",
        f"--out={out}",
        *settings,
    )
    assert done.returncode == 0, done.stderr
    with (out / "bench.csv").open(newline="") as file:
        return out, done.stdout, list(csv.DictReader(file)), settings


def test_bench_measures_every_stage(table):
    out, text, lines, _ = table
    for learners in ("1", "2"):
        by_stage = {line["stage"]: line for line in lines if line["learners"] == learners}
        for stage in (
            "host step",
            "act",
            "insert",
            "rollout",
            "fit step",
            "fit, fixed part",
            "agent update",
            "learn",
            "evaluation step",
            "checkpoint",
            "environment step",
        ):
            assert float(by_stage[stage]["ms"]) > 0, stage
        whole = by_stage["environment step"]
        assert float(whole["ms"]) > float(by_stage["acting and learning"]["ms"])
        for stage in ("fit step", "agent update"):
            line = by_stage[stage]
            rate = 1e3 * float(line["gflop"]) / float(line["ms"])
            assert float(line["gflops"]) == pytest.approx(rate, rel=1e-3)
            assert float(line["of_peak"]) * float(line["x_ideal"]) == pytest.approx(1, rel=1e-3)
        # With one learner on several cores the fit runs on all of them and donates no memory.
        shared = learners == "1" and len(os.sched_getaffinity(0)) > 1
        for name in ("learn",) if shared else ("learn", "fit"):
            assert float(by_stage[f"program {name}"]["donated"]) > 0.95
        assert by_stage["program learn"]["ring_copies"] == "0"
        learn, loop = (float(by_stage[n]["gflop"]) for n in ("learn", "acting and learning"))
        update, rollout = (float(by_stage[n]["gflop"]) for n in ("agent update", "rollout"))
        assert learn == pytest.approx(2 * update + rollout, rel=1e-4)
        act, fit_step = (float(by_stage[n]["gflop"]) for n in ("act", "fit step"))
        assert loop == pytest.approx(learn + act, rel=1e-4)
        # A fit has 20 gradient steps, every 250 environment steps.
        assert float(whole["gflop"]) == pytest.approx(loop + fit_step * 20 / 250, rel=1e-4)
    assert float(by_stage["agent update"]["gflop"]) == pytest.approx(
        2 * float(next(x for x in lines if x["stage"] == "agent update")["gflop"]), rel=1e-4
    )
    assert "program learn" in text
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_bench_compares_with_old_table_and_times_start(table, tmp_path):
    _, _, lines, settings = table
    slower = tmp_path / "old.csv"
    with slower.open("w", newline="") as file:
        # Older tables have other names for a column and for a stage.
        columns = ["rows" if name == "learners" else name for name in lines[0]]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for line in lines:
            old = {
                **line,
                "rows": line["learners"],
                "ms": 100 * float(line["ms"] or 0),
                "stage": line["stage"].replace("agent update", "SAC update"),
            }
            writer.writerow({name: old[name] for name in columns})
    done = bench(
        "--env=pendulum-swingup",
        "--learners=1",
        "--seconds=0.01",
        "--algo=model-free",
        "--start",
        f"--out={tmp_path}",
        f"--compare={slower}",
        *settings,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("pendulum-swingup 1: agent up"))
    old, new, faster = (float(x.rstrip("x")) for x in line.split()[-4:-1])
    assert faster == pytest.approx(old / new, rel=0.1)
    assert faster > 10
    with (tmp_path / "bench.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    seconds = {line["stage"]: float(line["ms"]) for line in lines if " start: " in line["stage"]}
    cold, warm = (seconds[f"{name} start: compile fit and learn"] for name in ("cold", "warm"))
    assert warm < 0.8 * cold


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--learners=0", "--learners=0: whole numbers from 1"),
        ("--env=cheeta-run", "the nearest is cheetah-run"),
        ("--compare=nothing.csv", "--compare=nothing.csv: there is no such file"),
        ("--set=sac.utd=3", "the nearest is learn.utd"),
        ("--agent=nobody", "--agent=nobody"),
        ("--trust=blind", "--trust=blind"),
    ],
)
def test_bench_refuses_in_one_line(flag, message, tmp_path):
    done = (
        bench(flag, "--env=cheetah-run", f"--out={tmp_path}") if "env" not in flag else bench(flag)
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
