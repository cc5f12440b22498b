"""Open a study's storage by path or URL, and wait for it when it does not answer."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from tqdm import tqdm

from mnist_lightning.system.console import hide_password
from mnist_lightning.system.errors import UserError

PATIENCE = 600.0
"""For how many seconds a request is repeated if the storage does not answer."""


class JournalFile(JournalFileBackend):
    """Optuna's journal file, but readable even if a writer dies or the disk fills up in the middle of a line.

    If the file is moved or deleted during use, no new file is started, and no other file in its place is used.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file_lock = JournalFileOpenLock(path)  # Optuna's default needs symbolic links, which Windows may refuse
        super().__init__(path, self._file_lock)
        self._identity = self._identify()

    def _identify(self) -> tuple[int, int] | None:
        with suppress(FileNotFoundError):
            status = os.stat(self._path)
            return status.st_dev, status.st_ino
        return None

    def _check(self) -> None:
        if self._identify() != self._identity:
            raise UserError(
                f"{self._path} was moved or deleted while it was in use. Finished work is kept: restore the file "
                "and run the command again, or give the new path as --storage."
            )

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Read operations."""
        self._check()
        yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append operations, after removing an unfinished last line."""
        self._check()
        lines = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
        self._file_lock.acquire()
        try:
            with open(self._path, "r+b") as file:
                if end := file.seek(0, os.SEEK_END):
                    file.seek(end - 1)
                    if file.read() != b"\n":
                        file.seek(0)
                        file.truncate(file.read().rfind(b"\n") + 1)
                        file.seek(0, os.SEEK_END)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        finally:
            self._file_lock.release()


class PatientStorage:
    """A wrapper that repeats a request, for ten minutes, when the storage does not answer.

    Args:
        storage: The wrapped storage.
        name: Path or URL of the storage, for messages.

    Attributes:
        patience: For how many seconds a request is repeated.
        quiet: Whether to print nothing about an outage.
        busy: Held during a request: a process that ends then may leave a lock that blocks others.
    """

    def __init__(self, storage: BaseStorage, name: str) -> None:
        self._storage = storage
        self._name = name
        self.patience = PATIENCE
        self.quiet = False
        self.busy = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped storage; calls of a method are repeated during an outage."""
        attribute = getattr(self._storage, name)
        return partial(self._ask, attribute) if callable(attribute) else attribute

    def _ask(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        since, delay = None, 0.1
        while True:
            try:
                with self.busy:
                    answer = method(*args, **kwargs)
            except Exception as error:
                if not _is_outage(error):
                    raise
                since = since or time.monotonic()
                if time.monotonic() - since >= self.patience:
                    self.patience = 0.0
                    raise UserError(
                        f"The storage {self._name} does not answer: {_reason(error)}. Finished work is kept: run the "
                        "command again when the storage is back."
                    ) from error
                if delay == 0.1:
                    message = f"The storage does not answer, retrying for {self.patience / 60:.0f} minutes: "
                    self._say(message + _reason(error))
            else:
                if since is not None:
                    self._say("The storage answers again.")
                return answer
            try:
                time.sleep(delay)
            except KeyboardInterrupt:
                self.patience = 0.0  # the user does not want to wait
                raise
            delay = min(2 * delay, 5.0)

    def _say(self, message: str) -> None:
        if not self.quiet:
            tqdm.write(message, file=sys.stderr)


def _cause(error: Exception) -> BaseException:
    return error.__cause__ or error if isinstance(error, StorageInternalError) else error


def _is_outage(error: Exception) -> bool:
    from sqlalchemy.exc import DataError, ProgrammingError, SQLAlchemyError  # slow to import

    cause = _cause(error)
    if isinstance(cause, DataError | ProgrammingError):
        return False
    # compared by name, so that only users of grpc import it
    return isinstance(cause, OSError | SQLAlchemyError) or type(cause).__module__.startswith("grpc.")


def _reason(error: Exception) -> str:
    cause: Any = _cause(error)
    text = cause.details() if hasattr(cause, "details") else getattr(cause, "orig", None) or cause
    return (str(text).strip() or repr(error)).partition("\n")[0]


def open_storage(storage: str) -> Any:
    """Open a storage by its URL or, for a journal file, by its path.

    Args:
        storage: A path, ``grpc://host:port`` of Optuna's proxy, or a database URL in SQLAlchemy's form.

    Returns:
        A :class:`PatientStorage`, which can be used as an Optuna storage.

    Raises:
        UserError: If the storage cannot be opened.
    """
    name = hide_password(storage)
    opened: BaseStorage
    try:
        if storage.startswith("grpc://"):
            host, _, port = storage.removeprefix("grpc://").rstrip("/").rpartition(":")
            opened = GrpcStorageProxy(host=host, port=int(port))
            opened.wait_server_ready(10)
        elif "://" in storage:
            opened = _open_database(storage)
        else:
            path = Path(storage).absolute()  # stays valid if the current folder changes
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = JournalStorage(JournalFile(str(path)))
            if _is_last_line_damaged(path):  # Optuna would not report it
                raise ValueError("its last line is damaged; if you remove that line, the study can continue")
    except ImportError as error:
        raise UserError(
            f"The storage {name} needs a database driver ({error.__cause__ or error}). For postgresql://: pip install "
            "'psycopg[binary]'; for mysql+pymysql://: pip install pymysql"
        ) from error
    except Exception as error:  # each database driver raises its own
        if isinstance(error, OSError) and "://" not in storage:
            raise
        raise UserError(
            f"The storage {name} cannot be opened: {_reason(error)}. It must be the path of a journal file, "
            "grpc://host:port of Optuna's proxy, or a database's URL such as postgresql://user@host/database."
        ) from error
    return PatientStorage(opened, name)


def _is_last_line_damaged(path: Path) -> bool:
    """Return whether the last complete line of a journal is invalid."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for block in (2**16, size):  # lines are usually short
            file.seek(max(0, size - block))
            *lines, _ = file.read().split(b"\n")
            if len(lines) > 1:
                break
    if not lines:
        return False
    try:
        json.loads(lines[-1])
    except ValueError:
        return True
    return False


def _open_database(url: str) -> BaseStorage:
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    for _ in range(2):
        try:
            return optuna.storages.get_storage(url)
        except (IntegrityError, ProgrammingError):  # two processes created the tables of a new database simultaneously
            time.sleep(0.5)
    return optuna.storages.get_storage(url)
