"""Signals: what they interrupt, what is saved, and that a resumed run equals an uninterrupted one."""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium.envs.classic_control import PendulumEnv

import dynajax
import scripts
from dynajax import UsageError
from dynajax.cli import common
from dynajax.engines.data_checks import DataChecks
from dynajax.envs.vector import VectorEnv
from dynajax.runtime import distributed, exit_status, signals
from sizes import NETWORKS, SMALL_OF_ANY

RUN = Path(__file__).parents[1] / "experiments" / "run.py"


class Alarm(PendulumEnv):
    """A task that sends this process a signal at a chosen step."""

    steps = 0  # of all environments
    alarm = 0  # the step at which the signal is sent
    handlers: tuple[int, ...] = ()  # signals for which the constructor installs a handler
    heard: list[int]

    def __init__(self, **arguments):
        super().__init__(**arguments)
        for number in self.handlers:
            signal.signal(number, lambda number, _: Alarm.heard.append(number))

    def step(self, action):
        Alarm.steps += 1
        if Alarm.steps == Alarm.alarm:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(action)


gymnasium.register("Alarm-v0", Alarm, max_episode_steps=20)


@pytest.fixture(autouse=True)
def no_alarm(monkeypatch):
    for name, value in {"steps": 0, "alarm": 0, "handlers": (), "heard": []}.items():
        monkeypatch.setattr(Alarm, name, value, raising=False)


def make(env="test_interruption:Alarm-v0", **arguments):
    settings = SMALL_OF_ANY | NETWORKS["sac"]
    settings |= {"random_steps": 10, "eval.every": 20, "eval.episodes": 2, "model.fit_every": 10}
    arguments = {"agent": "sac", "preset": "paper", "steps": 40} | arguments
    settings |= arguments.pop("settings", {})
    return dynajax.make_config(env, settings=settings, **arguments)


def assert_same_run(first: dynajax.train, second: dynajax.train) -> None:
    """Assert that two runs have the same evaluations, metrics and state, except for wall times."""
    times = ("wall_seconds", "steps_per_second", "seconds")
    logs = []
    for result in (first, second):
        lines = (result.folder / "metrics.jsonl").read_text().splitlines()
        metrics = [{k: v for k, v in json.loads(x).items() if k not in times} for x in lines]
        logs.append(((result.folder / "eval.csv").read_text(), metrics))
    assert logs[0] == logs[1]
    for a, b in zip(jax.tree.leaves(first.state), jax.tree.leaves(second.state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return dynajax.train(make(algo="model-free"), tmp_path_factory.mktemp("whole"), quiet=True)


# 20 steps of training and two episodes of 20 steps, twice.
@pytest.mark.parametrize(
    ("alarm", "saved", "checked"),
    [(5, 5, 0), (35, 20, 0), (60, 20, 20), (99, 40, 20), (120, 40, 40)],
)
def test_signal_is_heard_between_steps_of_training_and_evaluation(
    whole, tmp_path, monkeypatch, alarm, saved, checked
):
    class Recorded(DataChecks):
        def __init__(self, program, step):
            begun.append(step)
            super().__init__(program, step)

    begun = []
    monkeypatch.setattr(sys.modules["dynajax.train"], "DataChecks", Recorded)
    config = make(algo="model-free")
    Alarm.alarm = alarm
    first = dynajax.train(config, tmp_path, quiet=True)
    assert Alarm.steps <= alarm + 1  # the other episode's step
    assert not first.finished or alarm == 120
    assert first.saved_step == saved
    second = dynajax.train(config, tmp_path, quiet=True)
    assert second.finished and second.saved_step == 40
    assert_same_run(second, whole)
    # An interval whose end was not checked is checked as a whole.
    assert begun == [0, checked]


def interrupt_wait(monkeypatch: pytest.MonkeyPatch, number: int) -> list:
    """Send a signal during the given call of `signals.wait`, during a fit or an evaluation.

    Returns:
      A list to which that call adds the tree that it would wait for.
    """
    real, calls, trees = signals.wait, itertools.count(), []

    def wait(tree, check=None):
        if check is not None and next(calls) == number:
            trees.append(tree)
            os.kill(os.getpid(), signal.SIGTERM)
            check()
        return real(tree, check)

    monkeypatch.setattr(signals, "wait", wait)
    return trees


@pytest.fixture(scope="module")
def whole_of_engine(tmp_path_factory):
    """Return a function of the engine: an uninterrupted run with fits at steps 50, 60 and 70."""
    results = {}

    def run(engine):
        if engine not in results:
            config = model_based(engine)
            folder = tmp_path_factory.mktemp(engine)
            results[engine] = config, dynajax.train(config, folder, quiet=True)
        return results[engine]

    return run


def model_based(engine):
    env = {"host": "test_plugins:Spring-v0", "mjx": "test_plugins:Spring"}[engine]
    settings = {"learn.reset_at": (60,), "random_steps": 50, "eval.episodes": 1}
    return make(env, engine=engine, steps=80, settings=settings)


@pytest.mark.parametrize(
    ("engine", "wait", "step"),
    [
        ("host", 0, 50),  # the fit at step 50
        ("host", 1, 60),  # the fit at step 60, where the agent is reset
        ("mjx", 3, 60),  # the evaluation
        ("mjx", 4, 60),  # the fit at step 60
        ("mjx", 6, 80),  # the last evaluation
    ],
)
def test_interrupted_fit_or_evaluation_is_repeated(
    whole_of_engine, tmp_path, monkeypatch, engine, wait, step
):
    config, whole = whole_of_engine(engine)
    with monkeypatch.context() as patch:
        interrupt_wait(patch, wait)
        first = dynajax.train(config, tmp_path, quiet=True)
    assert not first.finished and first.saved_step == step
    second = dynajax.train(config, tmp_path, quiet=True)
    assert second.finished
    assert_same_run(second, whole)


def test_signal_during_a_fit_does_not_wait_for_its_end(tmp_path, monkeypatch):
    config = make(
        "test_plugins:Spring-v0",
        steps=80,
        settings={"random_steps": 50, "model.fit_steps": 100_000},
    )
    fits = interrupt_wait(monkeypatch, 0)
    result = dynajax.train(config, tmp_path, quiet=True)
    assert not result.finished and result.saved_step == 50
    assert not all(leaf.is_ready() for leaf in jax.tree.leaves(fits))


def test_handlers_of_a_task_are_replaced_and_restored(tmp_path):
    Alarm.handlers, Alarm.alarm = (signal.SIGTERM, signal.SIGUSR1), 5
    before = [signal.getsignal(n) for n in Alarm.handlers]
    try:
        result = dynajax.train(make(algo="model-free"), tmp_path, quiet=True)
        assert result.saved_step == 5 and not Alarm.heard
        os.kill(os.getpid(), signal.SIGUSR1)
        assert Alarm.heard == [signal.SIGUSR1]
    finally:
        for number, handler in zip(Alarm.handlers, before, strict=True):
            signal.signal(number, handler)


def test_handler_installed_during_training_is_replaced_with_one_warning():
    with distributed.interruptions() as interrupted:
        for _ in range(2):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert not interrupted()
        assert not caught
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted()
    with distributed.interruptions() as interrupted, pytest.warns(UserWarning, match="SIGTERM"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interrupted()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_each_signal_interrupts(number):
    # Also in a session whose programs ignore a signal, as nohup makes them.
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, default)
    try:
        with distributed.interruptions() as interrupted:
            assert not interrupted()
            os.kill(os.getpid(), number)
            assert interrupted()
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_signals_that_the_parent_ignores_or_the_caller_handles_are_left_alone(number, handler):
    before = signal.signal(number, handler)
    try:
        assert number not in signals.catchable()
        with distributed.interruptions() as interrupted:
            os.kill(os.getpid(), number)
            assert not interrupted() and signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


def test_no_signals_are_handled_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(signals.catchable()))
    thread.start()
    thread.join()
    assert found == [()]


def test_signals_to_all_processes_do_not_end_the_workers():
    vector_env = VectorEnv("Pendulum-v1", 1, workers=1)
    try:
        process = vector_env._workers[0]._process
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            process.send_signal(number)
        assert vector_env.reset([0], [0]).shape == (1, 3)
    finally:
        vector_env.close()


def test_signal_during_a_long_call_of_cpp_ends_the_process_at_once():
    """Without a thread that reads the signal, it would take effect after minutes."""
    script = """
import jax, jax.numpy as jnp, os
from dynajax.runtime import signals

def end(number):
    print("ended by", number, flush=True)
    os._exit(128 + number)

numbers = signals.catchable()
with signals.ending_at_once(numbers, end):
    assert signals.catchable() == numbers
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 10**7, lambda i, y: jnp.tanh(y @ y), x))
    x = slow(jnp.ones((200, 200)))
    print("ready", flush=True)
    jax.block_until_ready(x)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[0] == "ended by 2\n"
        assert process.returncode == 130
    finally:
        process.kill()


@pytest.mark.parametrize("by_command", [False, True])
def test_forked_process_of_a_task_ends_by_sigterm_and_ends_nothing_else(by_command):
    """Multiprocessing forks a simulator by default, and the task may terminate it or leave it."""
    numbers, ended = signals.catchable(), []
    with contextlib.ExitStack() as stack:
        if by_command:
            stack.enter_context(signals.ending_at_once(numbers, ended.append))
        interrupted = stack.enter_context(distributed.interruptions(numbers))
        terminated, left = (
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            for _ in range(2)
        )
        for process in (left, terminated):
            process.start()
        os.kill(left.pid, signal.SIGINT)  # as a terminal sends it to all processes
        terminated.terminate()
        terminated.join(20)
        assert terminated.exitcode == -signal.SIGTERM
        assert left.is_alive() and not interrupted() and not ended
        stack.close()  # does not wait for the process that is left
        assert left.is_alive()
    left.terminate()
    left.join(20)
    assert left.exitcode == -signal.SIGTERM


@pytest.fixture(scope="module")
def program():
    with scripts.loaded(RUN) as module:
        yield module


@pytest.mark.parametrize("saved", [0, 30])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_that_is_interrupted_while_it_starts_says_what_is_saved(
    program, tmp_path, monkeypatch, saved, number
):
    ended, found = threading.Event(), []

    def end(text, status):
        found.append((text, status))
        ended.set()

    def train(*arguments, **options):
        os.kill(os.getpid(), number)
        assert ended.wait(20)
        raise UsageError("the process has ended")

    if saved:
        (tmp_path / "checkpoints" / f"000001-step-{saved}").mkdir(parents=True)
    monkeypatch.setattr(common, "end_at_once", end)
    monkeypatch.setattr(program, "train", train)
    scripts.run(program, monkeypatch, "--env=Pendulum-v1", f"--out={tmp_path}")
    ((text, status),) = found
    assert str(tmp_path) in text
    if saved:
        assert "saved at step 30" in text and status == exit_status.INTERRUPTED
    else:
        assert "before anything was saved" in text and status == 128 + number


def test_interrupted_command_that_saves_nothing_does_not_claim_so(monkeypatch, capsys):
    def main(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        common._call(main, [""])
    assert exit.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_process_that_ends_at_once_takes_the_simulators_of_its_tasks_with_it():
    script = """
import multiprocessing, time
from dynajax.cli import common
child = multiprocessing.Process(target=time.sleep, args=(60,), daemon=True)
child.start()
common.end_at_once('ended', 75)
"""
    # The output ends with the last process that can write to it.
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (75, "ended\n"), done.stderr
