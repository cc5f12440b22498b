"""Runs on disk: found, numbered and written whole; and what a person is told when that cannot be done."""

import csv
import os
import re
import secrets
import shlex
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

PROG = "python -m mnist_lightning"
LOGS = "lightning_logs"
"""Folder of all runs, studies and reports."""
RUN_KEYS = ("seed_everything", "num_threads", "tensorboard", "fast", "trainer", "model", "data")
"""What the config of a run consists of, beside its name and origin."""


def command_line(*words: object) -> str:
    """Return a command of this package as it can be pasted into a terminal."""
    texts = [*PROG.split(), *map(str, words)]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


@rank_zero_only
def note(line: str) -> None:
    """Print a line, once for all processes."""
    print(line, flush=True)


def newest_file(paths: Iterable[Path]) -> Path | None:
    """The one that was written last, or None if there is none."""
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def newest_checkpoint(folder: Path, kind: str) -> Path:
    """The ``last`` or ``best`` checkpoint that was written last, of the runs in a folder.

    Raises:
        MisconfigurationException: There is none.
    """
    newest = newest_file(folder.glob(f"version_*/checkpoints/{kind}.ckpt"))
    if newest is None:
        raise MisconfigurationException(
            f"No run in {folder} has a {kind}.ckpt. Train one with `{PROG} fit`, "
            "or name another with --name or --ckpt_path."
        )
    return newest


def newest_complete_run(folder: Path) -> Path:
    """The run in a folder that was evaluated last.

    Raises:
        MisconfigurationException: There is none.
    """
    complete = newest_file(folder.glob("version_*/test.csv"))
    if complete is not None:
        return complete.parent
    command = {"baseline": ["fit"], "tuned": ["tune"]}.get(folder.name, ["fit", "--name", folder.name])
    newest = newest_file(folder.glob("version_*"))
    if newest is None:
        raise MisconfigurationException(f"No run in {folder} yet. Make one: {command_line(*command)}")
    last = newest / "checkpoints/last.ckpt"
    remedy = f"Continue it: {command_line('fit', '--ckpt_path', last)}"
    if not last.is_file():
        remedy = f"It has no checkpoint either. Make a new one: {command_line(*command)}"
    raise MisconfigurationException(f"{newest} was stopped before its end. {remedy}")


def newest_result(logs: Path) -> Path:
    """The last checkpoint of the newest complete run that ``tune`` made, or else ``fit``.

    Raises:
        MisconfigurationException: There is none.
    """
    for name in ("tuned", "baseline"):
        complete = [path.with_name("checkpoints") / "last.ckpt" for path in logs.glob(f"{name}/version_*/test.csv")]
        if newest := newest_file(path for path in complete if path.is_file()):
            return newest
    raise MisconfigurationException(
        f"No run tuned or baseline in {logs} is complete. Train one with `{PROG} fit`, "
        "or name another with --name or --ckpt_path."
    )


def new_version(folder: Path) -> int:
    """Make the next ``version_N`` in a folder.

    Safe among processes: making a folder succeeds in one of them only.

    Args:
        folder: Where the versions are; made if it does not exist.

    Returns:
        N.
    """
    versions = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    version = max(versions, default=-1) + 1
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        try:
            (folder / f"version_{version}").mkdir(parents=True)
        except FileExistsError:
            return new_version(folder)
    return version


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one from keys with dots; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


@contextmanager
def atomic_write(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """Give another path to write to, which then becomes ``path``: a reader finds the old file or the new one, whole.

    Args:
        path: Where the file shall be.
        overwrite: Whether a file that is there by then is replaced.

    Raises:
        OSError: If the file cannot be written; what there was before is there still.
        MisconfigurationException: If there is a file that may not be replaced.
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
    """Give a file its name, unless another has it by now.

    Raises:
        MisconfigurationException: If another has it.
    """
    try:
        target.hardlink_to(source)  # in one step: no second writer can come between
        source.unlink()
    except FileExistsError as error:
        raise MisconfigurationException(
            f"{target} exists and is not overwritten: another command has written it meanwhile."
        ) from error
    except OSError:  # a file system without links
        if target.exists():
            raise MisconfigurationException(f"{target} exists and is not overwritten.") from None
        _replace(source, target)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], overwrite: bool = True) -> None:
    """Write rows, whose columns are all that any of them has; see :func:`atomic_write`."""
    with atomic_write(path, overwrite) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        right = (f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"{first:{widths[0]}}{''.join(right)}")
    return "\n".join(lines)


def describe_os_error(error: OSError) -> str:
    """What the system refused, and where."""
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else str(error)


@contextmanager
def user_errors() -> Iterator[None]:
    """End the process with a message instead of a traceback where the user can do something about it."""
    silence_os_errors_of_threads()
    try:
        with library_errors():
            yield
    except (MisconfigurationException, ModuleNotFoundError) as error:  # a module that an option needs
        sys.exit(f"error: {one_line(error)}")
    except OSError as error:
        sys.exit(f"error: {describe_os_error(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


LIBRARIES = [
    Path(__file__).parent,
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")),
    *map(Path, (*site.getsitepackages(), site.getusersitepackages())),
]
"""Folders of code that a user cannot be expected to read."""


@contextmanager
def library_errors(folder: Path | None = None, options: Mapping[type, str] = MappingProxyType({})) -> Iterator[None]:
    """End the process with a line where a library fails, and keep the traceback in a file.

    A traceback that passes through code of the user's own is shown: it says where to look.

    Args:
        folder: Where the file shall be; by default in the system's folder for temporary files.
        options: From a class to the option that chose it, to be named if the error is raised inside of it.
    """
    try:
        yield
    except (MisconfigurationException, ModuleNotFoundError, OSError):  # people are told by user_errors
        raise
    except Exception as error:
        if is_from_user_code(error):
            raise
        path = (folder or Path(tempfile.mkdtemp(prefix="mnist_lightning-"))) / "traceback.txt"
        with suppress(OSError):
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        sys.exit(f"error: {explain(error, options)}. The traceback is in {path}")


def is_from_user_code(error: BaseException) -> bool:
    """Return whether code that is of neither this package nor a library was running when an error was raised."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    return any(
        not (path.name.startswith("<frozen") or any(path.is_relative_to(folder) for folder in LIBRARIES))
        for path in files
    )


def explain(error: BaseException, options: Mapping[type, str] = MappingProxyType({})) -> str:
    """Return an error of a library in a line: what raised it, the reason, and its type if the value is not at fault."""
    raised_in = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    places = [f"--{options[type(each)]} {type(each).__name__}" for each in raised_in if type(each) in options]
    reason = one_line(error)
    place = f"{places[-1]}: " if places else ""
    if not reason:
        return f"{place}{type(error).__name__}"
    return f"{place}{reason}" if isinstance(error, ValueError) else f"{place}{reason} ({type(error).__name__})"


def one_line(error: BaseException) -> str:
    """Return the message of an error without its line breaks."""
    return re.sub(r"\s*\n\s*", " ", str(error)).strip().rstrip(".") if "\n" in str(error) else str(error)


def silence_os_errors_of_threads() -> None:
    """Let threads end silently where the system refuses something: TensorBoard's writer raises it again elsewhere."""
    threading.excepthook = lambda failure: (
        None if issubclass(failure.exc_type, OSError) else threading.__excepthook__(failure)
    )
