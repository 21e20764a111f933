"""Runs a command that is ended by SIGTERM when the process that started it dies.

  python parent_watchdog.py PARENT COMMAND...

A launcher that is killed leaves no run behind, and one that is told to end saves itself.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # SLURM tells every process of a job that its time is up; the run is told by its worker.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if os.getppid() == parent:  # else it died before this process was tied to it
        os.execv(command[0], command)
