"""What a run shows: the first lines, one line per evaluation, the time left, where time went."""

import fcntl
import importlib
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import jax
import numpy as np
import pytest

import dynajax
import fake_runs
import scripts
from dynajax.runs import progress
from dynajax.runs.progress import Progress
from dynajax.runtime.timers import STAGES, Clock
from dynajax.types import Evaluation
from pages import ROOT
from sizes import NETWORKS, SMALL_OF_ANY

STEP, FIT, EVALUATION = 0.5, 8.0, 20.0  # seconds


@pytest.fixture
def config(make):
    settings = {"eval.every": 100, "model.fit_every": 50, "eval.episodes": 2}
    return make(settings, steps=400)


@pytest.fixture
def passing(monkeypatch):
    """Replace the clock of `progress`, and return a function that lets time pass."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def play(config, display, passing):
    """Go through a run; yield the true remaining seconds before each step."""
    total = 0.0
    events = []
    for step in range(config.steps):
        due = dynajax.schedule.due(config, step)
        seconds = STEP * bool(due.learn) + FIT * bool(due.fit)
        events.append((step + 1, seconds, bool(due.evaluate)))
        total += seconds + EVALUATION * bool(due.evaluate)
    display.begin(0)
    for step, seconds, evaluated in events:
        passing(seconds)
        display.update(step)
        total -= seconds
        if evaluated:
            passing(EVALUATION)
            total -= EVALUATION
            display.show_evaluation(step, Evaluation(np.full((1, 2), float(step)), None))
        yield step, total
    display.close()


def render(data: bytes) -> list[str]:
    """Return the lines that a terminal shows after it has received some bytes."""
    lines = []
    for line in data.decode().split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return [line for line in lines if line]


def received(controller: int) -> bytes:
    """Return what a terminal has received since the previous call."""
    data = b""
    while select.select([controller], [], [], 0)[0]:
        data += os.read(controller, 1 << 16)
    return data


def test_each_evaluation_keeps_its_line_on_a_terminal(config, passing, monkeypatch):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        display, data = Progress(config, quiet=False), b""
        display.print("first")
        during = None
        for step, _ in play(config, display, passing):
            stream.flush()
            data += received(controller)
            if step == 150:
                during = render(data)
        stream.flush()
        data += received(controller)
    os.close(controller)
    assert re.match(r"walk +\d+%\|.*\| \d+ of 400 steps, about \d+ min", during[-1]), during
    lines = render(data)
    assert lines[0] == "first"
    assert [line.split("  ")[0] for line in lines[1:]] == [
        f"step {n}/400" for n in range(100, 401, 100)
    ]
    assert lines[-1] == "step 400/400  return 400.0  finishing"


@pytest.mark.parametrize(
    ("returns", "text"),
    [
        ([400.0], "400.0"),
        ([1630.0, 1632.0], "1631.0 ± 1.0"),
        ([-1.234, -1.434], "-1.33 ± 0.10"),
        ([0.00123, 0.00125], "0.00124 ± 0.00001"),
        ([0.0, 0.0], "0.0 ± 0.0"),
        ([np.nan, 1.0], "nan ± nan"),
    ],
)
def test_printed_returns_keep_the_digits_of_small_ones(returns, text):
    assert progress._format_returns(np.array(returns)) == text


def test_time_left_includes_fits_and_evaluations(config, passing, capsys):
    display, texts, errors = Progress(config, quiet=False), [], []
    for step, left in play(config, display, passing):
        texts.append(display.time_left())
        if step >= 200:
            errors.append(abs(display.seconds_left() - left))
    assert texts[80].endswith("and 4 evaluations left")
    assert max(errors) < 5 * STEP
    assert texts[-1] == "finishing" and not any(text.startswith("about 0") for text in texts)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("about ") and len(printed) == 5
    assert printed[-1] == "step 400/400  return 400.0  finishing"


def test_time_left_before_the_end_is_never_zero(config, passing):
    display = Progress(config, quiet=True)
    display.begin(0)
    for step in range(1, config.steps):
        passing(1e-4)
        display.update(step)
    assert display.time_left() == "about 1 s and 1 evaluation left"
    assert [progress.duration(s) for s in (0.6, 59.4, 59.7)] == ["1 s", "59 s", "1 min"]


def test_quiet_run_prints_nothing(config, passing, capsys):
    for _ in play(config, Progress(config, quiet=True), passing):
        pass
    assert capsys.readouterr() == ("", "")


# --- The first lines -----------------------------------------------------------------------------


def test_description_comes_before_anything_slow(config, tmp_path, monkeypatch, capsys):
    def slow(*arguments, **settings):
        printed.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    printed = []
    monkeypatch.setattr(importlib.import_module("dynajax.train").envs, "spec", slow)
    with pytest.raises(KeyboardInterrupt):
        dynajax.train(config, tmp_path / "run")
    first, second = printed[0].splitlines()
    assert first == f"walk, seed 0, in {tmp_path / 'run'}: {dynajax.algorithms.describe(config)}"
    assert second == "400 agent steps, 50 with random actions"


def test_notice_of_compilation_depends_on_the_cache():
    with_cache = progress.compilation_notice()
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        without = progress.compilation_notice()
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
    assert "a few seconds after that" in with_cache and "a few seconds" not in without


VIDEO = """
import dynajax
from dynajax.runs import video
video.check(dynajax.make_config("Pendulum-v1"))
"""


def test_rendering_without_a_display_prints_no_error_of_sdl():
    hidden = ("XDG_RUNTIME_DIR", "DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", VIDEO], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "XDG_RUNTIME_DIR" not in done.stderr


# --- Where the time went -------------------------------------------------------------------------


def test_stages_sum_to_the_wall_time():
    begin = time.perf_counter()
    clock = Clock(begin - 2)
    clock.time_rest_as("other")
    with clock("fit"):
        time.sleep(0.02)
        with clock("checkpoint"):
            time.sleep(0.03)
            inside = clock.stages()
        time.sleep(0.01)
    stages = clock.stages()
    assert sum(stages.values()) == pytest.approx(time.perf_counter() - begin + 2, abs=0.005)
    assert stages["imports"] >= 2 and "evaluate" not in stages
    assert 0.03 <= inside["checkpoint"] <= stages["checkpoint"] < stages["fit"] + 0.03
    assert stages["fit"] >= 0.03 and stages["other"] < 0.02
    clock.restore({"update": 5.0, "fit": 1.0, "other": 3.0})  # as an older version wrote it
    assert clock.stages()["update"] == 5 and clock.stages()["fit"] == stages["fit"] + 1


def test_compilation_is_a_stage_of_its_own():
    inner = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c * 2, None), x, length=7)[0])
    clock = Clock()
    begin = time.perf_counter()
    with clock("act"):
        jax.jit(lambda x: inner(x) + inner(x + 1))(1.5)
    elapsed = time.perf_counter() - begin
    first = clock.stages()
    # The parts of inner functions are not counted twice.
    assert 0.3 * elapsed < first["compile"] <= elapsed
    assert first["act"] + first["compile"] == pytest.approx(elapsed, abs=0.005)


def test_stages_of_a_run_are_named(tmp_path):
    settings = SMALL_OF_ANY | NETWORKS["sac"] | {"eval.every": 60, "eval.episodes": 1}
    config = dynajax.make_config(
        "Pendulum-v1", agent="sac", preset="paper", settings=settings, steps=60
    )
    begin = time.perf_counter()
    dynajax.train(config, tmp_path, quiet=True)
    elapsed = time.perf_counter() - begin
    (line,) = dynajax.read_run(tmp_path).metrics["time"]
    seconds = line["seconds"]
    assert {"setup", "init", "compile", "act", "insert", "environment", "update", "fit"} < set(
        seconds
    )
    assert set(seconds) <= set(STAGES)
    assert line["wall_seconds"] == sum(seconds.values()) <= elapsed
    assert seconds["other"] < 0.2 * line["wall_seconds"]


@pytest.fixture
def command():
    with scripts.loaded(ROOT / "experiments" / "run.py") as module:
        yield module


@pytest.mark.parametrize(
    ("seeds", "interval"), [(1, "no interval, because it is one seed"), (3, "over 3")]
)
def test_summary_of_a_finished_run(command, config, tmp_path, seeds, interval):
    fake_runs.fake_run(tmp_path / "run", seeds=seeds)
    run = dynajax.read_run(tmp_path / "run")
    result = dynajax.Result(config, tmp_path / "run", None, range(seeds), True, 300)
    *returns, wall = command.summary(result, {"compile": 30.0, "fit": 68.6, "other": 1.4})
    assert len(returns) == len(run.evals)
    for line, values in zip(returns, run.evals.values(), strict=True):
        assert f"final return {values[:, -1].mean():,.1f}" in line and interval in line
    assert wall == "wall time 100.0 s: model fits 68.6 s, compilation 30.0 s, the rest 1.4 s"
    assert repr(result) == f"Result(walk, {tmp_path / 'run'}, finished=True)"
