"""Run commands as a user does, in this process."""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mnist_lightning.__main__ import main

ROOT = Path(__file__).parents[2]


ROUNDING = 2e-5
"""Allowed difference of two float32 computations: 6e-8, times the root of 784 summands, times logits of about 10."""


posix = pytest.mark.skipif(os.name == "nt", reason="uses features that Windows lacks")


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array as an IDX file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def in_process(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process, which saves seconds; return exit code, standard output and error."""
    code: int | str | None = 0
    try:
        main(arguments)
    except SystemExit as exit:
        code = exit.code
    captured = capfd.readouterr()
    if isinstance(code, str):  # as Python handles sys.exit("message")
        return 1, captured.out, captured.err + code + "\n"
    return code or 0, captured.out, captured.err


def spelled_and_default(capfd: pytest.CaptureFixture[str], command: str, config: Path) -> tuple[Any, Any]:
    """Return a config and a command's defaults; check that the config does not change them."""
    _, defaults, _ = in_process(capfd, command, "--print_config")
    _, with_file, _ = in_process(capfd, command, f"--config={config}", "--print_config")
    assert yaml.safe_load(with_file) == yaml.safe_load(defaults)
    return yaml.safe_load(config.read_text(encoding="utf-8")), yaml.safe_load(defaults)
