"""The benchmark command, and how it takes turns."""

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynajax.profiling import benchmark

ROOT = Path(__file__).parents[1]


def test_interleaving_takes_turns_and_times_what_comes_after_itself():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = benchmark.interleave(runs, 0, least=4)
    turns = ["".join(turn) for _, turn in itertools.groupby(order)]
    assert [turn[0] for turn in turns] == list("abc") * 6  # two rounds to warm up
    assert min(map(len, turns)) > 1
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
    from conftest import SMALL

    out = tmp_path_factory.mktemp("bench")
    settings = []
    for name, value in SMALL.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        settings += ["--set", f"{name}={text}"]
    done = bench(
        "--env=pendulum-swingup",
        "--rows=1,2",
        "--seconds=0.01",
        f"--out={out}",
        *settings,
    )
    assert done.returncode == 0, done.stderr
    with (out / "bench.csv").open(newline="") as file:
        return out, done.stdout, list(csv.DictReader(file)), settings


def test_bench_measures_every_stage(table):
    out, text, lines, _ = table
    for rows in ("1", "2"):
        here = {line["stage"]: line for line in lines if line["rows"] == rows}
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
            assert float(here[stage]["ms"]) > 0, stage
        whole = here["environment step"]
        assert float(whole["ms"]) > float(here["acting and learning"]["ms"])
        for stage in ("fit step", "agent update"):
            line = here[stage]
            rate = 1e3 * float(line["gflop"]) / float(line["ms"])
            assert float(line["gflops"]) == pytest.approx(rate, rel=1e-3)
            assert float(line["of_peak"]) * float(line["x_ideal"]) == pytest.approx(1, rel=1e-3)
        # A lone row on several cores keeps its memory while they fit its model.
        shared = rows == "1" and len(os.sched_getaffinity(0)) > 1
        for name in ("learn",) if shared else ("learn", "fit"):
            assert float(here[f"program {name}"]["donated"]) > 0.95
        assert here["program learn"]["ring_copies"] == "0"
        learn, loop = (float(here[n]["gflop"]) for n in ("learn", "acting and learning"))
        update, rollout = (float(here[n]["gflop"]) for n in ("agent update", "rollout"))
        assert learn == pytest.approx(2 * update + rollout, rel=1e-4)
        act, fit_step = (float(here[n]["gflop"]) for n in ("act", "fit step"))
        assert loop == pytest.approx(learn + act, rel=1e-4)
        # Twenty steps of a fit in 250 environment steps.
        assert float(whole["gflop"]) == pytest.approx(loop + fit_step * 20 / 250, rel=1e-4)
    assert float(here["agent update"]["gflop"]) == pytest.approx(
        2 * float(next(x for x in lines if x["stage"] == "agent update")["gflop"]), rel=1e-4
    )
    assert "program learn" in text
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_bench_compares_and_times_a_start(table, tmp_path):
    _, _, lines, settings = table
    slower = tmp_path / "old.csv"
    with slower.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        # Tables from before there were agents to choose say SAC.
        writer.writerows(
            {
                **line,
                "ms": 100 * float(line["ms"] or 0),
                "stage": line["stage"].replace("agent update", "SAC update"),
            }
            for line in lines
        )
    done = bench(
        "--env=pendulum-swingup",
        "--rows=1",
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
    ("flag", "says"),
    [
        ("--rows=0", "--rows=0: whole numbers from 1"),
        ("--env=cheeta-run", "the nearest is cheetah-run"),
        ("--compare=nothing.csv", "--compare=nothing.csv: there is no such file"),
        ("--set=sac.utd=3", "it is learn.utd now"),
        ("--agent=nobody", "--agent=nobody"),
        ("--trust=blind", "--trust=blind"),
    ],
)
def test_bench_refuses_in_one_line(flag, says, tmp_path):
    done = (
        bench(flag, "--env=cheetah-run", f"--out={tmp_path}") if "env" not in flag else bench(flag)
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
