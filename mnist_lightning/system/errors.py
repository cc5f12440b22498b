"""Errors that a user can mend, told in one line."""

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


class UserError(Exception):
    """A mistake in what the user gave, or in what was found where the user pointed; the message is one line."""


def is_for_users(error: BaseException) -> bool:
    """Return whether an error tells users what to do: this package's and Lightning's, missing modules, the system's."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException  # takes long to import

    return isinstance(error, UserError | MisconfigurationException | ModuleNotFoundError | OSError)


def describe_os_error(error: OSError) -> str:
    """Return what the system refused, and where."""
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else str(error)


@contextmanager
def user_errors() -> Iterator[None]:
    """End the process with a message instead of a traceback where the user can do something about it."""
    silence_os_errors_of_threads()
    try:
        with library_errors():
            yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not is_for_users(error):
            raise
        sys.exit(f"error: {describe_os_error(error) if isinstance(error, OSError) else one_line(error)}")


LIBRARIES = [
    Path(__file__).parents[1],
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
    except Exception as error:
        if is_for_users(error) or is_from_user_code(error):  # user_errors prints the first kind
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
