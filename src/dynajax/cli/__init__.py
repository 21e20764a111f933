"""The command `dynajax`, and the scripts of `experiments/` and `launch/`, which are the same.

Each command is a module here: its docstring and flags are what `--help` shows, its `main` takes what
is left of the words. Only the one that is called is imported.
"""

import difflib
import importlib
import sys

import dynajax

#: By the name that is typed, which is the module's. To add one, add its line.
COMMANDS = {
    "train": "train SAC or MBPO on a task, all seeds and variants in one program",
    "plot": "lay runs side by side",
    "diagnose": "measure what a model can learn of a task, or what went wrong in a run",
    "play": "play episodes with a trained policy, film it, export it",
    "sweep": "bring every run of a study to its end, here or on a cluster",
    "bench": "measure the machine and every stage of training",
    "ahead": "compile a run's programs for a GPU or TPU that is not here",
    "tasks": "list the tasks, their sizes, and which engines run them",
}


def overview() -> str:
    """What there is."""
    lines = [f"  dynajax {name:<10}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            f"dynajax {dynajax.__version__}: model-based policy optimisation in JAX",
            "",
            *lines,
            "",
            "dynajax COMMAND --help says the flags of a command and their defaults.",
        ]
    )


def main() -> None:
    """Runs the command that the first word names."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "-help", "--help", "help"):
        print(overview())
        return
    if name in ("-version", "--version"):
        print(dynajax.__version__)
        return
    from dynajax.cli import common

    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.0)[0]
        common.fail(f"dynajax {name}: there is no such command; the nearest is {near}")
    sys.argv = [f"dynajax {name}", *words]
    common.run(importlib.import_module(f"dynajax.cli.{name}").main)
