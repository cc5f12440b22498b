"""A process that runs trials and ends with its parent; importing it is quick."""

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import ModuleType
from typing import TYPE_CHECKING, Any

import psutil

from mnist_lightning.system.signals import ENDINGS

if TYPE_CHECKING:
    from mnist_lightning.search.trial import Search

# Workers are forked from a server process that has imported everything: they start quickly, share its memory, and hold
# no GPU. Windows cannot fork, and macOS libraries do not survive a fork.
_HAS_SERVER = "forkserver" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
_CONTEXT: Any = multiprocessing.get_context("forkserver" if _HAS_SERVER else "spawn")


def start_server() -> None:
    """Start a process that imports what workers need, unless it is already running."""
    if _HAS_SERVER:
        from multiprocessing import forkserver

        _CONTEXT.set_forkserver_preload(["mnist_lightning.search.preload"])
        with _ctrl_c_blocked():
            forkserver.ensure_running()


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Block Ctrl-C in the processes started within: it reaches every process of a terminal, but the parent decides."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows: workers ignore Ctrl-C once they run
        yield
        return
    from multiprocessing import resource_tracker

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that the tracker died is harmless: it has nothing to track
        resource_tracker.ensure_running()  # first: it unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_left_out() -> Iterator[None]:
    """Keep a new process from running the script or notebook again that started the search."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Worker:
    """A process that runs trials until none is left to start.

    Args:
        search: The search.
        device: The only GPU that the process may see, as in ``CUDA_VISIBLE_DEVICES``; None hides no GPU.

    Attributes:
        process: The process.
        name: Name of the process in the study.
    """

    def __init__(self, search: "Search", device: str | None) -> None:
        from mnist_lightning.search.recovery import process_name

        start_server()
        self.device = device
        self._connection, of_worker = multiprocessing.Pipe()
        self.process = _CONTEXT.Process(target=_work, args=(search, device, of_worker), daemon=True)
        with _ctrl_c_blocked(), _main_left_out():
            self.process.start()
        of_worker.close()
        self.name = process_name(self.process.pid)

    def error_line(self) -> str | None:
        """Wait for the worker's end; return the error that it sent, or None."""
        try:
            line: str = self._connection.recv()
        except (EOFError, ConnectionError):
            return None
        return line

    def stop(self) -> None:
        """Ask the process to end; it does so as soon as it leaves no lock behind."""
        with suppress(OSError):  # the process is dead
            self._connection.send(None)  # not a signal: Windows has none that a process can handle

    def end(self) -> int:
        """End the process if it is alive; return its exit code, negative for a signal."""
        from mnist_lightning.search.recovery import process_name

        self.stop()
        self.process.join(timeout=3)
        self.process.kill()  # if it did not end by itself
        self.process.join()
        # if the server died, multiprocessing considers its processes dead even while they live
        with suppress(psutil.NoSuchProcess):
            while self.name.rpartition(":")[2] and process_name(self.process.pid) == self.name:
                psutil.Process(self.process.pid).kill()
                time.sleep(0.05)
        code: int = self.process.exitcode
        return code


def _work(search: "Search", device: str | None, connection: "Connection[str, None]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on systems where it could not be blocked
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from mnist_lightning.commands.parsing import patched_jsonargparse
    from mnist_lightning.search.storage import open_storage
    from mnist_lightning.search.trial import run_trials
    from mnist_lightning.system.errors import UserError, describe_os_error, silence_os_errors_of_threads

    silence_os_errors_of_threads()
    gc.freeze()  # imported objects are not garbage: the collection after each trial skips them
    try:
        with patched_jsonargparse():
            storage = open_storage(search.storage)
            storage.quiet = True  # the command prints the notes
            # the parent sends a message to stop the worker, and its death closes the connection
            for end in (lambda: connection.poll(None), _termination()):
                threading.Thread(target=_leave, args=(end, storage.busy), daemon=True).start()
            run_trials(search, storage)
    except Exception as error:  # a fault of the machine, such as a full disk
        reason = describe_os_error(error) if isinstance(error, OSError) else str(error) or repr(error)
        if not isinstance(error, UserError):  # which says what to do
            reason = f"{reason.rstrip('.')}. Finished work is kept: fix the problem, then run the command again."
        connection.send(reason)
        sys.exit(1)


def _leave(wait_for_end: Callable[[], object], busy: threading.Lock) -> None:
    with suppress(OSError):  # Windows raises it for a closed connection
        wait_for_end()
    busy.acquire(timeout=2)  # leave no lock of the storage behind; a process that waits for a lock holds none
    os._exit(1)


def _termination() -> Callable[[], object]:
    """Return a function that waits for SIGTERM, or for SIGHUP, which a closing terminal sends."""
    terminated = threading.Event()
    for number in ENDINGS:
        if number != signal.SIGINT:
            signal.signal(number, lambda *_: terminated.set())
    return terminated.wait
