"""Run folders: find and number them, and note what made a run."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mnist_lightning import __version__
from mnist_lightning.system.console import PROG, command_line, hide_password
from mnist_lightning.system.errors import UserError

LOGS = "lightning_logs"
"""Folder of all runs, studies and reports."""
RUN_KEYS = ("seed_everything", "num_threads", "tensorboard", "fast", "trainer", "model", "data")
"""Keys of a run's config, besides its name and origin."""
LABELS = ("notes", "tags")
"""Keys of a run's config that change nothing."""


def newest_file(paths: Iterable[Path]) -> Path | None:
    """Return the file that was written last, or None if there are no files."""
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def newest_checkpoint(folder: Path, kind: str) -> Path:
    """Return the newest ``last`` or ``best`` checkpoint of the runs in a folder.

    Raises:
        UserError: If no run has such a checkpoint.
    """
    newest = newest_file(folder.glob(f"version_*/checkpoints/{kind}.ckpt"))
    if newest is None:
        raise UserError(
            f"No run in {folder} has a {kind}.ckpt. Train one with `{PROG} fit`, "
            "or name another with --name or --ckpt_path."
        )
    return newest


def newest_complete_run(folder: Path) -> Path:
    """Return the run in a folder that finished last.

    Raises:
        UserError: If no run has finished.
    """
    complete = newest_file(folder.glob("version_*/test.csv"))
    if complete is not None:
        return complete.parent
    command = {"baseline": ["fit"], "tuned": ["tune"]}.get(folder.name, ["fit", "--name", folder.name])
    newest = newest_file(folder.glob("version_*"))
    if newest is None:
        raise UserError(f"There is no run in {folder} yet. Start one: {command_line(*command)}")
    last = newest / "checkpoints/last.ckpt"
    remedy = f"Continue it: {command_line('fit', '--ckpt_path', last)}"
    if not last.is_file():
        remedy = f"It has no checkpoint. Start a new run: {command_line(*command)}"
    raise UserError(f"{newest} was stopped before it finished. {remedy}")


def newest_result(logs: Path, kind: str) -> Path:
    """Return the ``last`` or ``best`` checkpoint of the newest complete run ``tuned``, or else ``baseline``.

    Raises:
        UserError: If neither has a complete run.
    """
    for name in ("tuned", "baseline"):
        complete = [path.with_name("checkpoints") / f"{kind}.ckpt" for path in logs.glob(f"{name}/version_*/test.csv")]
        if newest := newest_file(path for path in complete if path.is_file()):
            return newest
    raise UserError(
        f"There is no complete tuned or baseline run in {logs}. Train one with `{PROG} fit`, "
        "or name another with --name or --ckpt_path."
    )


def read_environment(folder: Path) -> dict[str, Any]:
    """Return the content of ``environment.json`` in a run folder; empty if it is missing or damaged."""
    with suppress(OSError, ValueError):
        return dict(json.loads((folder / "environment.json").read_text(encoding="utf-8")))
    return {}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config in a run folder.

    Raises:
        UserError: If the file is damaged.
        OSError: If the file cannot be read.
    """
    path = folder / "config.yaml"
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def environment(*words: object) -> dict[str, Any]:
    """Return what made a run, besides its config: the command, versions, the machine, and the commit of the project.

    Args:
        *words: Words of the command. Passwords in URLs are hidden.
    """
    names = ("torch", "torchvision", "lightning", "numpy")
    commit = _git("rev-parse", "HEAD")
    return {
        "command": hide_password(command_line(*words)),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "mnist_lightning": __version__,
        **{name: importlib.metadata.version(name) for name in names},
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": torch.cuda.device_count(),  # their names would start CUDA, after which no notebook can start processes
        "commit": commit,
        "has_uncommitted_changes": None
        if commit is None
        else bool(_git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")),
    }


def _git(*words: str) -> str | None:
    """Return the output of git in the current folder, or None if this is not a repository."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            ["git", *words],  # noqa: S607 - git is where the user has it
            capture_output=True, text=True, encoding="utf-8", check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    return None


def new_version(folder: Path) -> int:
    """Make the next ``version_N`` in a folder.

    This is safe among processes: only one of them succeeds in making the folder.

    Args:
        folder: Folder of the versions; made if it does not exist.

    Returns:
        The number N.
    """
    versions = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    version = max(versions, default=-1) + 1
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        try:
            (folder / f"version_{version}").mkdir(parents=True)
        except FileExistsError:
            return new_version(folder)
    return version
