"""Open a study's storage by path or URL, and wait for it when it does not answer."""

import json
import os
import re
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

from mnist_lightning.system.errors import UserError

PATIENCE = 600.0
"""Seconds for which a storage that does not answer is asked again."""


class JournalFile(JournalFileBackend):
    """Optuna's journal file, which stays readable when a writer dies or the disk is full in the middle of a line.

    One that is moved or deleted while it is used is not begun anew, nor is another in its place continued.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file_lock = JournalFileOpenLock(path)  # Optuna's default is a symbolic link, which Windows may refuse
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
                f"{self._path} was moved or deleted while it was in use. Put it back, and give the command again; "
                "or give it where the study is now."
            )

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Read operations."""
        self._check()
        yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append operations; what is left of a line that was never finished is removed first."""
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
    """A storage that asks again, for ten minutes, when the one behind it does not answer.

    Args:
        storage: The one behind it.
        name: Its path or URL, for messages.

    Attributes:
        patience: Seconds for which it is asked again.
        quiet: Whether nothing is said of it.
        busy: Held while the storage works: a process that ends then may leave a lock for which others wait.
    """

    def __init__(self, storage: BaseStorage, name: str) -> None:
        self._storage = storage
        self._name = name
        self.patience = PATIENCE
        self.quiet = False
        self.busy = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        """The storage's own attribute; a method is patient."""
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
                        f"The storage {self._name} does not answer: {_reason(error)}. What is finished is kept: when "
                        "it is back, the same command goes on."
                    ) from error
                if delay == 0.1:
                    message = f"The storage does not answer, asking again for {self.patience / 60:.0f} minutes: "
                    self._say(message + _reason(error))
            else:
                if since is not None:
                    self._say("The storage answers again.")
                return answer
            try:
                time.sleep(delay)
            except KeyboardInterrupt:
                self.patience = 0.0  # nobody wants to wait any more
                raise
            delay = min(2 * delay, 5.0)

    def _say(self, message: str) -> None:
        if not self.quiet:
            tqdm.write(message, file=sys.stderr)


def _cause(error: Exception) -> BaseException:
    return error.__cause__ or error if isinstance(error, StorageInternalError) else error


def _is_outage(error: Exception) -> bool:
    from sqlalchemy.exc import DataError, ProgrammingError, SQLAlchemyError  # takes a while to import

    cause = _cause(error)
    if isinstance(cause, DataError | ProgrammingError):
        return False
    # grpc is imported by those alone who use it
    return isinstance(cause, OSError | SQLAlchemyError) or type(cause).__module__.startswith("grpc.")


def _reason(error: Exception) -> str:
    cause: Any = _cause(error)
    text = cause.details() if hasattr(cause, "details") else getattr(cause, "orig", None) or cause
    return (str(text).strip() or repr(error)).partition("\n")[0]


def hide_password(storage: str) -> str:
    """A storage's URL as it may be shown; a path as it is."""
    return re.sub(r"(://[^/@]*):[^/@]*@", r"\1:***@", storage)


def open_storage(storage: str) -> Any:
    """Open a storage by its URL or, for a journal file, by its path.

    Args:
        storage: A path, ``grpc://host:port`` of Optuna's proxy, or a URL of a database as SQLAlchemy writes it.

    Returns:
        A :class:`PatientStorage`, which does whatever an Optuna storage does.

    Raises:
        UserError: It cannot be opened.
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
            path = Path(storage).absolute()  # whatever becomes of the current folder
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = JournalStorage(JournalFile(str(path)))
            if _is_last_line_damaged(path):  # of which Optuna says nothing
                raise ValueError("its last line is damaged; without that line, the study can go on")
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
    """Return whether the last line of a journal that was written to its end cannot be read."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for block in (2**16, size):  # a line is short
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
        except (IntegrityError, ProgrammingError):  # two processes made the tables of a new database at once
            time.sleep(0.5)
    return optuna.storages.get_storage(url)
