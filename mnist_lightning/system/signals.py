"""Handle SIGINT (Ctrl-C), SIGTERM and SIGHUP, also several at once."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _handle(handler: Callable[..., Any]) -> dict[int, Any]:
    """Install a handler, but not for what is ignored, as by nohup; gives the handlers before."""
    # what ignores is a function as well: Python complains of a signal that comes while its handler becomes SIG_IGN
    return {number: signal.signal(number, handler) for number in ENDINGS if signal.getsignal(number) != signal.SIG_IGN}


def leave_at_once() -> None:
    """Let any of them end the process without a word, while there is nothing yet to be put in order."""
    _handle(lambda number, _: os._exit(128 + number))


def leave_as_usual() -> None:
    """Give SIGINT, SIGTERM and SIGHUP back to Python, to be handled by Lightning."""
    for number in _handle(lambda *_: None):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def ignore() -> None:
    """Let them do nothing, while the process ends."""
    _handle(lambda *_: None)


SAME_PRESS = 2.0
"""Seconds after a signal in which another is no new one."""


class Interrupt:
    """The first of them raises KeyboardInterrupt, unless that is put off; what comes together with it does nothing.

    Attributes:
        received: Whether one came.
        is_put_off: Whether it only is ``received``.
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
    """Handle them by an :class:`Interrupt`; at the end they do what they did before."""
    interrupt = Interrupt()
    before = _handle(interrupt)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
