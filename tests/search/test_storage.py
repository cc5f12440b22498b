"""Storages: damaged tails, outages, and what cannot be opened."""

import multiprocessing
import os

import optuna
import pytest
from helpers.commands import posix
from optuna.storages import BaseStorage

from mnist_lightning.search import storage as storages
from mnist_lightning.search.storage import PatientStorage, open_storage
from mnist_lightning.system.errors import UserError


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "study" / "journal.log"


def trials(journal):
    """Return the number of trials that a new reader finds; create the study if it does not exist."""
    study = optuna.create_study(storage=open_storage(str(journal)), study_name="study", load_if_exists=True)
    return len(study.trials)


def enqueue(journal, size=1):
    optuna.load_study(storage=open_storage(str(journal)), study_name="study").enqueue_trial({"a": "x" * size})


@pytest.mark.parametrize("rest", [b'{"op_code":4,"worker_id"', b"\0\0\0"])
def test_a_line_that_was_never_finished_is_removed_by_the_next_writer(journal, rest):
    trials(journal)
    enqueue(journal)
    whole = journal.read_bytes()
    journal.write_bytes(whole + rest)  # its writer was killed
    assert trials(journal) == 1
    enqueue(journal)
    assert journal.read_bytes().startswith(whole + b'{"op_code"')
    assert trials(journal) == 2


@posix
def test_a_full_disk_leaves_the_journal_readable(journal):
    trials(journal)
    enqueue(journal)
    limit = journal.stat().st_size + 5000

    def write():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        storages.PATIENCE = 0.3
        try:
            enqueue(journal, 10_000)
        except UserError as error:
            os._exit(3 if "does not answer: [Errno 27] File too large" in str(error) else 4)

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    process.join(30)
    assert process.exitcode == 3
    assert journal.stat().st_size == limit  # the file ends in half a line
    assert trials(journal) == 1
    enqueue(journal)
    assert trials(journal) == 2


def test_the_lock_of_a_dead_process_is_released(journal, monkeypatch):
    monkeypatch.chdir(journal.parents[1])
    trials("study/journal.log")
    (journal.parent / "journal.log.lock").touch()
    lock = open_storage("study/journal.log")._storage._backend._lock
    assert lock.grace_period == 30
    lock.grace_period = 0.2
    lock.acquire()
    lock.release()


class Flaky:
    """A storage that raises the given errors, then answers."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def get_trial(self, number):
        """Return the number, once all errors are raised."""
        if self.errors:
            raise self.errors.pop(0)
        return number


@pytest.fixture
def _no_waiting(monkeypatch):
    monkeypatch.setattr(storages.time, "sleep", lambda _: None)


@pytest.mark.usefixtures("_no_waiting")
def test_an_outage_is_waited_for(capsys):
    storage: BaseStorage = PatientStorage(Flaky(ConnectionError("gone\naway"), TimeoutError("still")), "name")
    assert storage.get_trial(7) == 7
    errors = capsys.readouterr().err
    assert errors == "The storage does not answer, retrying for 10 minutes: gone\nThe storage answers again.\n"


@pytest.mark.usefixtures("_no_waiting")
def test_what_is_not_an_outage_is_raised_at_once():
    storage = PatientStorage(Flaky(KeyError("no such trial")), "name")
    with pytest.raises(KeyError, match="no such trial"):
        storage.get_trial(7)


def test_patience_ends(monkeypatch):
    monkeypatch.setattr(storages, "PATIENCE", 0.2)
    storage = PatientStorage(Flaky(*[OSError("away")] * 9), "name")
    with pytest.raises(UserError, match="The storage name does not answer: away"):
        storage.get_trial(7)
    before = len(storage.errors)
    with pytest.raises(UserError):  # and the attempts do not restart
        storage.get_trial(7)
    assert len(storage.errors) == before - 1


@pytest.mark.parametrize(
    "storage",
    [
        "nonsense://x", "postgresql://nobody@127.0.0.1:1/x", "sqlite:////no/such/folder/x.db", "mysql://",
        "grpc://localhost", "nonsense+driver://user@host/x",
    ],
)  # fmt: skip
def test_a_storage_that_cannot_be_opened_is_named(storage):
    with pytest.raises(UserError, match=r"cannot be opened|needs a database driver") as error:
        open_storage(storage)
    assert storage in str(error.value)


def test_no_password_is_shown():
    with pytest.raises(UserError) as error:
        open_storage("postgresql://user:secret@127.0.0.1:1/x")
    assert "postgresql://user:***@127.0.0.1:1/x" in str(error.value)
    assert "secret" not in str(error.value)
