"""Run folders: find and number them."""

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mnist_lightning.system.console import PROG, command_line
from mnist_lightning.system.errors import UserError

LOGS = "lightning_logs"
"""Folder of all runs, studies and reports."""
RUN_KEYS = ("seed_everything", "num_threads", "tensorboard", "fast", "trainer", "model", "data")
"""What the config of a run consists of, beside its name and origin."""


def newest_file(paths: Iterable[Path]) -> Path | None:
    """Return the file that was written last, or None if there is no file."""
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def newest_checkpoint(folder: Path, kind: str) -> Path:
    """Return the ``last`` or ``best`` checkpoint that was written last, of the runs in a folder.

    Raises:
        UserError: If no run has one.
    """
    newest = newest_file(folder.glob(f"version_*/checkpoints/{kind}.ckpt"))
    if newest is None:
        raise UserError(
            f"No run in {folder} has a {kind}.ckpt. Train one with `{PROG} fit`, "
            "or name another with --name or --ckpt_path."
        )
    return newest


def newest_complete_run(folder: Path) -> Path:
    """Return the run in a folder that was evaluated last.

    Raises:
        UserError: If no run was trained to its end.
    """
    complete = newest_file(folder.glob("version_*/test.csv"))
    if complete is not None:
        return complete.parent
    command = {"baseline": ["fit"], "tuned": ["tune"]}.get(folder.name, ["fit", "--name", folder.name])
    newest = newest_file(folder.glob("version_*"))
    if newest is None:
        raise UserError(f"No run in {folder} yet. Make one: {command_line(*command)}")
    last = newest / "checkpoints/last.ckpt"
    remedy = f"Continue it: {command_line('fit', '--ckpt_path', last)}"
    if not last.is_file():
        remedy = f"It has no checkpoint either. Make a new one: {command_line(*command)}"
    raise UserError(f"{newest} was stopped before its end. {remedy}")


def newest_result(logs: Path) -> Path:
    """Return the last checkpoint of the newest complete run that ``tune`` made, or else ``fit``.

    Raises:
        UserError: If neither has made one.
    """
    for name in ("tuned", "baseline"):
        complete = [path.with_name("checkpoints") / "last.ckpt" for path in logs.glob(f"{name}/version_*/test.csv")]
        if newest := newest_file(path for path in complete if path.is_file()):
            return newest
    raise UserError(
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
