"""The command `dynajax`. The scripts of `experiments/` and `launch/` call the same functions.

Each command is a module of this package. `--help` shows the module's docstring and its flags, and
`main` receives the remaining arguments. Only the module of the given command is imported.
"""

import difflib
import importlib
import signal
import sys
import time

import dynajax

#: `time.perf_counter()` at the beginning of the process.
BEGIN = time.perf_counter()

#: The summary of each command, by the name of its module. To add a command, add its line.
COMMANDS = {
    "train": "train an agent on a task, all seeds and variants in one program",
    "report": "write the report of a run, also while it is training",
    "plot": "compare runs: learning curves, final returns and a table",
    "diagnose": "measure what a model can learn of a task, or what went wrong in a run",
    "play": "play episodes with a trained policy, record a video of it, export it",
    "sweep": "complete every run of a study, on this machine or on a cluster",
    "bench": "measure the machine and every stage of training",
    "ahead": "compile the programs of a run for a GPU or TPU that you do not have",
    "tasks": "list the tasks, their sizes, and which engines run them",
}


def overview() -> str:
    """Return the text of `dynajax --help`."""
    lines = [f"  dynajax {name:<10}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            f"dynajax {dynajax.__version__}: model-based policy optimisation in JAX",
            "",
            *lines,
            "",
            "dynajax COMMAND --help lists the flags of a command and their defaults.",
        ]
    )


def main() -> None:
    """Run the command that the first argument names."""
    # End silently if the reader of the output has ended, as `head` does; commands handle it themselves.
    default = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "-help", "--help", "help"):
        print(overview())
        return
    if name in ("-version", "--version"):
        print(dynajax.__version__)
        return
    signal.signal(signal.SIGPIPE, default)
    from dynajax.cli import common

    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, 1, 0.0)[0]
        common.fail(f"dynajax {name}: there is no such command; the nearest is {nearest}")
    sys.argv = [f"dynajax {name}", *arguments]
    common.run(importlib.import_module(f"dynajax.cli.{name}").main)
