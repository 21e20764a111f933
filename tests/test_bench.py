"""The counts of floating-point operations, and the benchmark command."""

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynajax import config, replay
from dynajax.agents import sac
from dynajax.measure import benchmark, flops
from dynajax.models import ensemble, rollouts
from dynajax.types import EnvSpec

ROOT = Path(__file__).parents[1]
SPEC = EnvSpec("cheetah", 17, 6, 1000, (), None)
PAPER = config.PAPER


def counted(function, *shapes):
    """XLA's own count, from shapes alone."""
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def test_counts_are_those_of_xla():
    """The elementwise work, which only XLA counts, is a few per cent."""
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    agent = jax.eval_shape(lambda k: sac.init(PAPER.sac, SPEC, k), key)
    model = jax.eval_shape(lambda k: ensemble.init(PAPER.model, SPEC, k), key)
    ring = jax.eval_shape(lambda: replay.init(256, 17, 6).data)
    noise = jax.ShapeDtypeStruct((2, 256, 6), jnp.float32)
    found = counted(lambda *a: sac.update(PAPER.sac, *a), agent, ring, noise)
    assert 1 < found / flops.sac_update(PAPER, SPEC) < 1.04

    inputs, z = (jax.ShapeDtypeStruct((7, 256, n), jnp.float32) for n in (23, 18))
    gradient = jax.grad(ensemble.loss, argnums=1)
    found = counted(lambda p, x, z: gradient(PAPER.model, p, x, z, 0.0), model.params, inputs, z)
    assert 1 < found / flops.fit_step(PAPER, SPEC) < 1.04

    obs = jax.ShapeDtypeStruct((400, 17), jnp.float32)
    found = counted(lambda *a: rollouts.imagine(PAPER, SPEC, *a), agent, model, obs, key)
    assert 1 < found / flops.rollout(PAPER, SPEC) < 1.06


def test_counts_by_hand():
    small = config.assign(config.assign(PAPER, "sac.hidden", (2,)), "sac.batch", 5)
    spec = EnvSpec("x", 3, 1, 10, (), None)
    # Networks 3-2-2 and 4-2-1, an operation being a multiplication or an addition.
    actor, critic = 2 * 5 * (3 * 2 + 2 * 2), 2 * 5 * (4 * 2 + 2 * 1)
    actor_first, critic_first = 2 * 5 * 3 * 2, 2 * 5 * 4 * 2
    expected = (
        (actor + 2 * critic)  # the target
        + 2 * (3 * critic - critic_first)  # the critics' loss
        + (3 * actor - actor_first)  # the actor's loss, the actor
        + 2 * 2 * critic  # and through the critics to the action
    )
    assert flops.sac_update(small, spec) == expected


def test_whole_step_is_the_sum_of_its_parts():
    parts = 20 * flops.sac_update(PAPER, SPEC) + 20 * flops.fit_step(PAPER, SPEC)
    parts += flops.rollout(PAPER, SPEC) + flops.act(PAPER, SPEC)
    assert flops.environment_step(PAPER, SPEC) == parts
    assert 35e9 < parts < 45e9  # the "about 40 GFLOP" of cheetah


def test_interleaving_takes_turns_and_times_what_comes_after_itself(monkeypatch):
    monkeypatch.setattr(benchmark, "_LEAD", 0.002)
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
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
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
        "--env=pendulum-swingup", "--rows=1,2", "--seconds=0.01", f"--out={out}", *settings
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
            "SAC update",
            "learn",
            "evaluation step",
            "checkpoint",
            "environment step",
        ):
            assert float(here[stage]["ms"]) > 0, stage
        whole, loop = (here[n] for n in ("environment step", "acting and learning"))
        assert float(whole["ms"]) > float(loop["ms"])
        for stage in ("fit step", "SAC update"):
            line = here[stage]
            rate = 1e3 * float(line["gflop"]) / float(line["ms"])
            assert float(line["gflops"]) == pytest.approx(rate, rel=1e-3)
            assert float(line["of_peak"]) * float(line["x_ideal"]) == pytest.approx(1, rel=1e-3)
        # A lone row on several cores keeps its memory while they fit its model.
        shared = rows == "1" and len(os.sched_getaffinity(0)) > 1
        for name in ("learn",) if shared else ("learn", "fit"):
            assert float(here[name]["donated"]) > 0.95
        assert here["learn"]["ring_copies"] == "0"
    assert float(here["SAC update"]["gflop"]) == pytest.approx(
        2 * float(next(x for x in lines if x["stage"] == "SAC update")["gflop"]), rel=1e-4
    )
    assert "program learn" in text
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_warm_start_compiles_less(table):
    _, _, lines, _ = table
    seconds = {line["stage"]: float(line["ms"]) for line in lines if " start: " in line["stage"]}
    cold, warm = (seconds[f"{name} start: compile fit and learn"] for name in ("cold", "warm"))
    assert warm < 0.8 * cold


def test_bench_compares(table, tmp_path):
    _, _, lines, settings = table
    slower = tmp_path / "old.csv"
    with slower.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows({**line, "ms": 100 * float(line["ms"] or 0)} for line in lines)
    done = bench(
        "--env=pendulum-swingup",
        "--rows=1",
        "--seconds=0.01",
        "--nostart",
        "--algo=sac",
        f"--out={tmp_path}",
        f"--compare={slower}",
        *settings,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("pendulum-swingup 1: SAC up"))
    old, new, faster = (float(x.rstrip("x")) for x in line.split()[-4:-1])
    assert faster == pytest.approx(old / new, rel=0.1)
    assert faster > 10


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--rows=0", "--rows=0: whole numbers from 1"),
        ("--env=cheeta-run", "the nearest is cheetah-run"),
        ("--compare=nothing.csv", "--compare=nothing.csv: there is no such file"),
        ("--set=sac.utd=x", "sac.utd"),
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


def test_flops_are_whole_numbers():
    assert isinstance(flops.environment_step(PAPER, SPEC), int)
    assert np.isclose(flops.fit_step(PAPER, SPEC), 1.4e9, rtol=0.01)
