"""Several environments of one task beside each other, in this process or in workers."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dynajax import envs
from dynajax.config import Config
from dynajax.types import UsageError

Stream = Literal["train", "evaluate"]
_STREAMS: tuple[Stream, ...] = ("train", "evaluate")
#: (obs (len, D) float32, reward (len,) float32, terminated (len,) bool, truncated (len,) bool)
Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def episode_seed(seed: int, stream: Stream, episode: int) -> int:
    """The seed of an episode, from 0 to 2^31 - 1.

    It depends on its arguments alone, so a row's episodes are the same whatever rows run beside
    it.

    Args:
      seed: the row's seed, 0 or more.
      stream: "train" or "evaluate".
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
    """
    if config.host.workers >= 0:
        return config.host.workers
    environments = config.rows if n is None else n
    workers = min((os.cpu_count() or 1) // 2, environments // 4)
    return workers if workers >= 2 else 0


class _Chunk:
    """Environments that one process steps."""

    def __init__(self, name: str, time_limit: int, seeds: Sequence[int]):
        self._envs = [envs.make(name, time_limit=time_limit, seed=seed) for seed in seeds]
        self.obs_dim = len(self._envs[0].obs_names)

    def reset(self, indices: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        obs = np.zeros((len(indices), self.obs_dim), np.float32)
        for j, (i, seed) in enumerate(zip(indices, seeds, strict=True)):
            obs[j], _ = self._envs[i].reset(seed=int(seed))
        return obs

    def step(self, indices: np.ndarray, actions: np.ndarray) -> Step:
        n = len(indices)
        obs, reward = np.zeros((n, self.obs_dim), np.float32), np.zeros(n, np.float32)
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


def _serve(connection: Any, name: str, time_limit: int, seeds: Sequence[int]) -> None:
    """A worker's life: answers requests until the parent says None, or is gone."""
    # Ctrl-C reaches the whole process group; it is the parent that decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        chunk = _Chunk(name, time_limit, seeds)
        connection.send(("result", chunk.obs_dim))
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            if request is None:
                chunk.close()
                return
            method, *args = request
            connection.send(("result", getattr(chunk, method)(*args)))
    except BrokenPipeError:
        return
    except UsageError as error:
        connection.send(("usage", str(error)))
    except Exception:
        connection.send(("error", traceback.format_exc()))


class _Worker:
    """The parent's end of a worker, with the methods of a `_Chunk` in two halves."""

    def __init__(self, name: str, time_limit: int, seeds: Sequence[int]):
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, name, time_limit, seeds), daemon=True
        )
        self._process.start()
        # Only the worker may hold its end, or neither side would see the other die.
        theirs.close()

    def send(self, method: str, *args: np.ndarray) -> None:
        self._connection.send((method, *args))

    def receive(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(1)
            raise RuntimeError(
                f"a process that steps {self._name} has died (exit code "
                f"{self._process.exitcode}); --set host.workers=0 runs without such processes"
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
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()


class EnvPool:
    """`n` environments of one task. What they return does not depend on `workers`.

    Args:
      name: see `envs.make`.
      n: how many.
      workers: processes that they are spread over; 0 is this process. They are spawned, for a
        fork after JAX has started its threads can hang.
      time_limit: see `envs.make`.
      seeds: n load-time seeds, see `envs.make`; 0 if not given.

    Raises:
      UsageError: see `envs.make`.
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
    ):
        load_seeds = [int(s) for s in ([0] * n if seeds is None else seeds)]
        self._chunk: _Chunk | None = None
        self._workers: list[_Worker] = []
        if workers == 0:
            self._chunk = _Chunk(name, time_limit, load_seeds)
            return
        parts = np.array_split(np.arange(n), min(workers, n))
        #: For each environment its worker, and its position there.
        self._owner = np.concatenate([np.full(len(p), w) for w, p in enumerate(parts)])
        self._position = np.concatenate([np.arange(len(p)) for p in parts])
        try:
            for part in parts:
                seeds_there = [load_seeds[i] for i in part]
                self._workers.append(_Worker(name, time_limit, seeds_there))
            for worker in self._workers:
                worker.receive()
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

    def step(self, indices: Sequence[int] | np.ndarray, actions: np.ndarray) -> Step:
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
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()
        self._workers = []
