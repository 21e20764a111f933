"""Signals that ask a process to save its work and end."""

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import jax

#: Signals that a run handles whoever has a handler for them.
_ALWAYS = (signal.SIGINT, signal.SIGTERM)
#: Signals that a run leaves alone if they are ignored, as by `nohup`, or if the caller handles them,
#: as submitit does to queue a job again.
_IF_DEFAULT = (signal.SIGHUP, signal.SIGUSR1)

_watch: "_Watch | None" = None  # of `ending_at_once`, while it is active
_active: "Interruptions | None" = None
#: Signals that were blocked before this thread forked.
_mask: set[int | signal.Signals] | None = None


class _Watch(NamedTuple):
    """What `ending_at_once` has changed in this process."""

    reading: int  # ends of the pipe to which Python writes the numbers of signals
    writing: int
    previous: dict[int, Any]  # handlers by signal


class Interrupted(Exception):
    """A signal arrived during an operation that can be repeated from the same state."""


def catchable() -> tuple[int, ...]:
    """Return the signals that a run may handle.

    Call this before the environments are made: a task that installs handlers is not the caller.
    """
    if threading.current_thread() is not threading.main_thread():
        return ()  # only the main thread can install handlers
    if _watch is not None:
        return tuple(_watch.previous)
    return (*_ALWAYS, *(n for n in _IF_DEFAULT if signal.getsignal(n) == signal.SIG_DFL))


class Interruptions:
    """Note signals, and return whether one was received when called. Use it in a `with` statement.

    Each call installs the handlers again, because a task may install its own at any time.

    Args:
      numbers: the signals, from `catchable`.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.received = False
        self._numbers, self._has_warned = numbers, False

    def __enter__(self) -> "Interruptions":
        global _active
        self._previous = {n: signal.signal(n, self._receive) for n in self._numbers}
        self._outer, _active = _active, self
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def __call__(self) -> bool:
        replaced = [n for n in self._numbers if signal.signal(n, self._receive) != self._receive]
        if replaced and not self._has_warned:
            self._has_warned = True
            names = " and ".join(signal.Signals(n).name for n in replaced)
            warnings.warn(
                f"{names}: the task installed a handler during training; it was replaced, because "
                "the run saves itself when the signal arrives",
                stacklevel=2,
            )
        return self.received

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _active
        _active = self._outer
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ending_at_once(numbers: Sequence[int], end: Callable[[int], Any]) -> Iterator[None]:
    """Call `end` in another thread as soon as a signal arrives, unless `Interruptions` are active.

    XLA compiles in C++ for a minute or longer, and Python calls its handlers only afterwards. Python
    writes the number of a signal to a pipe at once, however, and a thread can read it from there.

    Args:
      numbers: the signals, from `catchable`.
      end: ends the process; its argument is the number of the signal.
    """
    global _watch
    if not numbers:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Python writes to the pipe only for signals that have a handler of Python's.
    previous = {n: signal.signal(n, lambda *_: None) for n in numbers}
    _watch = _Watch(reading, writing, previous)

    def watch() -> None:
        while number := os.read(reading, 1)[0]:
            if number not in numbers:
                continue
            if _active is None:
                end(number)
            else:
                _active.received = True

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        if _watch is not None:  # not in a forked child
            _watch = None
            for n, handler in previous.items():
                signal.signal(n, handler)
            signal.set_wakeup_fd(previous_fd)
            # Closing the pipe is not enough: a process that was forked in C may hold it open.
            os.write(writing, b"\0")
            thread.join()
            os.close(writing)
            os.close(reading)


def _block() -> None:
    """Block the signals while this thread forks.

    Without this, a child that is ended at once would still have the handlers of its parent.
    """
    global _mask
    if _watch is not None or _active is not None:
        _mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*_ALWAYS, *_IF_DEFAULT))


def _unblock() -> None:
    global _mask
    if _mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask)
        _mask = None


def _reset_child() -> None:
    """Let SIGTERM end a forked child, such as a simulator that its task terminates.

    The other signals still have no effect on it, because a terminal and SLURM send them to all
    processes, but the parent decides when the simulator ends.
    """
    global _active, _watch
    previous: dict[int, Any] = {}  # from the innermost context to the outermost, which remains
    while _active is not None:
        previous |= _active._previous
        _active = _active._outer
    if _watch is not None:
        previous |= _watch.previous
        # With the pipe, the parent would take the signals of this process for its own.
        signal.set_wakeup_fd(-1)
        os.close(_watch.reading)
        os.close(_watch.writing)
        _watch = None
    if signal.SIGTERM in previous:
        signal.signal(signal.SIGTERM, previous[signal.SIGTERM])
    _unblock()


os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_reset_child)


def wait(tree: Any, check: Callable[[], None] | None = None) -> Any:
    """Return a tree once its arrays are computed.

    Args:
      tree: arrays that may still be computed.
      check: is called every few milliseconds, and may raise `Interrupted`. Python's handlers run
        between the calls, which `jax.block_until_ready` prevents.
    """
    # Typed PRNG keys cannot tell, but are ready when the rest is.
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "is_ready")]
    while check is not None and not all(leaf.is_ready() for leaf in leaves):
        check()
        time.sleep(0.005)
    return jax.block_until_ready(tree)
