"""Exit statuses of the commands."""

import signal

#: An error that the user can correct.
USAGE = 2
#: The run was interrupted and has saved itself.
INTERRUPTED = 75
#: Nothing reads standard output any more; what a shell reports for a program that SIGPIPE ended.
UNREAD = 128 + signal.SIGPIPE
