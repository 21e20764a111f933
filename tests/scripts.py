"""The scripts of `experiments/`, and the commands behind them, run inside a test's own process."""

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
    """Unloads all commands, and their flags but for the `known` ones."""
    for name in [name for name in sys.modules if name.startswith("dynajax.cli.")]:
        del sys.modules[name]
        vars(cli).pop(name.rpartition(".")[2], None)
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[ModuleType]:
    """A script as a module, whose flags are defined inside the block; the command's, if it is one."""
    known = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location(f"{path.stem}_py", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield sys.modules.get(module.main.__module__, module)
    finally:
        # Its flags are defined again by the next import.
        forget(known)


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """A script's exit status; JAX is set up already."""
    monkeypatch.setattr(common, "start", lambda process=None: None)
    package, _, name = script.__name__.rpartition(".")
    called = f"dynajax {name}" if package else script.__file__
    monkeypatch.setattr(sys, "argv", [called, *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    with pytest.raises(SystemExit) as left:
        common.run(script.main)
    return left.value.code or 0
