"""Runs on disk: numbered, written whole, shown as tables."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from mnist_lightning.system.console import command_line, format_table
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.files import atomic_write
from mnist_lightning.training.runs import new_version


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
