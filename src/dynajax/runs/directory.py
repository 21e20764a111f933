"""Run directory: its lock, its config.json, and atomic writes to it."""

import contextlib
import csv
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
from dynajax.runs.lock import try_lock
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


#: Permissions that the user denies to new files; it can be read only by setting it.
_UMASK = os.umask(0)
os.umask(_UMASK)
_FILE = Path(__file__).resolve()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old or the new content, never a part of it."""
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_UMASK)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with the columns of its first row; floats have six significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: f"{v:.6g}" if isinstance(v, float | np.floating) else v for k, v in row.items()}
        )
    write_atomically(path, text.getvalue().encode())


def device_name() -> str:
    """Return the platform, kind and number of the local devices, such as "gpu: NVIDIA H100 x8"."""
    devices = jax.local_devices()
    return f"{devices[0].platform}: {devices[0].device_kind} x{len(devices)}"


def expand_user(path: str | Path, flag: str = "") -> Path:
    """Return a path with the user's home folder in place of a leading ~.

    Args:
      flag: how the error begins, such as "--out=".

    Raises:
      UsageError: the user is unknown or has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise UsageError(
            f"{flag}{path}: {user} is no known home folder; write the path without {user}"
        ) from None


def make_writable(folder: Path, shown: str) -> None:
    """Make a folder that need not exist, and check that files can be written into it.

    Args:
      shown: how the error begins, such as "--out=FOLDER".

    Raises:
      UsageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"{shown}: the folder cannot be written ({error.strerror}); make it writable, or choose "
            "another folder"
        ) from None


@contextlib.contextmanager
def reading_config(folder: Path, shown: str = "") -> Iterator[None]:
    """Convert errors from reading a run's config.json into a `UsageError` of one line.

    Args:
      shown: how the error names the file; by default its path in the folder.

    Raises:
      UsageError: in the `with` block, config.json could not be read or had unexpected content.
    """
    try:
        yield
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{folder}: not a run directory, it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        shown = shown or str(folder / "config.json")
        raise UsageError(f"{shown}: not a run configuration") from None


def machine_name() -> str:
    """Return the processor, the number of cores that this process may use, and the system."""
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


def git_commit(file: Path = _FILE) -> str | None:
    """Return the commit of the clone to which a file belongs, by default one of this package.

    None if it belongs to none, as where this package is installed into a folder of another project.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=10") or None
    except (OSError, subprocess.SubprocessError):
        return None


def git_commits(info: Mapping[str, Any]) -> list[str]:
    """Return the versions of the code that a run was started and resumed with, of its config.json."""
    commits = info.get("git_commits", [info.get("git_commit")])
    return [commit for commit in dict.fromkeys(commits) if commit]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def count_evaluations(folder: Path) -> int:
    """Return the number of steps at which a run has been evaluated, according to its eval.csv."""
    try:
        lines = (folder / "eval.csv").read_text().splitlines()
    except (OSError, ValueError):
        return 0
    return len({row["step"] for row in csv.DictReader(lines) if row.get("step")})


def check_resumable(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Check that a run with this configuration can start or resume in a folder.

    A folder contains a run once a checkpoint or an evaluation has been written.

    Args:
      folder: run directory, which need not exist.
      config: configuration of the run, from `as_dict`.

    Returns:
      The content of config.json if the folder contains a run, otherwise an empty dictionary.

    Raises:
      UsageError: the folder contains a run with another configuration, or its configuration is
        missing or cannot be read.
    """
    path = folder / "config.json"
    if not path.exists():
        files = folder / "eval.csv", folder / "metrics.jsonl"
        logs = [file.name for file in files if file.exists() and file.stat().st_size]
        if logs:
            raise UsageError(
                f"{folder}: the folder contains {' and '.join(logs)} but no config.json; choose "
                "another --out"
            )
        return {}
    try:
        info: dict[str, Any] = json.loads(path.read_text())
        differences = difference(dict(info["config"]), config)
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{folder}: its config.json cannot be read; choose another --out"
        ) from None
    checkpoints = folder / "checkpoints"
    # Other names are left by a process that was killed before its first checkpoint was complete.
    saved = any(next(checkpoints.glob(p), None) for p in ("*-step-*", "process-*/*-step-*"))
    if not saved and not count_evaluations(folder):
        return {}
    if differences:
        raise UsageError(
            f"{folder}: the folder contains a run with another configuration "
            f"({'; '.join(differences)}); choose another --out"
        )
    return info


class RunDirectory:
    """Lock a run directory for this process. Use it in a `with` statement.

    Entering it changes nothing that the folder contains; see `write_config`.

    Args:
      path: run directory, which need not exist.
      config: configuration of the run.
      info: further content of config.json; must contain "command".

    Raises:
      UsageError: the folder cannot be written, another process has locked it, or it contains a run
        with another configuration.
    """

    def __init__(self, path: Path, config: Config, info: dict[str, Any]) -> None:
        self.path = path
        self._config = as_dict(config)
        self._info = info

    def __enter__(self) -> "RunDirectory":
        try:
            self._check()  # a run that is refused leaves no lock in a folder that had none
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a")
        except OSError as error:
            raise UsageError(
                f"--out={self.path}: the folder cannot be written ({error.strerror})"
            ) from None
        if not try_lock(self._lock):
            self._lock.close()
            raise UsageError(f"--out={self.path}: another process is running in this folder")
        try:
            self._previous = self._check()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _check(self) -> dict[str, Any]:
        """Return the result of `check_resumable`, if the number of processes is the same."""
        previous = check_resumable(self.path, self._config)
        if previous:
            processes = previous.get("processes", 1)
            if processes != jax.process_count():
                raise UsageError(
                    f"--out={self.path}: the folder contains a run with {processes} "
                    f"process{'es' * (processes > 1)}, but this run has {jax.process_count()}; "
                    "start the same number, or choose another --out"
                )
        return previous

    def write_config(self) -> None:
        """Write config.json, once it is certain that the run starts or resumes.

        Raises:
          UsageError: the folder cannot be written.
        """
        # Each start of the run adds its command and its version of the code.
        before, commit = self._previous, git_commit()
        self._info["commands"] = [*before.get("commands", []), self._info["command"]]
        content = {
            "config": self._config,
            **self._info,
            "versions": {name: _version(name) for name in _PACKAGES},
            "device": device_name(),
            "machine": machine_name(),
            "processes": jax.process_count(),
            "git_commit": commit,
            "git_commits": [*git_commits(before), commit],
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
