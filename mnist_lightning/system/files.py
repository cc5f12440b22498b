"""Write files whole or not at all."""

import csv
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mnist_lightning.system.errors import UserError


def make_room(option: str, *paths: Path) -> None:
    """Make the folders for new files.

    Args:
        option: The option that names the files, without its dashes.
        paths: Paths of the files.

    Raises:
        UserError: If a file exists.
    """
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists and is not overwritten: choose another --{option}.")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def atomic_write(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to, then rename it to ``path``: readers find a whole file, the old or the new.

    Args:
        path: Path of the file.
        overwrite: Whether to replace an existing file.

    Raises:
        OSError: If the file cannot be written; an existing file is not changed.
        UserError: If the file exists and must not be replaced.
    """
    # unique for each writer; some writers look at the suffix
    partial = path.with_name(f".{path.stem[:100]}.{secrets.token_hex(4)}.partial{path.suffix[:20]}")
    try:
        yield partial
        if overwrite:
            _replace(partial, path)
        else:
            _place(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # on a full disk, the name is missing
    finally:
        with suppress(OSError):
            partial.unlink()


def _replace(source: Path, target: Path) -> None:
    for delay in (0.01, 0.03, 0.1, 0.3, 1.0):
        with suppress(PermissionError):  # on Windows, while another process (a virus scanner) reads the target
            source.replace(target)
            return
        time.sleep(delay)
    source.replace(target)


def _place(source: Path, target: Path) -> None:
    """Rename a file, unless the new name exists.

    Raises:
        UserError: If the new name exists.
    """
    try:
        target.hardlink_to(source)  # atomic: no second writer can interfere
        source.unlink()
    except FileExistsError as error:
        raise UserError(
            f"{target} exists and is not overwritten: another command has written it in the meantime."
        ) from error
    except OSError:  # a file system without links
        if target.exists():
            raise UserError(f"{target} exists and is not overwritten.") from None
        _replace(source, target)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], overwrite: bool = True) -> None:
    """Write rows, with the columns of all of them; see :func:`atomic_write`."""
    with atomic_write(path, overwrite) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
