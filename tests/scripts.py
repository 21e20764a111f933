"""Run the scripts of `experiments/`, and the commands that they call, in the test's process."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from absl import flags

from dynajax import cli
from dynajax.cli import common


def forget(known: set[str]) -> None:
    """Unload all commands, and their flags except those in `known`."""
    # absl identifies `dynajax.cli.flags` by its id, which another module could get after it, and
    # tests replace functions of `dynajax.cli.common`.
    kept = ("dynajax.cli.flags", "dynajax.cli.common")
    for name in [n for n in sys.modules if n.startswith("dynajax.cli.") and n not in kept]:
        del sys.modules[name]
        vars(cli).pop(name.rpartition(".")[2], None)
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[ModuleType]:
    """Return a script, or the module of the command that it calls; its flags exist in the block."""
    known = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location(f"{path.stem}_py", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield sys.modules.get(module.main.__module__, module)
    finally:
        forget(known)


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run a script and return its exit status. JAX is already set up."""
    monkeypatch.setattr(common, "start", lambda process=None: None)
    package, _, name = script.__name__.rpartition(".")
    program = f"dynajax {name}" if package else script.__file__
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    with pytest.raises(SystemExit) as exit:
        common.run(script.main)
    return exit.value.code or 0
