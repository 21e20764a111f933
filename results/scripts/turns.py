"""Time whole processes side by side; used by beside_sbx.py, beside_cleanrl.py and beside_version.py.

Each run is a process, from its start to its end. The processes of a pair take turns of half a second,
so that both meet the same changes of the machine's speed, and their CPU seconds are compared. With
`cache` "empty" programs are compiled in every run; with "filled" JAX finds them in a folder that an
untimed run has filled. Both sides keep programs from the same compile time on.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from dynajax import UsageError
from dynajax.cli import common

#: Seconds of a process's turn.
TURN = 0.5


class Command(NamedTuple):
    """A command, and variables of its environment besides those of this process."""

    words: Sequence[str]
    variables: Mapping[str, str]


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """End this process by a signal as Ctrl-C does, so that no process of a pair stays behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _start(command: Command, cache: Path, log: IO[str]) -> subprocess.Popen[bytes]:
    """Start a process, and stop it."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(common.SHORTEST_CACHED),
    }
    process = subprocess.Popen(
        command.words,
        env={**os.environ, **settings, **command.variables},
        stdout=subprocess.DEVNULL,
        stderr=log,
        cwd=cache.parent,
    )
    os.kill(process.pid, signal.SIGSTOP)
    return process


def _take_turns(numbers: Sequence[int]) -> Iterator[tuple[int, int, float]]:
    """Run processes in turn; yield number, exit status and CPU seconds of each when it ends."""
    running = list(numbers)
    while running:
        for number in list(running):
            os.kill(number, signal.SIGCONT)
            time.sleep(TURN)
            pid, status, usage = os.wait4(number, os.WNOHANG)
            if pid:
                running.remove(number)
                seconds = usage.ru_utime + usage.ru_stime
                yield number, os.waitstatus_to_exitcode(status), seconds
            else:
                os.kill(number, signal.SIGSTOP)


def _run(sides: Mapping[str, Command], folder: Path) -> dict[str, float]:
    """Return the CPU seconds of a run of each side.

    Raises:
      UsageError: one of them failed; the other one does not go on.
    """
    processes: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
    seconds = {}
    with contextlib.ExitStack() as files:
        logs = {side: files.enter_context(open(folder / f"{side}.log", "w+")) for side in sides}
        try:
            for side, command in sides.items():
                process = _start(command, folder / side, logs[side])
                processes[process.pid] = side, process
            for number, status, used in _take_turns(list(processes)):
                side, process = processes.pop(number)
                process.returncode = status
                if status:
                    logs[side].seek(0)
                    error = logs[side].read()[-500:]
                    raise UsageError(f"{' '.join(sides[side].words)}: {error}")
                seconds[side] = used
        finally:
            # A stopped process would stay for ever.
            for _, process in processes.values():
                process.kill()
                process.wait()
    return {side: seconds[side] for side in sides}


def time_pairs(
    sides: Callable[[Path], Mapping[str, Command]], pairs: int, cache: str
) -> Iterator[dict[str, float]]:
    """Yield the CPU seconds of each side, for one pair of runs after the other.

    Args:
      sides: takes an empty folder for the files of a pair, and returns the commands by side.
      pairs: timed runs of each.
      cache: "empty" or "filled".

    Raises:
      UsageError: a run failed.
    """
    with _signals_as_interrupts(), tempfile.TemporaryDirectory() as name:
        folder, untimed = Path(name), cache == "filled"
        for pair in range(pairs + untimed):
            shutil.rmtree(folder / "files", ignore_errors=True)
            (folder / "files").mkdir()
            commands = sides(folder / "files")
            if cache == "empty":
                for side in commands:
                    shutil.rmtree(folder / side, ignore_errors=True)
            seconds = _run(commands, folder)
            if pair or not untimed:
                yield seconds
