"""Several environments of one task, stepped in this process or in worker processes."""

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

Stream = Literal["train", "evaluate", "play", "diagnose"]
_STREAMS: tuple[Stream, ...] = ("train", "evaluate", "play", "diagnose")


def episode_seed(seed: int, stream: Stream, episode: int) -> int:
    """Return the seed of an episode, from 0 to 2^31 - 1.

    The result depends only on the arguments, so the episodes of a learner do not depend on the
    other learners of the run.

    Args:
      seed: the learner's seed, 0 or more.
      stream: purpose of the episode.
      episode: index of the episode, 0 or more.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(_STREAMS.index(stream), episode))
    return int(sequence.generate_state(1)[0] >> 1)


def default_workers(config: Config, n: int | None = None) -> int:
    """Return the number of processes that step `n` environments (default: one per learner).

    The number is `config.host.workers` unless that is -1. In this case it is half of the cores,
    which leaves the other half to JAX, with at least four environments per process. Measured on
    two cores, a round trip to a worker adds 0.4 to 1 ms, and a step takes 0.07 ms on cheetah-run
    and 0.4 ms on humanoid-walk, so workers were slower with 1, 4 and 16 environments. More than
    two cores were not measured.

    A task that the main script registers is stepped in this process, with a warning. A task that
    can exist only once was made in this process (`host.evaluate_on`).
    """
    if config.host.workers >= 0:
        return config.host.workers
    if config.host.evaluate_on == "training":
        return 0
    environments = config.num_learners if n is None else n
    workers = min(len(os.sched_getaffinity(0)) // 2, environments // 4)
    if workers < 2:
        return 0
    if _defining_module(config.env) == "__main__":
        warnings.warn(
            f"{subprocess_worker.unreachable_message(config.env)}; until then one core steps it",
            stacklevel=2,
        )
        return 0
    return workers


def _defining_module(name: str) -> str:
    """Return the module that defines a Gymnasium task, or "" if there is none to import."""
    registered = gymnasium.registry.get(name.rpartition(":")[2])
    entry = registered.entry_point if registered else None
    if isinstance(entry, str):
        return entry.partition(":")[0] if ":" in entry else ""
    return getattr(entry, "__module__", "")


class _WorkerProcess:
    """The parent's handle of a worker process, which runs the methods of a `SerialEnvs`.

    A call is split into `send` and `receive`, so that the workers run in parallel. The process is a
    new interpreter that imports `dynajax.envs.subprocess_worker` and the task's module.
    """

    def __init__(self, arguments: subprocess_worker.EnvArguments, paths: Sequence[str]):
        self._name = arguments.name
        self._connection, worker_end = multiprocessing.Pipe()
        code = "from dynajax.envs.subprocess_worker import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(worker_end.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[worker_end.fileno()],
            # Pass on `sys.path`, which the main script may have changed, so that the worker can
            # import whatever this process can.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        # Only the worker may hold its end, or neither process would notice that the other died.
        worker_end.close()
        self.send("start", arguments)

    def send(self, *request: Any) -> None:
        """Request a method call; if the process has died, `receive` raises the error."""
        with contextlib.suppress(OSError):
            self._connection.send(request)

    def receive(self) -> Any:
        """Return the result of the requested method.

        Raises:
          UsageError: the worker raised one.
          RuntimeError: the worker raised another exception, or has died.
        """
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
        """Ask the process to exit."""
        with contextlib.suppress(OSError):
            self._connection.send(None)

    def join(self) -> None:
        """Wait until the process exits, and kill it after 5 seconds."""
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()


class VectorEnv:
    """`n` environments of one task, with results that do not depend on `workers`.

    Args:
      name: see `envs.make`.
      n: number of environments.
      workers: number of processes that step them; 0 steps them in this process. Each worker is a
        new interpreter that does not run the main script: a fork can hang once JAX has started its
        threads, and a script without a main guard would start again in each worker.
      time_limit: see `envs.make`.
      seeds: n load-time seeds, see `envs.make`; 0 by default.
      repeat: see `envs.make`.

    Attributes:
      statistics: class names of the task's wrappers that keep running statistics.
      memory: bytes that the environments and their processes need.

    Raises:
      UsageError: see `envs.make`; also if workers cannot import the module that registers the task.
      RuntimeError: raised by any method if an environment fails in a worker; the message contains
        the worker's traceback.
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
        arguments = subprocess_worker.EnvArguments(
            name, time_limit, load_seeds, repeat, _defining_module(name), max(1, min(workers, n))
        )
        self._local: subprocess_worker.SerialEnvs | None = None
        self._workers: list[_WorkerProcess] = []
        self.statistics: tuple[str, ...] = ()
        self.memory = 0
        if workers == 0:
            self._local = subprocess_worker.SerialEnvs(arguments)
            self.statistics, self.memory = self._local.statistics, self._local.memory
            return
        if arguments.origin == "__main__":
            raise UsageError(subprocess_worker.unreachable_message(name))
        parts = np.array_split(np.arange(n), min(workers, n))
        #: The worker of each environment, and the environment's index within it.
        self._owner = np.concatenate([np.full(len(p), w) for w, p in enumerate(parts)])
        self._position = np.concatenate([np.arange(len(p)) for p in parts])
        try:
            for part in parts:
                share = arguments._replace(seeds=[load_seeds[i] for i in part])
                self._workers.append(
                    _WorkerProcess(share, [path or os.getcwd() for path in sys.path])
                )
            for process in self._workers:
                self.statistics, memory = process.receive()
                self.memory += memory
        except BaseException:
            self.close()
            raise

    def _call(self, method: str, indices: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
        """Call a method of `SerialEnvs` in the workers; return its arrays in order of `indices`."""
        owner = self._owner[indices]
        groups = [(w, np.flatnonzero(owner == w)) for w in np.unique(owner)]
        for w, members in groups:
            self._workers[w].send(method, self._position[indices[members]], values[members])
        replies = [self._workers[w].receive() for w, _ in groups]
        order = np.argsort(np.concatenate([members for _, members in groups]))
        columns = zip(*(r if isinstance(r, tuple) else (r,) for r in replies), strict=True)
        return [np.concatenate(column)[order] for column in columns]

    def reset(
        self, indices: Sequence[int] | np.ndarray, seeds: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Start an episode with the given seed in each of `indices` (len,); return obs (len, D)."""
        index, seed = np.asarray(indices, np.int64), np.asarray(seeds, np.int64)
        if self._local:
            return self._local.reset(index, seed)
        return self._call("reset", index, seed)[0]

    def step(
        self, indices: Sequence[int] | np.ndarray, actions: np.ndarray
    ) -> subprocess_worker.StepResult:
        """Step each of `indices` (len,), which are distinct, with its action (len, A).

        Returns:
          The results in the order of `indices`. There is no autoreset, so the observation is the
          true last one of an episode.
        """
        index, action = np.asarray(indices, np.int64), np.asarray(actions, np.float32)
        if self._local:
            return self._local.step(index, action)
        return subprocess_worker.StepResult(*self._call("step", index, action))

    def snapshot(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the physics states of `indices`: (len, L) float64, see `envs.states`."""
        index = np.asarray(indices, np.int64)
        if self._local:
            return self._local.snapshot(index)
        return self._call("snapshot", index, index)[0]

    def value_ranges(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return `checks.ValueRanges` of `indices`: (len, 3, D + 1) float64."""
        index = np.asarray(indices, np.int64)
        if self._local:
            return self._local.value_ranges(index)
        return self._call("value_ranges", index, index)[0]

    def close(self) -> None:
        """Close the environments and stop their processes; further calls do nothing."""
        if self._local:
            self._local.close()
            self._local = None
        for process in self._workers:
            process.stop()
        for process in self._workers:
            process.join()
        self._workers = []
