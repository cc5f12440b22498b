"""Print notes, commands to paste, tables and colors."""

import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

PROG = "python -m mnist_lightning"

CODES = {"bold": 1, "red": 31, "green": 32, "yellow": 33}
"""ANSI codes."""


def command_line(*words: object) -> str:
    """Return a command of this package that can be pasted into a terminal."""
    return quoted(*PROG.split(), *words)


def quoted(*words: object) -> str:
    """Return a command of any program that can be pasted into a terminal."""
    texts = [*map(str, words)]
    if os.name == "nt":
        from subprocess import list2cmdline  # --help is quicker without it

        return list2cmdline(texts)
    return shlex.join(texts)


def hide_password(storage: str) -> str:
    """Return a storage's URL without its password, or any other text unchanged."""
    return re.sub(r"(://[^/@]*):[^/@]*@", r"\1:***@", storage)


def rank_zero_print(line: str) -> None:
    """Print a line once for all processes."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # slow to import

    rank_zero_only(print)(line, flush=True)


def colored(text: str, color: str, stream: TextIO | None = None) -> str:
    """Return a text in a color of :data:`CODES`, if it is for a terminal and the user has not set ``NO_COLOR``.

    Args:
        text: The text.
        color: The color.
        stream: Where the text will be written, by default ``sys.stdout``.
    """
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    is_old = os.name == "nt" and "WT_SESSION" not in os.environ  # a console that shows the codes
    if is_plain or is_old or not (stream or sys.stdout).isatty():
        return text
    return f"\x1b[{CODES[color]}m{text}\x1b[0m"


def show_status(text: str) -> None:
    """Show in a terminal what takes a while, until the next status or output takes its place."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"{text[:width]:{width}}\r", end="", file=sys.stderr, flush=True)


def shorten_middle(text: str, width: int) -> str:
    """Return a text of at most ``width`` characters, with an ellipsis in the place of its middle if it is longer."""
    tail = width // 2
    return text if len(text) <= width else f"{text[: width - tail - 1]}…{text[-tail:]}"


def terminal_width() -> int | None:
    """Return the number of columns of the terminal; None if the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def fill_terminal(text: str) -> str:
    """Return a text with line breaks between words where it would not fit the terminal."""
    width = terminal_width()
    return text if width is None else textwrap.fill(text, width, subsequent_indent="    ", break_on_hyphens=False)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines, the header first: the first column left-aligned, all others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        right = (f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"{first:{widths[0]}}{''.join(right)}")
    return "\n".join(lines)
