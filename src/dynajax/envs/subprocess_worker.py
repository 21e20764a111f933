"""The worker process of `VectorEnv`: step environments and send the results to the parent."""

import contextlib
import functools
import importlib
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from dynajax import envs, registry
from dynajax.types import UsageError
from dynajax.xla import backend

#: Number of environments that are made before the memory of all of them is judged.
_MEASURED = 8


class StepResult(NamedTuple):
    """The result of one agent step of several environments."""

    obs: np.ndarray  # (len, D) float32
    reward: np.ndarray  # (len,) float32
    terminated: np.ndarray  # (len,) bool
    truncated: np.ndarray  # (len,) bool
    frames: np.ndarray  # (len,) int64, simulator steps that were done


class EnvArguments(NamedTuple):
    """Arguments from which a process makes its environments."""

    name: str
    time_limit: int
    seeds: Sequence[int]  # load-time seeds, one per environment
    repeat: int
    origin: str  # the module that defines the task, empty if there is none to import
    processes: int  # that make as many environments as this one


def unreachable_message(name: str) -> str:
    """Return the error message for a task that only the main script registers."""
    return (
        f"--env={name}: it is registered in the main script, which the processes that step "
        "environments do not run; move the task into a separate module, task.py, and use "
        f"--env=task:{name.rpartition(':')[2]}, or run without such processes "
        "(--set host.workers=0)"
    )


class SerialEnvs:
    """Several environments of one task that one process steps one after the other.

    Attributes:
      memory: bytes that they need, as measured while they were made.

    Raises:
      UsageError: there is too little memory for them, judged by the first ones.
    """

    def __init__(self, arguments: EnvArguments):
        make = functools.partial(
            envs.make, arguments.name, time_limit=arguments.time_limit, repeat=arguments.repeat
        )
        before = first = backend.resident_memory()
        self._envs: list[envs.Env] = []
        with contextlib.ExitStack() as opened:
            for number, seed in enumerate(arguments.seeds):
                if number == 1:
                    # The first one also imports what all of them share.
                    first = backend.resident_memory()
                elif number == _MEASURED:
                    per_env = (backend.resident_memory() - first) / (_MEASURED - 1)
                    _check_memory(arguments, first + per_env * (len(arguments.seeds) - 1))
                self._envs.append(opened.enter_context(contextlib.closing(make(seed=seed))))
            self._opened = opened.pop_all()
        self.memory = max(0, backend.resident_memory() - before)
        self._obs_dim = len(self._envs[0].obs_names)
        self.statistics = self._envs[0].statistics

    def reset(self, indices: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Start an episode in each of `indices`; see `VectorEnv.reset`."""
        obs = np.zeros((len(indices), self._obs_dim), np.float32)
        for j, (i, seed) in enumerate(zip(indices, seeds, strict=True)):
            obs[j], _ = self._envs[i].reset(seed=int(seed))
        return obs

    def step(self, indices: np.ndarray, actions: np.ndarray) -> StepResult:
        """Step each of `indices`; see `VectorEnv.step`."""
        n = len(indices)
        obs, reward = np.zeros((n, self._obs_dim), np.float32), np.zeros(n, np.float32)
        terminated, truncated = np.zeros(n, bool), np.zeros(n, bool)
        frames = np.zeros(n, np.int64)
        # A diverging simulation may exceed the range of float32; the result is then infinite.
        with np.errstate(over="ignore"):
            for j, (i, action) in enumerate(zip(indices, actions, strict=True)):
                obs[j], reward[j], terminated[j], truncated[j], _ = self._envs[i].step(action)
                frames[j] = self._envs[i].num_frames
        return StepResult(obs, reward, terminated, truncated, frames)

    def snapshot(self, indices: np.ndarray, _: Any = None) -> np.ndarray:
        """Return the physics states of `indices`; see `VectorEnv.snapshot`."""
        return np.stack([self._envs[i].snapshot() for i in indices])

    def value_ranges(self, indices: np.ndarray, _: Any = None) -> np.ndarray:
        """Return the value ranges of `indices`; see `VectorEnv.value_ranges`."""
        return np.stack([self._envs[i].value_ranges.array() for i in indices])

    def close(self) -> None:
        """Close the environments."""
        self._opened.close()


def _check_memory(arguments: EnvArguments, needed: float) -> None:
    """Check that the host has the bytes that each process needs with all of its environments.

    Raises:
      UsageError: it does not.
    """
    needed *= arguments.processes
    if needed > backend.FILLED * (total := backend.host_memory()):
        count = arguments.processes * len(arguments.seeds)
        raise UsageError(
            f"--env={arguments.name}: {count} copies of the task need {needed / 2**30:.1f} GiB, but "
            f"there are {total / 2**30:.1f}; use fewer episodes (--set eval.episodes in training, "
            "--episodes of dynajax play), or fewer seeds or variants"
        )


def _import_task(arguments: EnvArguments) -> None:
    """Import the module that registers the task.

    Raises:
      UsageError: no module that can be imported registers it.
    """
    registry.import_module("--env", arguments.name)
    task_id = arguments.name.rpartition(":")[2]
    if not arguments.origin or task_id in gymnasium.registry:
        return
    with contextlib.suppress(ImportError):
        importlib.import_module(arguments.origin)
    if task_id not in gymnasium.registry:
        raise UsageError(unreachable_message(arguments.name))


def _requests(connection: Any) -> Iterator[tuple]:
    """Yield the parent's requests until it sends None or closes the connection."""
    with contextlib.suppress(EOFError, ConnectionResetError):
        while (request := connection.recv()) is not None:
            yield request


def _ignore_signals() -> None:
    """Ignore the signals that end a run.

    A terminal and SLURM send them to all processes, but the parent decides when the workers stop.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def serve(connection: Any) -> None:
    """Answer requests until the parent stops.

    The first request is ("start", EnvArguments); each later one is the name of a method of
    `SerialEnvs` with its arguments.
    """
    _ignore_signals()
    serial: SerialEnvs | None = None
    try:
        for method, *args in _requests(connection):
            if serial is None:
                _import_task(*args)
                serial = SerialEnvs(*args)
                _ignore_signals()  # again, because the task may have installed handlers
                # The whole process exists for its environments.
                memory = backend.resident_memory()
                connection.send(("result", (serial.statistics, memory)))
            else:
                connection.send(("result", getattr(serial, method)(*args)))
        if serial is not None:
            serial.close()
    except BrokenPipeError:
        return
    except UsageError as error:
        connection.send(("usage", str(error)))
    except Exception:
        connection.send(("error", traceback.format_exc()))


def main() -> None:
    """Serve the connection whose file descriptor is the first command-line argument."""
    serve(Connection(int(sys.argv[1])))
