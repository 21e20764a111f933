"""Several environments of one task beside each other, in this process or in workers."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import gymnasium
import numpy as np

from dynajax.config import Config
from dynajax.envs import subprocess_worker
from dynajax.types import UsageError

Stream = Literal["train", "evaluate", "play"]
_STREAMS: tuple[Stream, ...] = ("train", "evaluate", "play")


def episode_seed(seed: int, stream: Stream, episode: int) -> int:
    """The seed of an episode, from 0 to 2^31 - 1.

    It depends on its arguments alone, so a row's episodes are the same whatever rows run beside
    it.

    Args:
      seed: the row's seed, 0 or more.
      stream: what it is for.
      episode: 0 or more.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(_STREAMS.index(stream), episode))
    return int(sequence.generate_state(1)[0] >> 1)


def default_workers(config: Config, n: int | None = None) -> int:
    """How many processes step `n` environments (by default one for each row).

    It is `config.host.workers`, or where that is -1: half of the cores, the other half being left
    to JAX, with at least four environments for each. Measured on two cores, a round trip to a
    worker adds 0.4 to 1 ms, and a step takes 0.07 ms on cheetah-run and 0.4 ms on humanoid-walk,
    so that workers did not pay for 1, 4 or 16 environments. More cores were not measured.

    A task that the script itself registers is stepped by this process, and a warning says so.
    """
    if config.host.workers >= 0:
        return config.host.workers
    environments = config.num_learners if n is None else n
    workers = min((os.cpu_count() or 1) // 2, environments // 4)
    if workers < 2:
        return 0
    if _origin(config.env) == "__main__":
        warnings.warn(
            f"{subprocess_worker.out_of_reach(config.env)}; one core steps it now", stacklevel=2
        )
        return 0
    return workers


def _origin(name: str) -> str:
    """The module that a Gymnasium task's code is in; empty where there is none to import."""
    registered = gymnasium.registry.get(name.rpartition(":")[2])
    entry = registered.entry_point if registered else None
    if isinstance(entry, str):
        return entry.partition(":")[0] if ":" in entry else ""
    return getattr(entry, "__module__", "")


class _Worker:
    """The parent's end of a process, with the methods of a `Chunk` in two halves.

    The process is a new interpreter that imports `dynajax.envs.subprocess_worker` and the task's module.
    """

    def __init__(self, task: subprocess_worker.Arguments, paths: Sequence[str]):
        self._name = task.name
        self._connection, theirs = multiprocessing.Pipe()
        code = "from dynajax.envs.subprocess_worker import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            # What this process can import, whatever its script put there, that one can too.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        # Only the worker may hold its end, or neither side would see the other die.
        theirs.close()
        self.send("start", task)

    def send(self, *request: Any) -> None:
        """Asks for a method of the chunk; a process that is gone is found by `receive`."""
        with contextlib.suppress(OSError):
            self._connection.send(request)

    def receive(self) -> Any:
        """What the method returned."""
        try:
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            raise RuntimeError(
                f"a process that steps {self._name} has died (exit code "
                f"{self._process.returncode}); --set host.workers=0 runs without such processes"
            ) from None
        if kind == "usage":
            raise UsageError(value)
        if kind == "error":
            raise RuntimeError(f"{self._name} failed in a process that steps it:\n{value}")
        return value

    def stop(self) -> None:
        """Asks the process to end."""
        with contextlib.suppress(OSError):
            self._connection.send(None)

    def join(self) -> None:
        """Waits for its end, and kills it if it does not come."""
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()


class VectorEnv:
    """`n` environments of one task. What they return does not depend on `workers`.

    Args:
      name: see `envs.make`.
      n: how many.
      workers: processes that they are spread over; 0 is this process. Each is a new interpreter,
        which does not run the script that was started: a fork after JAX has started its threads
        can hang, and a script that runs again would start all over.
      time_limit: see `envs.make`.
      seeds: n load-time seeds, see `envs.make`; 0 if not given.
      repeat: see `envs.make`.

    Attributes:
      statistics: the task's wrappers that keep running statistics, by class name.

    Raises:
      UsageError: see `envs.make`; or the task is registered where workers cannot find it.
      RuntimeError: from any method, with the worker's own traceback if its environment failed.
    """

    def __init__(
        self,
        name: str,
        n: int,
        *,
        workers: int = 0,
        time_limit: int = 1000,
        seeds: Sequence[int] | None = None,
        repeat: int = 1,
    ):
        load_seeds = [int(s) for s in ([0] * n if seeds is None else seeds)]
        arguments = subprocess_worker.Arguments(name, time_limit, load_seeds, repeat, _origin(name))
        self._chunk: subprocess_worker.Chunk | None = None
        self._workers: list[_Worker] = []
        self.statistics: tuple[str, ...] = ()
        if workers == 0:
            self._chunk = subprocess_worker.Chunk(arguments)
            self.statistics = self._chunk.statistics
            return
        if arguments.origin == "__main__":
            raise UsageError(subprocess_worker.out_of_reach(name))
        parts = np.array_split(np.arange(n), min(workers, n))
        #: For each environment its worker, and its position there.
        self._owner = np.concatenate([np.full(len(p), w) for w, p in enumerate(parts)])
        self._position = np.concatenate([np.arange(len(p)) for p in parts])
        try:
            for part in parts:
                share = arguments._replace(seeds=[load_seeds[i] for i in part])
                self._workers.append(_Worker(share, [path or os.getcwd() for path in sys.path]))
            for process in self._workers:
                self.statistics = process.receive()
        except BaseException:
            self.close()
            raise

    def _call(self, method: str, indices: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
        """The arrays that `method` of the chunks returns, in the order of `indices`."""
        owner = self._owner[indices]
        asked = [(w, np.flatnonzero(owner == w)) for w in np.unique(owner)]
        for w, chosen in asked:
            self._workers[w].send(method, self._position[indices[chosen]], values[chosen])
        replies = [self._workers[w].receive() for w, _ in asked]
        order = np.argsort(np.concatenate([chosen for _, chosen in asked]))
        columns = zip(*(r if isinstance(r, tuple) else (r,) for r in replies), strict=True)
        return [np.concatenate(column)[order] for column in columns]

    def reset(self, indices: Sequence[int] | np.ndarray, seeds: Sequence[int]) -> np.ndarray:
        """Starts an episode in each of `indices` (len,) with its seed; returns obs (len, D)."""
        index, seed = np.asarray(indices, np.int64), np.asarray(seeds, np.int64)
        if self._chunk:
            return self._chunk.reset(index, seed)
        return self._call("reset", index, seed)[0]

    def step(
        self, indices: Sequence[int] | np.ndarray, actions: np.ndarray
    ) -> subprocess_worker.Step:
        """Steps each of `indices` (len,), none twice, with its action (len, A).

        Returns:
          obs (len, D) float32, reward (len,) float32, terminated (len,) and truncated (len,) bool.
          Nothing is reset by itself: the observation is the true last one.
        """
        index, action = np.asarray(indices, np.int64), np.asarray(actions, np.float32)
        if self._chunk:
            return self._chunk.step(index, action)
        obs, reward, terminated, truncated = self._call("step", index, action)
        return obs, reward, terminated, truncated

    def snapshot(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Physics states of `indices`: (len, L) float64, see `envs.states`."""
        index = np.asarray(indices, np.int64)
        if self._chunk:
            return self._chunk.snapshot(index)
        return self._call("snapshot", index, index)[0]

    def close(self) -> None:
        """Ends the environments and their processes; can be called again."""
        if self._chunk:
            self._chunk.close()
            self._chunk = None
        for process in self._workers:
            process.stop()
        for process in self._workers:
            process.join()
        self._workers = []
