"""Write files whole or not at all."""

import csv
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mnist_lightning.system.errors import UserError


@contextmanager
def atomic_write(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """Give another path to write to, which then becomes ``path``: a reader finds the old file or the new one, whole.

    Args:
        path: Path of the file.
        overwrite: Whether a file that exists by then is replaced.

    Raises:
        OSError: If the file cannot be written; an old one is left as it was.
        UserError: If a file exists that may not be replaced.
    """
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.partial")  # no two writers have the same
    try:
        yield partial
        if overwrite:
            _replace(partial, path)
        else:
            place(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk is reported without a name
    finally:
        with suppress(OSError):
            partial.unlink()


def _replace(source: Path, target: Path) -> None:
    for delay in (0.01, 0.03, 0.1, 0.3, 1.0):
        with suppress(PermissionError):  # Windows, while somebody reads the target: a virus scanner, say
            source.replace(target)
            return
        time.sleep(delay)
    source.replace(target)


def place(source: Path, target: Path) -> None:
    """Give a file its name, unless another file has it by now.

    Raises:
        UserError: If another file has it.
    """
    try:
        target.hardlink_to(source)  # in one step: no second writer can come between
        source.unlink()
    except FileExistsError as error:
        raise UserError(f"{target} exists and is not overwritten: another command has written it meanwhile.") from error
    except OSError:  # a file system without links
        if target.exists():
            raise UserError(f"{target} exists and is not overwritten.") from None
        _replace(source, target)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], overwrite: bool = True) -> None:
    """Write rows, whose columns are all that any of them has; see :func:`atomic_write`."""
    with atomic_write(path, overwrite) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
