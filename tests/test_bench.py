"""The benchmark command, and how its measurements alternate."""

import contextlib
import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import flags

import dynajax
import scripts
from dynajax import envs
from dynajax.cli import common
from dynajax.profiling import benchmark
from dynajax.types import UsageError
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
        # A fit donates no memory, because it can be abandoned.
        assert float(by_stage["program learn"]["donated"]) > 0.95
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
        ("--env=", "--env=: name at least one task"),
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


# --- Numbers that are missing --------------------------------------------------------------------


@pytest.fixture
def command():
    """Return the module of the command, with its flags at their defaults."""
    with scripts.loaded(ROOT / "experiments" / "bench.py") as module:
        flags.FLAGS.mark_as_parsed()
        yield module


@pytest.mark.parametrize(
    ("algo", "fixes"),
    [("mbpo", "scale,target"), ("dynajax", "scale,auto,beta"), ("model-free", "none")],
)
def test_model_has_the_fixes_of_the_algorithm(command, monkeypatch, algo, fixes):
    monkeypatch.setattr(flags.FLAGS["algo"], "value", algo)
    assert [v.name for v in command._make_config("cheetah-run", 1).variants] == [fixes]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], ()),
        (["model.epochs=2"], ("model.fit_steps=500,", "is an upper bound\n")),
        (["model.schedule=early_stop"], ("model.fit_steps=500,", "bound; the evaluations between")),
        (["model.epochs=2", "algo"], ()),
    ],
)
def test_limit_of_a_fit_is_named_where_a_fit_may_end_before(
    command, monkeypatch, tmp_path, capsys, settings, words
):
    monkeypatch.setattr(command, "Workload", lambda config: SimpleNamespace(config=config))
    monkeypatch.setattr(command, "_fits_into_memory", lambda work: True)
    monkeypatch.setattr(command, "measure", lambda work, seconds: [])
    method = ["--algo=model-free"] if "algo" in settings else [f"--set={x}" for x in settings]
    arguments = ["--preset=quick", f"--out={tmp_path}", *method]
    assert scripts.run(command, monkeypatch, *arguments) == 0
    text = capsys.readouterr().out
    assert ("a fit counts with its limit" in text) == bool(words)
    for word in words:
        assert word in text


def test_evaluation_stage_outlasts_an_episode():
    """dm_control's reward is None after the last step of an episode, which float() refuses."""
    config = dynajax.make_config("pendulum-swingup", settings={"eval.episodes": 2})
    work = object.__new__(benchmark.Workload)
    work.config, work._state, work._stack = config, None, contextlib.ExitStack()
    work.program = SimpleNamespace(
        deterministic_action=lambda state, obs: np.zeros((1, 2, 1), np.float32),
        placement=SimpleNamespace(unpad=lambda x: x),
    )
    limit = envs.spec(config.env, **config.stepping).time_limit
    with work._stack:
        run = work._evaluation()
        for _ in range(limit // benchmark._EVAL_STEPS + 2):
            run()


def test_step_after_the_end_of_an_episode_is_refused():
    env = envs.make("pendulum-swingup")
    env.reset(seed=0)
    env._env._step_limit = 2
    for _ in range(2):
        *_, truncated, _ = env.step(np.zeros(1))
    assert truncated
    with pytest.raises(RuntimeError, match=r"after the end of an episode; call reset\(\) first"):
        env.step(np.zeros(1))


def test_platform_without_memory_figures(command, tmp_path):
    compiled = jax.jit(lambda x: x + 1).lower(np.ones(3, np.float32)).compile()
    without = SimpleNamespace(memory_analysis=lambda: None, as_text=compiled.as_text)
    known, unknown = (benchmark.program_properties(p, set()) for p in (compiled, without))
    assert known.state_bytes == 12 and unknown.state_bytes is unknown.donated is None
    assert dynajax.xla.backend.needed(without) == 0
    lines = [
        {"env": "walk", "learners": 1, "stage": "program learn", **properties._asdict()}
        for properties in (known, unknown)
    ]
    assert "0.0 MiB of state per learner" in command.format_line(lines[0])
    assert "- MiB of state per learner, - of temporaries, - donated" in command.format_line(
        lines[1]
    )
    command.write(lines, tmp_path)
    with (tmp_path / "bench.csv").open(newline="") as file:
        assert [line["donated"] for line in csv.DictReader(file)] == ["0", ""]
    assert not (tmp_path / "bench.png").exists()  # there is nothing to draw


def test_table_that_was_cut_off_or_is_another(command, tmp_path):
    path = tmp_path / "bench.csv"
    path.write_text("env,learners,stage,ms,x_ideal\nwalk,1,act,2,4\nwalk,1,fit,\nwalk,1,learn\n")
    old = command.read_table(path)
    lines = [
        {"env": "walk", "learners": 1, "stage": stage, "ms": 1.0, "x_ideal": 2.0}
        for stage in ("act", "fit", "learn", "new")
    ]
    first, *rest = command.compare(lines, old, path).splitlines()[1:]
    assert first.split()[-4:] == ["2.000", "1.000", "2.00x", "2.00x"] and not rest
    path.write_text("env,learners,stage,ms\nwalk,1,act,2\n")  # an older table without a column
    assert command.compare(lines, command.read_table(path), path).endswith("2.00x         ")
    for text in ("a,b\n1,2\n", "env,learners,stage,ms\nwalk,1,act,fast\n"):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"--compare=.*not a table of this benchmark"):
            command.read_table(path)


@pytest.mark.parametrize(
    ("status", "out", "err", "reason"),
    [
        (0, "", "", "printed no times"),
        (0, "{}{", "", "printed no times"),
        (0, '{"task": null}', "", "printed no times"),
        (-9, "", "", r"\(exit status -9\): it printed no times"),
        (2, "", "error: --env=x: no such task\n", "--env=x: no such task"),
    ],
)
def test_start_of_a_process_that_fails(command, status, out, err, reason):
    done = subprocess.CompletedProcess([], status, out, err)
    with pytest.raises(UsageError, match=f"--start: .*{reason}"):
        command._probed(done)
    done = subprocess.CompletedProcess([], 0, 'a line\n{"task": 1}\n', "")
    assert command._probed(done) == {"task": 1.0}


def test_help_lists_no_internal_flag(command):
    text = common.help_text(command.main)
    assert "--probe" not in text and "--compare" in text
    for name in (*dynajax.AGENTS, *dynajax.TRUST):
        assert name in text


def test_kernels_are_those_of_the_newest_trace(tmp_path, monkeypatch):
    """Trace twice into one folder, which the profiler does not clear."""
    for second, name in ((2, "b"), (1, "a")):
        path = tmp_path / "plugins" / name / "host.xplane.pb"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (second, second))

    def read(path):
        kernel = SimpleNamespace(name=Path(path).parent.name, duration_ns=3e6)
        line = SimpleNamespace(name="Stream #1", events=[kernel])
        return SimpleNamespace(planes=[SimpleNamespace(name="/device:GPU:0", lines=[line])])

    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", read)
    with scripts.loaded(ROOT / "results/scripts/trace.py") as trace:
        assert trace.kernels(tmp_path) == {"b": [3.0]}
        assert trace.kernels(tmp_path / "nothing") == {}
