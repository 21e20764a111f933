"""Time whole processes side by side; used by beside_sbx.py, beside_cleanrl.py and beside_version.py.

Each run is a process, from its start to its end. The processes of a pair take turns of half a second,
so that both meet the same changes of the machine's speed, and their CPU seconds are compared. With
`cache` "empty" programs are compiled in every run; with "filled" JAX finds them in a folder that an
untimed run has filled. All sides keep programs that take equally long to compile.
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


def _start(command: Command, cache: Path, log: IO[str]) -> int:
    """Start a stopped process, and return its number."""
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
    return process.pid


def _take_turns(numbers: Sequence[int]) -> list[tuple[int, float]]:
    """Run processes in turn until all have ended; return the exit status and CPU seconds of each."""
    ended: dict[int, tuple[int, float]] = {}
    try:
        while len(ended) < len(numbers):
            for number in numbers:
                if number in ended:
                    continue
                os.kill(number, signal.SIGCONT)
                time.sleep(TURN)
                pid, status, usage = os.wait4(number, os.WNOHANG)
                if pid:
                    seconds = usage.ru_utime + usage.ru_stime
                    ended[number] = os.waitstatus_to_exitcode(status), seconds
                else:
                    os.kill(number, signal.SIGSTOP)
    finally:
        # A stopped process would stay after Ctrl-C.
        for number in set(numbers) - set(ended):
            os.kill(number, signal.SIGKILL)
    return [ended[number] for number in numbers]


def _run(sides: Mapping[str, Command], folder: Path) -> dict[str, float]:
    """Return the CPU seconds of a run of each side."""
    with contextlib.ExitStack() as files:
        logs = {side: files.enter_context(open(folder / f"{side}.log", "w+")) for side in sides}
        numbers = [_start(sides[side], folder / side, logs[side]) for side in sides]
        seconds = {}
        for side, (status, used) in zip(sides, _take_turns(numbers), strict=True):
            if status:
                logs[side].seek(0)
                error = logs[side].read()[-500:]
                raise UsageError(f"{' '.join(sides[side].words)}: {error}")
            seconds[side] = used
    return seconds


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
    with tempfile.TemporaryDirectory() as name:
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
