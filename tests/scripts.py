"""The scripts of `experiments/` run inside a test's own process."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from absl import flags

from dynajax import cli


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[ModuleType]:
    """A script as a module, whose flags are defined inside the block."""
    known = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location(f"{path.stem}_py", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """A script's exit status; JAX is set up already."""
    monkeypatch.setattr(cli, "start", lambda process=None: None)
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    with pytest.raises(SystemExit) as left:
        cli.run(script.main)
    return left.value.code or 0
