"""Locks on files, which tell a process that another one works in the same folder."""

import errno
import fcntl
import warnings
from typing import IO

#: Errors of a lock that another process holds; any other error means that there are no locks.
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def try_lock(file: IO[str]) -> bool:
    """Lock a file until it is closed, and return whether no other process holds its lock.

    On a file system without locks this warns and returns True.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        warnings.warn(
            f"{file.name}: the file system has no locks ({error.strerror}); make sure that no other "
            "process works in this folder",
            stacklevel=2,
        )
    return True
