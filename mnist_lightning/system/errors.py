"""Errors that a user can fix, told in one line."""

import os
import re
import site
import sys
import sysconfig
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from mnist_lightning.system.console import colored, show_status


class UserError(Exception):
    """A mistake in the user's input, or in files that the input names; the message is one line."""


class OptionError(UserError):
    """A mistake in the options of a command."""


def is_for_users(error: BaseException) -> bool:
    """Return whether users can act on an error: this package's, Lightning's and system errors, and missing modules."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException  # slow to import

    return isinstance(error, UserError | MisconfigurationException | ModuleNotFoundError | OSError)


def describe_os_error(error: OSError) -> str:
    """Return the system's reason and the file."""
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else str(error)


@contextmanager
def user_errors() -> Iterator[None]:
    """End the process with a message instead of a traceback if users can act on the error."""
    silence_os_errors_of_threads()
    try:
        with library_errors():
            yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not is_for_users(error):
            raise
        if isinstance(error, OptionError):
            print(f"{_error()} {error}\nFor the options, add --help", file=sys.stderr)
            sys.exit(2)
        sys.exit(f"{_error()} {describe_os_error(error) if isinstance(error, OSError) else one_line(error)}")


def _error() -> str:
    """Return the word in front of an error, for a terminal in red, after removing the status line."""
    show_status("")
    return colored("error:", "red", sys.stderr)


LIBRARIES = [
    Path(__file__).parents[1],
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")),
    *map(Path, (*site.getsitepackages(), site.getusersitepackages())),
]
"""Folders of code that users are not expected to read."""


@contextmanager
def library_errors(folder: Path | None = None, options: Mapping[type, str] = MappingProxyType({})) -> Iterator[None]:
    """End the process with one line if a library fails, and write the traceback to a file.

    A traceback that passes through the user's own code is shown: it says where to look.

    Args:
        folder: Folder of the file; by default a new one in the system's folder for temporary files.
        options: A mapping from a class to the option that chose it, to name it if the error is raised inside the class.
    """
    try:
        yield
    except Exception as error:
        if is_for_users(error) or is_from_user_code(error):  # user_errors prints errors for users
            raise
        path = (folder or Path(tempfile.mkdtemp(prefix="mnist_lightning-"))) / "traceback.txt"
        with suppress(OSError):
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        sys.exit(f"{_error()} {explain(error, options).rstrip('.')}. The traceback is in {path}")


def is_from_user_code(error: BaseException) -> bool:
    """Return whether an error passed through code that belongs neither to this package nor to a library."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    return any(
        not (path.name.startswith("<frozen") or any(path.is_relative_to(folder) for folder in LIBRARIES))
        for path in files
    )


def explain(error: BaseException, options: Mapping[type, str] = MappingProxyType({})) -> str:
    """Return a library's error in a line: where it was raised, the reason, and its type unless it is a ValueError."""
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
    """Silence system errors in threads: TensorBoard's writer raises them again elsewhere."""
    threading.excepthook = lambda failure: (
        None if issubclass(failure.exc_type, OSError) else threading.__excepthook__(failure)
    )
