"""Continue the run of a SLURM job that was requeued."""

import os
import signal
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer

from mnist_lightning.training.runs import newest_file


class SlurmJob:
    """The job of this process.

    Lightning's own handler saves in the middle of a step, where processes may block each other forever, and every other
    job in the folder would continue from that file. Here a job marks its run and continues from the last epoch.

    Args:
        arguments: The command's arguments: a job may run several commands, and each continues its own run.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        array = [os.environ[key] for key in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID") if key in os.environ]
        self._id = "_".join(array or [os.environ["SLURM_JOB_ID"]])
        self._mark = f"slurm_{self._id}_{zlib.crc32(' '.join(arguments).encode()):08x}"

    def checkpoint(self, folder: Path) -> Path | None:
        """Return the last checkpoint of the job's run in a folder if the job was requeued, or None."""
        if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            return None
        runs = [mark.parent for mark in folder.glob(f"version_*/{self._mark}")]
        return newest_file(path for run in runs if (path := run / "checkpoints/last.ckpt").is_file())

    def watch(self, trainer: Trainer, run_dir: Path) -> None:
        """Mark the run, and ask to be requeued when SLURM signals the time limit."""
        environment = trainer._accelerator_connector.cluster_environment
        if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
            return

        def requeue(*_: object) -> None:
            if trainer.is_global_zero:
                subprocess.run(["scontrol", "requeue", self._id], check=False)  # noqa: S607

        signal.signal(environment.requeue_signal or signal.SIGUSR1, requeue)
        if trainer.is_global_zero:
            (run_dir / self._mark).touch()
