"""Runs on disk: numbered, written whole, shown as tables."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from mnist_lightning.runs import atomic_write, format_table, new_version


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
