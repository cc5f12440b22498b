"""Imported by Python's fork server: all that workers need. While that takes, the server ends with its parent."""

import os
import threading


def _end_with_parent(parent: int, is_done: threading.Event) -> None:
    # by itself, the server notices only once it has imported everything, seconds later
    while not is_done.wait(0.2):
        if os.getppid() != parent:
            os._exit(1)


_is_done = threading.Event()
_watch = threading.Thread(target=_end_with_parent, args=(os.getppid(), _is_done), daemon=True)
_watch.start()

import mnist_lightning.tune.trial  # noqa: E402, F401

_is_done.set()
_watch.join()  # a process with threads must not be forked
