"""A process that steps environments for another one: what `EnvPool` starts as a new interpreter."""

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

#: (obs (len, D) float32, reward (len,) float32, terminated (len,) bool, truncated (len,) bool)
Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Arguments(NamedTuple):
    """What the environments of a process are."""

    name: str
    time_limit: int
    seeds: Sequence[int]  # load-time seeds, one for each
    repeat: int
    origin: str  # the module of the task's code, empty if there is none to import


def out_of_reach(name: str) -> str:
    """Why no other process can make a task that the started script registers."""
    return (
        f"--env={name}: it is registered in the script that was started, which the processes that "
        "step environments do not run; put the task into a module of its own, task.py, and name it "
        f"--env=task:{name.rpartition(':')[2]}, or run without such processes "
        "(--set host.workers=0)"
    )


class Chunk:
    """Environments that one process steps."""

    def __init__(self, task: Arguments):
        make = functools.partial(
            envs.make, task.name, time_limit=task.time_limit, repeat=task.repeat
        )
        self._envs = [make(seed=seed) for seed in task.seeds]
        self._obs_dim = len(self._envs[0].obs_names)
        self.statistics = self._envs[0].statistics

    def reset(self, indices: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        obs = np.zeros((len(indices), self._obs_dim), np.float32)
        for j, (i, seed) in enumerate(zip(indices, seeds, strict=True)):
            obs[j], _ = self._envs[i].reset(seed=int(seed))
        return obs

    def step(self, indices: np.ndarray, actions: np.ndarray) -> Step:
        n = len(indices)
        obs, reward = np.zeros((n, self._obs_dim), np.float32), np.zeros(n, np.float32)
        terminated, truncated = np.zeros(n, bool), np.zeros(n, bool)
        # A diverging simulation may leave float32's range: infinity is what should come of it.
        with np.errstate(over="ignore"):
            for j, (i, action) in enumerate(zip(indices, actions, strict=True)):
                obs[j], reward[j], terminated[j], truncated[j], _ = self._envs[i].step(action)
        return obs, reward, terminated, truncated

    def snapshot(self, indices: np.ndarray, _: Any = None) -> np.ndarray:
        return np.stack([self._envs[i].snapshot() for i in indices])

    def close(self) -> None:
        for env in self._envs:
            env.close()


def _find(task: Arguments) -> None:
    """Imports what registers the task.

    Raises:
      UsageError: nothing that can be imported does.
    """
    registry.import_module("--env", task.name)
    task_id = task.name.rpartition(":")[2]
    if not task.origin or task_id in gymnasium.registry:
        return
    with contextlib.suppress(ImportError):
        importlib.import_module(task.origin)
    if task_id not in gymnasium.registry:
        raise UsageError(out_of_reach(task.name))


def _requests(connection: Any) -> Iterator[tuple]:
    """What the parent asks for, until it says None, or is gone."""
    with contextlib.suppress(EOFError, ConnectionResetError):
        while (request := connection.recv()) is not None:
            yield request


def serve(connection: Any) -> None:
    """A worker's life: the first request is ("start", arguments), the others name a method."""
    # Ctrl-C reaches the whole process group; it is the parent that decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    chunk: Chunk | None = None
    try:
        for method, *args in _requests(connection):
            if chunk is None:
                _find(*args)
                chunk = Chunk(*args)
                connection.send(("result", chunk.statistics))
            else:
                connection.send(("result", getattr(chunk, method)(*args)))
        if chunk is not None:
            chunk.close()
    except BrokenPipeError:
        return
    except UsageError as error:
        connection.send(("usage", str(error)))
    except Exception:
        connection.send(("error", traceback.format_exc()))


def main() -> None:
    """Serves on the connection whose file descriptor is the first argument."""
    serve(Connection(int(sys.argv[1])))
