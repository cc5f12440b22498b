"""Imports for Python's fork server, which ends with its parent even while it imports."""

import os
import threading


def _end_with_parent(parent: int, is_done: threading.Event) -> None:
    # on its own, the server would notice only after importing everything, seconds later
    while not is_done.wait(0.2):
        if os.getppid() != parent:
            os._exit(1)


_is_done = threading.Event()
_watch = threading.Thread(target=_end_with_parent, args=(os.getppid(), _is_done), daemon=True)
_watch.start()

import mnist_lightning.search.trial  # noqa: E402, F401

_is_done.set()
_watch.join()  # a process with threads must not be forked
