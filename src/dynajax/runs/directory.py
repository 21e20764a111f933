"""A run's folder: who holds it, and which configuration it belongs to."""

import contextlib
import csv
import fcntl
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from dynajax.config import Config, as_dict, difference
from dynajax.types import UsageError

_PACKAGES = (
    "dynajax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "mujoco",
    "dm_control",
    "gymnasium",
    "numpy",
)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file such that a reader sees the old one or the new one, never a part."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def write_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table whose columns are the first line's; floats get six digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow(
            {k: f"{v:.6g}" if isinstance(v, float | np.floating) else v for k, v in line.items()}
        )
    write_atomically(path, text.getvalue().encode())


def device_name() -> str:
    """Platform, kind and number of the local devices."""
    devices = jax.local_devices()
    return f"{devices[0].platform}: {devices[0].device_kind} x{len(devices)}"


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Says of a run's config.json that is missing, or is none, in one line what it is.

    Raises:
      UsageError: inside, it could not be read or had not what was looked for.
    """
    try:
        yield
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{folder}: not a run's folder, it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{folder / 'config.json'}: not the configuration of a run") from None


def machine_name() -> str:
    """The processor's name, the cores that this process may use, and the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    processor = names[0] if names else platform.machine()
    return (
        f"{processor}, {cores} core{'s' * (cores > 1)}; {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def evaluated(folder: Path) -> int:
    """At how many steps a run has been evaluated, by its eval.csv."""
    try:
        lines = (folder / "eval.csv").read_text().splitlines()
    except (OSError, ValueError):
        return 0
    return len({line["step"] for line in csv.DictReader(lines) if line.get("step")})


def begun(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the run that has begun in a folder says of itself; nothing where none has.

    A run has begun once anything of it is saved or evaluated.

    Args:
      folder: the run's folder, which need not be there.
      config: the configuration that is to run there, as `as_dict` gives it.

    Raises:
      UsageError: it is a run of another configuration, or nothing says of which.
    """
    path = folder / "config.json"
    if not path.exists():
        strangers = [name for name in ("eval.csv", "metrics.jsonl") if (folder / name).exists()]
        if strangers:
            raise UsageError(
                f"{folder}: the folder has {' and '.join(strangers)} and no config.json "
                "that says of what; choose another --out"
            )
        return {}
    try:
        info: dict[str, Any] = json.loads(path.read_text())
        lines = difference(dict(info["config"]), config)
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{folder}: its config.json cannot be read; choose another --out"
        ) from None
    checkpoints = folder / "checkpoints"
    saved = checkpoints.exists() and (not checkpoints.is_dir() or any(checkpoints.iterdir()))
    if not saved and not evaluated(folder):
        return {}
    if lines:
        raise UsageError(
            f"{folder}: the folder holds a run of another configuration "
            f"({'; '.join(lines)}); choose another --out"
        )
    return info


class RunDirectory:
    """Holds a run's folder for this process; use it in a `with` statement.

    Raises:
      UsageError: the folder cannot be written, another process holds it, or it holds a run of
        another configuration.
    """

    def __init__(self, path: Path, config: Config, info: dict[str, Any]) -> None:
        self.path = path
        self._config = as_dict(config)
        self._info = info

    def __enter__(self) -> "RunDirectory":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a")
        except OSError as error:
            raise UsageError(
                f"--out={self.path}: the folder cannot be written ({error.strerror})"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UsageError(
                f"--out={self.path}: another process is running in this folder"
            ) from None
        try:
            self._claim()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _claim(self) -> None:
        previous = begun(self.path, self._config)
        if previous:
            parts = previous.get("processes", 1)
            if parts != jax.process_count():
                raise UsageError(
                    f"--out={self.path}: the folder holds a run of {parts} "
                    f"process{'es' * (parts > 1)}, and this is one of {jax.process_count()}; "
                    "start as many, or choose another --out"
                )
        # Every part of a run says where it ran.
        self._info["commands"] = [*previous.get("commands", []), self._info["command"]]
        content = {
            "config": self._config,
            **self._info,
            "versions": {name: _version(name) for name in _PACKAGES},
            "device": device_name(),
            "machine": machine_name(),
            "processes": jax.process_count(),
            "git_commit": _git_commit(),
        }
        try:
            write_atomically(
                self.path / "config.json", (json.dumps(content, indent=2) + "\n").encode()
            )
        except OSError as error:
            raise UsageError(
                f"--out={self.path}: the folder cannot be written ({error.strerror})"
            ) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.close()
