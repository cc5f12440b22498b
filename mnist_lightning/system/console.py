"""Print notes, commands to paste and tables."""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_only

PROG = "python -m mnist_lightning"


def command_line(*words: object) -> str:
    """Return a command of this package that can be pasted into a terminal."""
    texts = [*PROG.split(), *map(str, words)]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def hide_password(storage: str) -> str:
    """Return a storage's URL without its password, or any other text unchanged."""
    return re.sub(r"(://[^/@]*):[^/@]*@", r"\1:***@", storage)


@rank_zero_only
def rank_zero_print(line: str) -> None:
    """Print a line once for all processes."""
    print(line, flush=True)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines, the header first: the first column left-aligned, all others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        right = (f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"{first:{widths[0]}}{''.join(right)}")
    return "\n".join(lines)
