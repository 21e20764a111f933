"""Signals that ask a process to save its work and end."""

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

import jax

#: Signals that a run handles whoever has a handler for them.
_ALWAYS = (signal.SIGINT, signal.SIGTERM)
#: Signals that a run leaves alone if they are ignored, as by `nohup`, or if the caller handles them,
#: as submitit does to queue a job again.
_IF_DEFAULT = (signal.SIGHUP, signal.SIGUSR1)

_watched: tuple[int, ...] = ()  # the signals of `ending_at_once`, while it is active
_active: "Interruptions | None" = None


class Interrupted(Exception):
    """A signal arrived during an operation that can be repeated from the same state."""


def catchable() -> tuple[int, ...]:
    """Return the signals that a run may handle.

    Call this before the environments are made: a task that installs handlers is not the caller.
    """
    if threading.current_thread() is not threading.main_thread():
        return ()  # only the main thread can install handlers
    if _watched:
        return _watched
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
    global _watched
    if not numbers:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Python writes to the pipe only for signals that have a handler of Python's.
    previous = {n: signal.signal(n, lambda *_: None) for n in numbers}
    _watched = tuple(numbers)

    def watch() -> None:
        while number := os.read(reading, 1):
            if number[0] not in numbers:
                continue
            if _active is None:
                end(number[0])
            else:
                _active.received = True

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        _watched = ()
        for n, handler in previous.items():
            signal.signal(n, handler)
        signal.set_wakeup_fd(previous_fd)
        os.close(writing)
        thread.join()
        os.close(reading)


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
