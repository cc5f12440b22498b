"""Runs on disk: numbered, written whole, shown as tables."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from mnist_lightning.system.console import command_line, format_table
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.files import atomic_write
from mnist_lightning.training.runs import environment, new_version, read_environment


def test_a_version_is_claimed_by_one(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: new_version(tmp_path / "logs"), range(40)))
    assert sorted(versions) == list(range(40))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text("old")

    def write():
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"best\.yaml"):
        write()
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]
    with atomic_write(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"


def test_a_table_is_aligned():
    assert format_table([["run", "loss"], ["baseline", "0.1"]]) == "run       loss\nbaseline   0.1"


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "table.csv"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        first.write_text("first\n" * 1000)
        second.write_text("second\n")
    assert path.read_text() == "first\n" * 1000  # the file that was closed last
    assert [*tmp_path.iterdir()] == [path]


def test_what_may_not_be_overwritten_is_not_even_if_it_came_meanwhile(tmp_path):
    path = tmp_path / "table.csv"

    def write():
        with atomic_write(path, overwrite=False) as partial:
            partial.write_text("mine")
            path.write_text("another's")

    with pytest.raises(UserError, match="exists and is not overwritten"):
        write()
    assert path.read_text() == "another's"
    assert [*tmp_path.iterdir()] == [path]


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path):
    def write(error):
        with atomic_write(tmp_path / "table.csv") as partial:
            partial.write_text("half")
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            write(error)
        assert [*tmp_path.iterdir()] == []


def test_a_command_can_be_pasted():
    assert command_line("fit", "--name", "a b") == "python -m mnist_lightning fit --name " + (
        '"a b"' if os.name == "nt" else "'a b'"
    )


@pytest.mark.skipif(shutil.which("git") is None, reason="this machine does not have git")
def test_an_environment_names_the_commit_and_hides_passwords(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["commit"] is None
    file = tmp_path / "mine.py"
    file.write_text("")
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], check=True)
    found = environment("tune", "--storage", "postgresql://me:secret@host/db")
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert (found["commit"], found["has_uncommitted_changes"]) == (head, False)
    assert found["command"].endswith("tune --storage postgresql://me:***@host/db")
    file.write_text("changed")
    assert environment()["has_uncommitted_changes"]


def test_a_missing_or_damaged_environment_is_empty(tmp_path):
    assert read_environment(tmp_path) == {}
    (tmp_path / "environment.json").write_text("[1")
    assert read_environment(tmp_path) == {}
