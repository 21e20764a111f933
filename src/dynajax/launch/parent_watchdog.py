"""Run a command that receives SIGTERM when the process that started it dies.

  python parent_watchdog.py PARENT COMMAND...

So a launcher that is killed leaves no run behind, and the run saves itself.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # SLURM sends SIGUSR2 to every process of a job before its time is up. The job runner handles
    # it and stops the run.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if os.getppid() == parent:  # otherwise the parent died before prctl
        os.execv(command[0], command)
