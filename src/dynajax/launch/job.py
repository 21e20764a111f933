"""Bring one run to its end, on whichever machine this process is."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from dynajax.launch import status
from dynajax.runs.lock import try_lock
from dynajax.runtime.exit_status import USAGE

#: Seconds in which a run has to save itself after SIGTERM.
SAVE_TIMEOUT = 90.0
#: Seconds to wait for an earlier process in the run directory, which may be compiling.
LOCK_TIMEOUT = 300.0


class Job(NamedTuple):
    """A run as plain values, for any machine that sees the same folders."""

    name: str
    flags: tuple[str, ...]
    out: str  # the study's folder
    program: tuple[str, ...]  # the arguments of `python` that train
    cwd: str
    attempts: int  # consecutive starts without progress after which the run has failed


class JobRunner:
    """Runs one job in a separate process, and starts it again after every interruption."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._out = Path(job.out)
        self._folder = self._out / job.name
        self._log = self._out / "launch" / f"{job.name}.log"
        self._process: subprocess.Popen | None = None
        self._stopping = False

    def stop(self) -> None:
        """Make `complete` return soon, after the run has saved itself."""
        self._stopping = True

    def end(self) -> None:
        """Stop the run and wait until it has saved itself."""
        self._stopping = True
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(SAVE_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()

    def complete(
        self, env: Mapping[str, str] | None = None, cores: Collection[int] | None = None
    ) -> str:
        """Start the run until it is done, has failed or is stopped, and return that state.

        After an interruption or a crash the run is started again from its last checkpoint; a
        command that was refused is not.

        Args:
          env: variables to add to the environment of the run.
          cores: that the run may use; by default those of this process.
        """
        if self._stopping:  # before its start, so the run stays as it is
            return "stopped"
        without_progress = 0
        while not self._stopping:
            before = status.saved_step(self._folder)
            attempts = status.read_note(self._out, self.job.name).get("attempts", 0) + 1
            self._note("running", attempts=attempts, host=socket.gethostname(), pid=os.getpid())
            self._log_line(f"=== start {attempts} on {socket.gethostname()}")
            try:
                code = self._run_once(env or {}, cores)
            except BaseException:
                # Ray and submitit stop a task with an exception in its main thread.
                self.end()
                self._note("stopped")
                raise
            if code == 0:
                self._note("done", message="")
                return "done"
            message = f"exit status {code}: {self._last_line()}"
            progress = status.saved_step(self._folder) > before
            without_progress = 0 if progress else without_progress + 1
            if self._stopping:
                break
            if code == USAGE or without_progress >= self.job.attempts:
                self._note("failed", message=message)
                return "failed"
            self._note("running", message=f"started again after {message}")
            time.sleep(1)
        self._note("stopped", message="")
        return "stopped"

    def _run_once(self, env: Mapping[str, str], cores: Collection[int] | None) -> int:
        """Start the run once and return its exit status, `USAGE` if it cannot be started."""
        watchdog = Path(__file__).with_name("parent_watchdog.py")
        command = [sys.executable, str(watchdog), str(os.getpid()), sys.executable]
        command += [*self.job.program, *self.job.flags, f"--out={self._folder}"]
        try:
            self._wait_for_lock()
            with open(self._log, "ab") as log:
                # In a new session Ctrl-C does not reach the run; the launcher sends it SIGTERM.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.job.cwd,
                    env={**os.environ, **env},
                    start_new_session=True,
                )
        except OSError as error:
            self._log_line(f"error: the run cannot be started ({error})")
            return USAGE
        if cores is not None:
            # Before the interpreter has started the run itself, which inherits them.
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self._process.pid, cores)
        terminated, last_note = False, time.monotonic()
        while self._process.poll() is None:
            if self._stopping and not terminated:
                self._process.terminate()
                terminated = True
            if time.monotonic() - last_note > status.NOTE_INTERVAL:
                # The run matters more than the note, which a full disk or a file server may refuse.
                with contextlib.suppress(OSError):
                    self._note("running")
                last_note = time.monotonic()
            time.sleep(0.1)
        return self._process.returncode

    def _wait_for_lock(self) -> None:
        """Wait until no other process holds the run directory.

        A run whose job runner has died may still be saving itself.
        """
        until = time.monotonic() + LOCK_TIMEOUT
        while time.monotonic() < until and not self._stopping:
            try:
                with open(self._folder / "lock", "r+") as lock:
                    if try_lock(lock):
                        return
            except FileNotFoundError:
                return
            time.sleep(0.5)

    def _note(self, name: str, **content: object) -> None:
        status.write_note(self._out, self.job.name, state=name, **content)

    def _log_line(self, text: str) -> None:
        with open(self._log, "a") as log:
            log.write(text + "\n")

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
