"""Exit statuses of the commands."""

import signal

#: An error that the user can correct.
USAGE = 2
#: The run was interrupted and is saved; the same command resumes it.
INTERRUPTED = 75
#: The reader of standard output has ended; the status that a shell reports after SIGPIPE.
BROKEN_PIPE = 128 + signal.SIGPIPE


def ended_by(number: int) -> int:
    """Return the status that a shell reports after a signal; nothing was saved then."""
    return 128 + number
