"""Several processes of one run: which rows are whose, and what they tell each other.

Each process trains its share of the rows with a program of its own, on its own devices, beside its
own environments, and keeps its own checkpoints. They meet where something is logged or saved, and
the first of them writes what all have in common. With one process nothing of this happens.
"""

import contextlib
import hashlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np

from dynajax.types import UsageError


def connect(flag: str) -> None:
    """Joins the run's other processes, before JAX is used for anything else.

    Args:
      flag: "I/N@HOST:PORT", this one being number I of N, from 0, and number 0 listening at that
        address; or "auto" where SLURM, a TPU pod, Kubernetes or MPI says the same.

    JAX itself ends this process where the others do not come within five minutes.

    Raises:
      UsageError: it says something else, or nothing around says more than "auto".
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
            raise UsageError(f"{wrong}; the {count} processes count from 0")
        arguments = {
            "coordinator_address": address,
            "num_processes": int(count),
            "process_id": int(number),
        }
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or "no reason given"
        raise UsageError(
            f"--process={flag}: the processes cannot be joined ({reason}); give each of them "
            "I/N@HOST:PORT"
        ) from None


def joined() -> bool:
    """Whether there may be others, also while none of JAX's devices has been asked for."""
    return jax.distributed.is_initialized()


def several() -> bool:
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process writes what all have in common."""
    return jax.process_index() == 0


def share(rows: int, process: int | None = None, count: int | None = None) -> range:
    """The rows of a process: equal shares, the first ones with one more.

    Args:
      process: number of the process, by default this one.
      count: how many there are, by default those of this run.

    Raises:
      UsageError: there are more processes than rows.
    """
    count = jax.process_count() if count is None else count
    if count > rows:
        raise UsageError(
            f"--process: {count} processes for {rows} rows; take at most one for each row"
        )
    index = jax.process_index() if process is None else process
    each, more = divmod(rows, count)
    begin = index * each + min(index, more)
    return range(begin, begin + each + (index < more))


def gather(tree: Any, rows: int) -> Any:
    """This process's rows of some arrays with those of all others: (R, ...) -> (S, ...) numpy.

    Raises:
      UsageError: another process has ended.
    """
    if not several() or not jax.tree.leaves(tree):
        return tree
    shares = [share(rows, process) for process in range(jax.process_count())]
    leaves, structure = jax.tree.flatten(tree)
    leaves = [np.asarray(leaf) for leaf in leaves]
    # As bytes, for JAX would round float64; and as many from each process as from the largest.
    parts, shapes = [], []
    for leaf in leaves:
        full = np.zeros((len(shares[0]), *leaf.shape[1:]), leaf.dtype)
        full[: len(leaf)] = leaf
        parts.append(full.reshape(-1).view(np.uint8))
        shapes.append(full.shape)
    everyone = _exchange(np.concatenate(parts))
    ends = np.cumsum([part.size for part in parts])
    wholes = []
    for leaf, shape, part, end in zip(leaves, shapes, parts, ends, strict=True):
        whole = np.ascontiguousarray(everyone[:, end - part.size : end]).view(leaf.dtype)
        whole = whole.reshape(len(shares), *shape)
        wholes.append(np.concatenate([w[: len(s)] for w, s in zip(whole, shares, strict=True)]))
    return jax.tree.unflatten(structure, wholes)


def everyones(number: int) -> list[int]:
    """The number that each process gives; all wait for all.

    Raises:
      UsageError: another process has ended.
    """
    if not several():
        return [number]
    numbers = _exchange(np.array([number], np.int64).view(np.uint8))
    return np.ascontiguousarray(numbers).view(np.int64)[:, 0].tolist()


def _exchange(data: np.ndarray) -> np.ndarray:
    """Bytes (n,) of each of N processes: (N, n)."""
    from jax.experimental import multihost_utils

    try:
        return np.asarray(multihost_utils.process_allgather(data))
    except Exception as error:  # each transport has errors of its own
        raise UsageError(
            "another process of this run has ended, and so does this one; its own output says why. "
            "Start all of them again to go on from the last checkpoint"
        ) from error


def check_same(what: str) -> None:
    """Compares a text that should be the same in all processes.

    Raises:
      UsageError: it is not.
    """
    digest = hashlib.sha256(what.encode()).digest()
    numbers = everyones(int.from_bytes(digest[:7]))
    different = [str(i) for i, other in enumerate(numbers) if other != numbers[0]]
    if different:
        raise UsageError(
            f"--process: process {', '.join(different)} was started with other flags than "
            "process 0; start all of them with the same"
        )


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C and SIGTERM set a flag; yields the function that reads it.

    Several processes of a run set it for each other, see `_agreed`.
    """
    if several():
        with _agreed() as interrupted:
            yield interrupted
        return
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    try:
        old = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread has handlers
        old = {}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _agreed() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C or SIGTERM in any process stop all of them at the same step.

    Yields the function that says so; every process calls it equally often. It is JAX's
    coordination service that hears of the signal and agrees upon the call.
    """
    from jax.experimental import multihost_utils

    calls, over = itertools.count(), False

    def interrupted() -> bool:
        nonlocal over
        over = over or multihost_utils.reached_preemption_sync_point(next(calls))
        return over

    # The service has the handler of SIGTERM.
    old = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, old)


def leave(status: int) -> NoReturn:
    """Ends this process with a fault, without waiting for others, which wait for it."""
    if not joined():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
