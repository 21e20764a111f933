"""Runs of several processes: division of the learners, and communication.

Each process trains its share of the learners with its own program, devices, environments and
checkpoints. The processes communicate only to write logs and checkpoints, and process 0 writes the
common files. A run of one process does not communicate.
"""

import contextlib
import hashlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from dynajax.runtime import signals
from dynajax.types import UsageError

#: Seconds without a sign of life after which a process counts as dead. Usually its closed connection
#: shows that earlier, but a process can be killed between two messages. A thread of its own sends the
#: signs, so that compiling delays none.
_HEARTBEAT_TIMEOUT = 30


def connect(flag: str) -> None:
    """Join the other processes of the run, before JAX is used for anything else.

    JAX ends this process if the others do not join within five minutes, or if one of them dies.

    Args:
      flag: "I/N@HOST:PORT" for process I of N, counted from 0, where process 0 listens at that
        address; or "auto" to read the same from SLURM, a TPU pod, Kubernetes or MPI.

    Raises:
      UsageError: the flag has another form, or "auto" finds no such environment.
    """
    arguments: dict[str, Any] = {}
    if flag != "auto":
        wrong = f"--process={flag}: write it as I/N@HOST:PORT, such as 0/2@10.0.0.1:8476, or auto"
        place, _, address = flag.partition("@")
        number, _, count = place.partition("/")
        host, _, port = address.rpartition(":")
        if not (number.isdecimal() and count.isdecimal() and host and port.isdecimal()):
            raise UsageError(wrong)
        if not int(number) < int(count):
            raise UsageError(f"{wrong}; the {count} processes are numbered from 0")
        arguments = {
            "coordinator_address": address,
            "num_processes": int(count),
            "process_id": int(number),
        }
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            # At its end a process waits for the others, one of which may have been killed.
            shutdown_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or "no reason given"
        raise UsageError(
            f"--process={flag}: cannot join the other processes ({reason}); pass I/N@HOST:PORT to "
            "each process"
        ) from None


def is_initialized() -> bool:
    """Return whether `connect` succeeded, without initializing JAX's devices."""
    return jax.distributed.is_initialized()


def is_multiprocess() -> bool:
    """Return whether the run has more than one process."""
    return jax.process_count() > 1


def is_main_process() -> bool:
    """Return whether this process writes the files that all processes share.

    JAX's devices are initialized only if there are other processes.
    """
    return not is_initialized() or jax.process_index() == 0


def share(num_learners: int, process: int | None = None, count: int | None = None) -> range:
    """Return the indices of a process's learners.

    Shares are contiguous and equal, except that the first ones may have one learner more.

    Args:
      num_learners: learners of the run.
      process: number of the process, by default this one.
      count: number of processes, by default those of this run.

    Raises:
      UsageError: there are more processes than learners.
    """
    count = jax.process_count() if count is None else count
    if count > num_learners:
        raise UsageError(
            f"--process: {count} processes for {num_learners} learners; use at most one process "
            "for each learner"
        )
    index = jax.process_index() if process is None else process
    size, remainder = divmod(num_learners, count)
    begin = index * size + min(index, remainder)
    return range(begin, begin + size + (index < remainder))


def gather(tree: Any, num_learners: int) -> Any:
    """Concatenate the learners of all processes: leaves (local, ...) -> (num_learners, ...) numpy.

    Raises:
      UsageError: another process has ended.
    """
    if not is_multiprocess() or not jax.tree.leaves(tree):
        return tree
    shares = [share(num_learners, process) for process in range(jax.process_count())]
    leaves, structure = jax.tree.flatten(tree)
    leaves = [np.asarray(leaf) for leaf in leaves]
    # Leaves are sent as bytes, because JAX would round float64, and padded to the largest share,
    # because all processes must send equally much.
    parts, shapes = [], []
    for leaf in leaves:
        padded = np.zeros((len(shares[0]), *leaf.shape[1:]), leaf.dtype)
        padded[: len(leaf)] = leaf
        parts.append(padded.reshape(-1).view(np.uint8))
        shapes.append(padded.shape)
    received = _exchange(np.concatenate(parts))
    ends = np.cumsum([part.size for part in parts])
    gathered = []
    for leaf, shape, part, end in zip(leaves, shapes, parts, ends, strict=True):
        values = np.ascontiguousarray(received[:, end - part.size : end]).view(leaf.dtype)
        values = values.reshape(len(shares), *shape)
        gathered.append(np.concatenate([v[: len(s)] for v, s in zip(values, shares, strict=True)]))
    return jax.tree.unflatten(structure, gathered)


def all_gather_int(number: int) -> list[int]:
    """Return the integers that all processes pass, after waiting for all of them.

    Raises:
      UsageError: another process has ended.
    """
    if not is_multiprocess():
        return [number]
    numbers = _exchange(np.array([number], np.int64).view(np.uint8))
    return np.ascontiguousarray(numbers).view(np.int64)[:, 0].tolist()


def _exchange(data: np.ndarray) -> np.ndarray:
    """Gather the bytes (n,) of each of N processes: (N, n)."""
    from jax.experimental import multihost_utils

    try:
        return np.asarray(multihost_utils.process_allgather(data))
    except Exception as error:  # each transport raises its own errors
        raise UsageError(
            "another process of this run has ended, so this one ends too; see the output of the "
            "other process, and start all of them again to resume from the last checkpoint"
        ) from error


def check_same(text: str) -> None:
    """Check that all processes pass the same text, such as their configuration.

    Raises:
      UsageError: the texts differ.
    """
    digest = hashlib.sha256(text.encode()).digest()
    numbers = all_gather_int(int.from_bytes(digest[:7]))
    different = [str(i) for i, other in enumerate(numbers) if other != numbers[0]]
    if different:
        raise UsageError(
            f"--process: process {', '.join(different)} was started with other flags than "
            "process 0; start all processes with the same flags"
        )


@contextlib.contextmanager
def interruptions(numbers: Sequence[int] | None = None) -> Iterator[Callable[[], bool]]:
    """Catch the signals that end a run; yield a function that returns whether one was received.

    A run of several processes stops all of them, see `_synchronized_interruptions`.

    Args:
      numbers: the signals; by default those that `signals.catchable` returns now.
    """
    numbers = signals.catchable() if numbers is None else numbers
    catch = _synchronized_interruptions if is_multiprocess() else signals.Interruptions
    with catch(numbers) as interrupted:
        yield interrupted


@contextlib.contextmanager
def _synchronized_interruptions(numbers: Sequence[int]) -> Iterator[Callable[[], bool]]:
    """Make a signal to any process stop all of them at the same step.

    Yields a function that returns whether to stop, and which all processes must call equally often.
    JAX's coordination service receives the signal and chooses the call at which all stop.
    """
    from jax.experimental import multihost_utils

    calls, stopped = itertools.count(), False

    def interrupted() -> bool:
        nonlocal stopped
        stopped = stopped or multihost_utils.reached_preemption_sync_point(next(calls))
        return stopped

    # The coordination service handles SIGTERM only, so turn the others into SIGTERM.
    old = {
        n: signal.signal(n, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        for n in numbers
        if n != signal.SIGTERM
    }
    try:
        yield interrupted
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def leave(status: int) -> NoReturn:
    """End this process with an error, without waiting for other processes, which wait for it."""
    if not is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
