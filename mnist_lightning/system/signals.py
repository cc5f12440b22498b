"""Handle SIGINT (Ctrl-C), SIGTERM and SIGHUP, even several at once."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _handle(handler: Callable[..., Any]) -> dict[int, Any]:
    """Install a handler for all signals that are not ignored, as with nohup; return the handlers before."""
    # callers pass a function even to ignore: Python complains of a signal that arrives while SIG_IGN is installed
    return {number: signal.signal(number, handler) for number in ENDINGS if signal.getsignal(number) != signal.SIG_IGN}


def leave_at_once() -> None:
    """Make these signals end the process silently, while there is nothing to clean up."""
    _handle(lambda number, _: os._exit(128 + number))


def leave_as_usual() -> None:
    """Restore Python's handlers of SIGINT, SIGTERM and SIGHUP, so that Lightning can handle these."""
    for number in _handle(lambda *_: None):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def ignore() -> None:
    """Make these signals do nothing, while the process ends."""
    _handle(lambda *_: None)


SAME_PRESS = 2.0
"""Seconds after a signal in which further signals do not count as new."""


class Interrupt:
    """A handler that raises KeyboardInterrupt, unless it is put off, and ignores signals right after another.

    Attributes:
        received: Whether a signal has arrived.
        is_put_off: Whether a signal only sets ``received``.
    """

    def __init__(self) -> None:
        self.received = False
        self.is_put_off = False
        self._last = -math.inf

    def __call__(self, *_: object) -> None:
        self.received = True
        is_new, self._last = time.monotonic() - self._last > SAME_PRESS, time.monotonic()
        if is_new and not self.is_put_off:
            raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Handle these signals with an :class:`Interrupt`, and restore the previous handlers at the end."""
    interrupt = Interrupt()
    before = _handle(interrupt)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
