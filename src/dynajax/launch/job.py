"""Brings one run to its end, wherever this process is."""

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dynajax.launch import status
from dynajax.runtime.exit_status import USAGE

#: Seconds that a run which was asked_to_stop to end may take to save itself.
SAVING = 90.0
#: Seconds to wait for an earlier process in a run's folder, which may be compiling.
WAITING = 300.0


class Job(NamedTuple):
    """A run as plain values, for any machine that sees the same folders."""

    name: str
    flags: tuple[str, ...]
    out: str  # the study's folder
    program: tuple[str, ...]  # what comes after `python` to train
    cwd: str
    attempts: int  # starts in a row that bring the run no further, until it counts as failed


class JobRunner:
    """Runs one job in a process of its own, again after every interruption."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._out = Path(job.out)
        self._folder = self._out / job.name
        self._log = self._out / "launch" / f"{job.name}.log"
        self._process: subprocess.Popen | None = None
        self._stopping = False

    def stop(self) -> None:
        """Makes `complete` end soon, with the run saved."""
        self._stopping = True

    def end(self) -> None:
        """Ends the run, and waits until it has saved itself."""
        self._stopping = True
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(SAVING)
        except subprocess.TimeoutExpired:
            process.kill()

    def complete(self, env: Mapping[str, str] | None = None) -> str:
        """Starts the run until it is done, failed, or was stopped; gives back which.

        An exit status 75 and a crash are followed by another start from the last checkpoint, a
        refused command is not. `env` is added to the environment.
        """
        fruitless = 0
        while not self._stopping:
            before = status.saved_step(self._folder)
            attempts = status.read_note(self._out, self.job.name).get("attempts", 0) + 1
            self._note("running", attempts=attempts, host=socket.gethostname(), pid=os.getpid())
            self._say(f"=== start {attempts} on {socket.gethostname()}")
            try:
                code = self._run(env or {})
            except OSError as error:
                code = USAGE
                self._say(f"error: the run cannot be started ({error})")
            except BaseException:
                # Ray and submitit stop a task by an exception in its main thread.
                self._note("stopped")
                self.end()
                raise
            if code == 0:
                self._note("done", message="")
                return "done"
            message = f"exit status {code}: {self._last_line()}"
            fruitless = 0 if status.saved_step(self._folder) > before else fruitless + 1
            if self._stopping:
                break
            if code == USAGE or fruitless >= self.job.attempts:
                self._note("failed", message=message)
                return "failed"
            self._note("running", message=f"started again after {message}")
            time.sleep(1)
        self._note("stopped", message="")
        return "stopped"

    def _run(self, env: Mapping[str, str]) -> int:
        """One start; its exit status."""
        self._wait_for_folder()
        watchdog = Path(__file__).with_name("parent_watchdog.py")
        command = [sys.executable, str(watchdog), str(os.getpid()), sys.executable]
        command += [*self.job.program, *self.job.flags, f"--out={self._folder}"]
        with open(self._log, "ab") as log:
            # A session of its own: Ctrl-C reaches the launcher, which tells the run.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.job.cwd,
                env={**os.environ, **env},
                start_new_session=True,
            )
        asked_to_stop, beat = False, time.monotonic()
        while self._process.poll() is None:
            if self._stopping and not asked_to_stop:
                self._process.terminate()
                asked_to_stop = True
            if time.monotonic() - beat > status.BEAT:
                self._note("running")
                beat = time.monotonic()
            time.sleep(0.1)
        return self._process.returncode

    def _wait_for_folder(self) -> None:
        """Until no other process runs there: one whose worker died is still saving itself."""
        until = time.monotonic() + WAITING
        while time.monotonic() < until and not self._stopping:
            try:
                with open(self._folder / "lock", "r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.5)

    def _note(self, name: str, **content: object) -> None:
        status.write_note(self._out, self.job.name, state=name, **content)

    def _say(self, text: str) -> None:
        with open(self._log, "a") as log:
            log.write(text + "\n")

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
