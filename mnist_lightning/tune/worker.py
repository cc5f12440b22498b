"""Processes that run executions; they end with their parent. Imports nothing that takes long."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from mnist_lightning.signals import ENDINGS

if TYPE_CHECKING:
    from mnist_lightning.tune.search import Search

# Forked copies of a server process that has imported everything: they start at once, share its memory, and hold no GPU.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT: Any = multiprocessing.get_context(_METHOD)


def start_server() -> None:
    """Start to import what workers need, in a process beside this one, unless there is one already."""
    if _METHOD == "forkserver":
        from multiprocessing import forkserver, resource_tracker

        _CONTEXT.set_forkserver_preload(["mnist_lightning.tune.search"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it died; it has nothing to track
            resource_tracker.ensure_running()  # first: it unblocks the signals
        # Ctrl-C reaches every process of a terminal, and the parent decides; what is blocked is so in all workers
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Worker:
    """A process that works on a search until it is complete.

    Args:
        search: The search.
        device: The GPU that it may see, as ``CUDA_VISIBLE_DEVICES`` names it; None hides none.

    Attributes:
        process: The process.
        name: What the study knows it by.
    """

    def __init__(self, search: "Search", device: str | None) -> None:
        from mnist_lightning.tune.study import process_name

        start_server()
        self.device = device
        self._last_words, sender = multiprocessing.Pipe(duplex=False)
        self.process = _CONTEXT.Process(target=_work, args=(search, device, sender), daemon=True)
        self.process.start()
        sender.close()
        self.name = process_name(self.process.pid)

    def last_words(self) -> str | None:
        """Why it could not go on, if it said so before it ended; waits for its end."""
        try:
            words: str = self._last_words.recv()
        except (EOFError, ConnectionError):
            return None
        return words

    def end(self) -> int:
        """End the process, if it is not dead already; gives its exit code, negative for a signal."""
        from mnist_lightning.tune.study import process_name

        self.process.terminate()
        self.process.join(timeout=3)
        self.process.kill()  # it does not answer
        self.process.join()
        # if the server died, its processes are taken for dead, but live
        with suppress(ProcessLookupError):
            while self.name.rpartition(":")[2] and process_name(self.process.pid) == self.name:
                os.kill(self.process.pid, signal.SIGKILL)
                time.sleep(0.05)
        code: int = self.process.exitcode
        return code


def _work(search: "Search", device: str | None, last_words: "Connection[str, str]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be blocked
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from mnist_lightning.parsing import corrected
    from mnist_lightning.runs import describe_os_error, silence_os_errors_of_threads
    from mnist_lightning.tune.search import TrialRunner

    silence_os_errors_of_threads()
    try:
        with corrected():
            runner = TrialRunner(search)
            for end in (_end_of_parent, _termination()):
                threading.Thread(target=_leave, args=(end, runner.storage.in_use), daemon=True).start()
            runner.run()
    except Exception as error:  # the machine is at fault, as with a full disk
        reason = describe_os_error(error) if isinstance(error, OSError) else str(error) or repr(error)
        last_words.send(f"{reason}. What is finished is kept: after a remedy, give the command again.")
        sys.exit(1)


def _leave(wait_for_end: Callable[[], object], in_use: threading.Lock) -> None:
    wait_for_end()
    in_use.acquire(timeout=2)  # so that no lock of the storage is left behind; who waits for one holds none
    os._exit(1)


def _end_of_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])


def _termination() -> Callable[[], object]:
    """What waits for SIGTERM, which the parent sends, or SIGHUP, which a terminal sends when it is closed."""
    terminated = threading.Event()
    for number in ENDINGS:
        if number != signal.SIGINT:
            signal.signal(number, lambda *_: terminated.set())
    return terminated.wait
