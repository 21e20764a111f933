"""Compare whole runs of SAC in dynajax with SBX (Stable-Baselines3 in JAX), on one core.

    python3.11 -m venv sbx
    sbx/bin/pip install torch sbx-rl==0.28.0 dm_control "mujoco<4"
    taskset -c 0 python results/scripts/beside_sbx.py --python=sbx/bin/python --out=comparison

Each run is a process, from its start to its end. The two processes of a pair take turns of half a
second, so that both meet the same changes of the machine's speed, and their CPU seconds are compared.
Both train SAC on a dm_control task with the same sizes and the same JAX. A run of dynajax also
evaluates its policy once, and writes logs, a checkpoint and a report. With --cache=empty programs are
compiled in every run, with --cache=filled both find them in a folder that an untimed run has filled.
Writes beside_sbx.csv: seconds, and the ratio of both.
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

import numpy as np
from absl import flags

import external_code
from dynajax import UsageError
from dynajax.cli import common

FLAGS = flags.FLAGS
flags.DEFINE_string("python", None, "The interpreter of SBX's environment.", required=True)
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


def commands(folder: Path) -> dict[str, list[str]]:
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
    theirs = [FLAGS.python, str(here / "theirs_sbx.py"), FLAGS.env, *map(str, sizes)]
    return {"theirs": theirs, "ours": ours}


def start(command: Sequence[str], cache: Path, log: IO[str], **variables: str) -> int:
    """Start a stopped process, and return its number."""
    process = subprocess.Popen(
        command,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), **variables},
        stdout=subprocess.DEVNULL,
        stderr=log,
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


def run_pair(folder: Path) -> dict[str, float]:
    """Return the CPU seconds of a run of each side."""
    sides = commands(folder)
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


def main(argv: Sequence[str]) -> None:
    """Time both codes."""
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        untimed = FLAGS.cache == "filled"
        for _ in range(FLAGS.pairs + untimed):
            shutil.rmtree(folder / "run", ignore_errors=True)
            if FLAGS.cache == "empty":
                for side in seconds:
                    shutil.rmtree(folder / side, ignore_errors=True)
            for side, used in run_pair(folder).items():
                seconds[side].append(used)
    theirs, ours = (np.array(seconds[side][untimed:]) for side in ("theirs", "ours"))
    entry = external_code.line(FLAGS.env, 1, "sbx-rl 0.28.0", theirs / ours, "theirs_over_ours")
    work = {
        "work": f"run of {FLAGS.steps:,} steps",
        "updates": FLAGS.updates,
        "cache": FLAGS.cache,
    }
    medians = {
        f"seconds_{k}": f"{np.median(t):.1f}" for k, t in (("theirs", theirs), ("ours", ours))
    }
    lines = [work | entry | medians]
    print(lines[0], flush=True)
    external_code.write(FLAGS.out, f"beside_sbx_{FLAGS.cache}_{FLAGS.updates}.csv", lines)


if __name__ == "__main__":
    common.run(main)
