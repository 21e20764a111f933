"""Exit statuses of the commands."""

import signal

#: An error that the user can correct.
USAGE = 2
#: The run was interrupted and has saved itself.
INTERRUPTED = 75
#: The reader of standard output has ended; the status that a shell reports after SIGPIPE.
BROKEN_PIPE = 128 + signal.SIGPIPE
