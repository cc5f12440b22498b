"""Processes that train the executions of trials; they end with their parent. Imports nothing that takes long."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from multiprocessing.connection import Connection, wait
from typing import Any

# Forked copies of a server process that has imported everything: they start at once, share its memory, and hold no GPU.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT: Any = multiprocessing.get_context(_METHOD)


def start_server() -> None:
    """Start to import what workers need, in a process beside this one."""
    if _METHOD == "forkserver":
        from multiprocessing import forkserver

        _CONTEXT.set_forkserver_preload(["mnist_lightning.tuning"])
        forkserver.ensure_running()


class Worker:
    """A process that takes a task, sends messages, and takes the next.

    Args:
        device: The GPU that it may see, as ``CUDA_VISIBLE_DEVICES`` names it; None hides none.

    Attributes:
        connection: Takes tasks and answers to reports, gives messages; see :func:`work`.
    """

    def __init__(self, device: str | None = None) -> None:
        self.connection: Connection[Any, Any]
        self.connection, other = multiprocessing.Pipe()
        self._process = _CONTEXT.Process(target=work, args=(other, device), daemon=True)
        self._process.start()
        other.close()  # so that the end of the process closes the pipe

    def end(self) -> int:
        """Kill the process, if it is not dead already; gives its exit code, negative for a signal."""
        self._process.kill()
        self._process.join()
        self.connection.close()
        code: int = self._process.exitcode
        return code


def work(connection: "Connection[Any, Any]", device: str | None) -> None:
    """Train whatever comes through ``connection``: the body of a worker process.

    Messages are ``("epoch", (epoch, value))``, answered with whether to go on, and at last ``("end", None)``,
    ``("error", reason)`` or, where the machine is at fault, as with a full disk, ``("fault", reason)``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    sys.argv = sys.argv[:1]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from mnist_lightning.runs import describe_os_error, silence_os_errors_of_threads
    from mnist_lightning.tuning import Execution

    silence_os_errors_of_threads()
    while True:
        task = connection.recv()
        message: tuple[str, Any] = ("end", None)
        try:
            Execution(task, connection)
        except OSError as error:
            message = ("fault", describe_os_error(error))
        except (Exception, SystemExit) as error:  # whatever a combination of values makes go wrong
            message = ("error", f"{type(error).__name__}: {' '.join(str(error).split())}")
        connection.send(message)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
