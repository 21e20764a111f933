"""Compare whole runs of SAC with those of another package; used by beside_sbx.py and beside_cleanrl.py.

Each run is a process, from its start to its end. The two processes of a pair take turns of half a
second, so that both meet the same changes of the machine's speed, and their CPU seconds are compared.
Both train SAC on a dm_control task with the same sizes. A run of dynajax also evaluates its policy
once, and writes logs, a checkpoint and a report. With --cache=empty programs are compiled in every
run, with --cache=filled JAX finds them in a folder that an untimed run has filled; both sides keep
programs that take equally long to compile.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from absl import flags

import external_code
from dynajax import UsageError
from dynajax.cli import common

FLAGS = flags.FLAGS
flags.DEFINE_string("python", None, "The interpreter of the package's environment.", required=True)
flags.DEFINE_string("env", "cheetah-run", "Task.")
flags.DEFINE_integer("steps", 4000, "Environment steps.", lower_bound=1)
flags.DEFINE_integer("random", 500, "Steps with random actions, in which neither learns.")
flags.DEFINE_integer("updates", 1, "Gradient updates per environment step.", lower_bound=1)
flags.DEFINE_integer("width", 256, "Width of both hidden layers.", lower_bound=1)
flags.DEFINE_integer("batch", 256, "Transitions in a minibatch.", lower_bound=1)
flags.DEFINE_integer("pairs", 3, "Timed runs of each.", lower_bound=1)
flags.DEFINE_enum("cache", "empty", ["empty", "filled"], "Cache of compiled programs.")
flags.DEFINE_string("out", "comparison", "Folder for the table.")

#: Transitions in the replay buffers.
CAPACITY = 100_000
#: Seconds of a process's turn.
TURN = 0.5


def commands(folder: Path, script: str) -> dict[str, list[str]]:
    """Return the command of each side, whose files may be written to a folder."""
    here = Path(__file__).parent
    sizes = [FLAGS.steps, FLAGS.random, FLAGS.updates, FLAGS.width, FLAGS.batch, CAPACITY, 0]
    settings = {
        "random_steps": FLAGS.random,
        "learn.utd": FLAGS.updates,
        "learn.batch": FLAGS.batch,
        "agent.hidden": f"{FLAGS.width},{FLAGS.width}",
        "replay.real": CAPACITY,
        "eval.every": FLAGS.steps,
        "eval.episodes": 1,
    }
    ours = [sys.executable, str(here.parents[1] / "experiments" / "run.py")]
    ours += [f"--env={FLAGS.env}", "--algo=model-free", "--agent=sac", "--preset=paper"]
    ours += [f"--steps={FLAGS.steps}", f"--out={folder / 'run'}"]
    ours += [word for k, v in settings.items() for word in ("--set", f"{k}={v}")]
    theirs = [str(Path(FLAGS.python).absolute()), str(here / script), FLAGS.env, *map(str, sizes)]
    return {"theirs": theirs, "ours": ours}


def start(command: Sequence[str], cache: Path, log: IO[str], **variables: str) -> int:
    """Start a stopped process, and return its number."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(common.SHORTEST_CACHED),
    }
    process = subprocess.Popen(
        command,
        env={**os.environ, **settings, **variables},
        stdout=subprocess.DEVNULL,
        stderr=log,
        cwd=cache.parent,
    )
    os.kill(process.pid, signal.SIGSTOP)
    return process.pid


def take_turns(numbers: Sequence[int]) -> list[tuple[int, float]]:
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


def run_pair(folder: Path, script: str) -> dict[str, float]:
    """Return the CPU seconds of a run of each side."""
    sides = commands(folder, script)
    with contextlib.ExitStack() as files:
        logs = {side: files.enter_context(open(folder / f"{side}.log", "w+")) for side in sides}
        numbers = [
            start(
                command,
                folder / side,
                logs[side],
                **({"PYTHONPATH": ""} if side == "theirs" else {}),
            )
            for side, command in sides.items()
        ]
        seconds = {}
        for side, (status, used) in zip(sides, take_turns(numbers), strict=True):
            if status:
                logs[side].seek(0)
                error = logs[side].read()[-500:]
                raise UsageError(f"--python={FLAGS.python}: {' '.join(sides[side])}: {error}")
            seconds[side] = used
    return seconds


def compare(package: str, script: str, *others: str) -> None:
    """Time pairs of runs, and write a line for each.

    Args:
      package: the other package, in the environment of --python.
      script: the file beside this one that trains with it.
      others: packages whose versions are written down too.
    """
    versions = external_code.versions(FLAGS.python, package, *others)
    work = {k: getattr(FLAGS, k) for k in ("env", "steps", "random", "updates", "width", "batch")}
    lines: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        untimed = FLAGS.cache == "filled"
        for pair in range(FLAGS.pairs + untimed):
            shutil.rmtree(folder / "run", ignore_errors=True)
            if FLAGS.cache == "empty":
                for side in ("theirs", "ours"):
                    shutil.rmtree(folder / side, ignore_errors=True)
            seconds = run_pair(folder, script)
            if pair or not untimed:
                lines.append(
                    {"package": package, **work, "cache": FLAGS.cache, "pair": len(lines)}
                    | {f"seconds_{side}": f"{used:.2f}" for side, used in seconds.items()}
                    | {"versions": versions, **external_code.origin()}
                )
                print(lines[-1], flush=True)
    external_code.write(FLAGS.out, f"{FLAGS.cache}_{FLAGS.updates}.csv", lines)
