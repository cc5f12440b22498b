"""Checkpoints: a run that is killed at any moment continues with identical results."""

import io
import math
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from mnist_lightning.system.console import rank_zero_print
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.files import atomic_write, write_csv
from mnist_lightning.training.saved_run import SavedRun, checkpoint_errors, load_checkpoint, read_history

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""Path of the function that makes a model from the hyper-parameters in a checkpoint."""


class CheckpointConnector(_CheckpointConnector):
    """Restore a trainer and its parts from a checkpoint, or explain why it cannot be used."""

    def _restore_modules_and_callbacks(self, checkpoint_path: Any = None, *args: Any) -> None:
        with checkpoint_errors(checkpoint_path):
            super()._restore_modules_and_callbacks(checkpoint_path, *args)

    def restore_training_state(self) -> None:
        with checkpoint_errors(self._ckpt_path):
            super().restore_training_state()


class FitLoop(_FitLoop):
    """Lightning's loop over the epochs, which also starts and ends a continued training with no epochs left.

    This completes the run folder of a run that was killed between its last epoch and its evaluation.

    Args:
        trainer: The trainer that uses the loop.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.min_epochs, trainer.max_epochs)
        self.epoch_loop = trainer.fit_loop.epoch_loop

    def _iteration_based_training(self) -> bool:
        # with max_steps, Lightning continues inside an epoch; here all checkpoints are from an epoch's end
        return False

    @property
    def skip(self) -> bool:
        """Whether to skip even the start and the end of the training."""
        return bool(self.trainer.limit_train_batches == 0 or (self.done and not self.is_resuming))


class CheckpointIO(TorchCheckpointIO):
    """Write a checkpoint next to its place and rename it; load only tensors and plain types.

    (Lightning's class copies the checkpoint from the system's temporary folder, and it runs the code in a malicious
    local checkpoint.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        buffer = io.BytesIO()  # on a full disk, torch.save itself only reports "unexpected pos"
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(path)) as partial:
            partial.write_bytes(buffer.getbuffer())

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load a checkpoint from ``path``, always with ``weights_only``."""
        return load_checkpoint(path, map_location)


class RunCheckpoint(ModelCheckpoint):
    """``checkpoints/best.ckpt``, ``checkpoints/last.ckpt`` and ``metrics.csv`` of a run, updated after every epoch.

    The best checkpoint is from the earliest epoch with the highest ``val/accuracy``, or the best value of another
    metric. In addition to Lightning's state, a checkpoint stores the random state of Python, NumPy and torch and the
    metrics of all epochs so far. A run that continues from it draws the same shuffles and dropout masks as a run that
    was never interrupted. Its run folder is complete: it has the metrics of all epochs, and the best checkpoint even if
    that is from before the interruption.

    Args:
        config: The run's config, in plain types, to be stored in its checkpoints.
        monitor: The metric.
        mode: ``max`` or ``min``.

    Attributes:
        config: The run's config.
        history: One row an epoch: ``epoch``, ``step`` and the logged metrics.
        seconds: Training time up to the last checkpoint, including validation and logs.
    """

    def __init__(
        self, config: dict[str, Any] | None = None, monitor: str = "val/accuracy", mode: Literal["max", "min"] = "max"
    ) -> None:
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode,
            save_last=True,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.config = config
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self._since = time.perf_counter()
        self._val_metrics: dict[str, float] = {}
        self._validated: dict[str, torch.Tensor] = {}
        self._continued_from: Path | None = None
        self._is_stopped = False
        self._is_changed_at_end = False
        self._done_batches = 0

    @property
    def state_key(self) -> str:
        return "RunCheckpoint"  # the callback's name in a checkpoint file

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        # trainer.log_dir waits until all processes ask for it
        return Path(str(self.dirpath)).parent

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the checkpoint of a continued run before it is loaded; refuse one without the full state."""
        if trainer.state.fn == TrainerFn.FITTING:
            parts = (
                checkpoint["callbacks"][self.state_key],
                checkpoint["loops"]["fit_loop"],
                checkpoint["optimizer_states"],
            )
            if not all(parts):
                raise ValueError("nothing to continue from")
            epochs = parts[1]["epoch_progress"]["current"]
            batches = parts[1]["epoch_loop.batch_progress"]
            is_inside = epochs["processed"] != epochs["ready"] or not batches["is_last_batch"]
            self._done_batches = int(batches["current"]["ready"]) if is_inside else 0
            if parts[0].get("is_changed_at_end"):
                rank_zero_print(
                    f"{trainer.ckpt_path} has weights that a callback computed from the last ones, such as an average."
                )
            self._continued_from = Path(str(trainer.ckpt_path))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the logs and the learning rate of a continued run to the state of its checkpoint."""
        super().on_train_start(trainer, pl_module)
        self._since = time.perf_counter()
        if self._continued_from is None:
            return
        for row in self.history:
            metrics = {name: value for name, value in row.items() if name != "step"}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=int(row["step"]))
        self._write_metrics(trainer)
        # Lightning steps these schedulers after it has written the epoch's checkpoint
        epoch = self.history[-1]
        for config in trainer.lr_scheduler_configs:
            is_due = config.interval == "epoch" and (epoch["epoch"] + 1) % config.frequency == 0
            if config.reduce_on_plateau and is_due and config.monitor in epoch:
                config.scheduler.step(epoch[config.monitor])  # type: ignore[arg-type]
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if self._is_stopped and any(isinstance(callback, EarlyStopping) for callback in callbacks):
            rank_zero_print(f"EarlyStopping had ended this training after epoch {epoch['epoch'] + 1}.")
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to continue from inside an epoch; a run that was stopped there may still be evaluated.

        Raises:
            UserError: If the checkpoint was written in the middle of an epoch.
        """
        if self._done_batches:
            raise UserError(
                f"{self._continued_from} was written inside an epoch, after batch {self._done_batches}, so the run "
                "cannot be continued exactly. Use a checkpoint from an epoch's end, or start a new run."
            )

    def on_train_batch_end(self, *_: Any) -> None:
        pass  # only epochs are saved

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of ``val`` for the epoch's row."""
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics.items()
        self._val_metrics = {name: value.item() for name, value in metrics if name.startswith("val/")}
        self._validated = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def _validate_again(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Validate the weights that are about to be saved, if they differ from the validated weights.

        They differ if the last validation was inside the epoch, or if a callback prunes or averages weights after it.
        Other callbacks are not called: EarlyStopping would count this validation.

        Returns:
            Whether the weights differed.
        """
        weights = pl_module.state_dict()
        if weights.keys() == self._validated.keys() and all(
            torch.equal(value, self._validated[name]) for name, value in weights.items()
        ):
            return False
        listeners, trainer.callbacks = trainer.callbacks, [self]  # type: ignore[attr-defined]
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        trainer.callbacks = listeners  # type: ignore[attr-defined]
        return True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch's row, then save."""
        is_inside = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch  # with max_steps or max_time
        if trainer.enable_validation and (self._val_metrics or is_inside):
            self._validate_again(trainer, pl_module)
        metrics = {n: value.item() for n, value in trainer.callback_metrics.items() if not n.startswith("val/")}
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step - 1, **metrics, **self._val_metrics}
        self._val_metrics = {}  # an epoch without validation does not have any
        self.history.append(row)
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        self._is_stopped = trainer.should_stop
        self._write_metrics(trainer)
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            # Lightning's own method updates last.ckpt only together with best.ckpt
            self._save_last_checkpoint(trainer, candidates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the run folder of a continued run with no epochs left, and save weights that the end has changed."""
        if self._continued_from is not None and not self.last_model_path:
            self.last_model_path = str(Path(str(self.dirpath), "last.ckpt"))
            _copy(self._continued_from, Path(self.last_model_path))
        if not self.last_model_path:
            return
        weights, is_changed = pl_module.state_dict(), False
        if trainer.is_global_zero:
            saved = SavedRun.read(self.last_model_path).weights
            is_changed = any(not torch.equal(value.cpu(), saved[name]) for name, value in weights.items())
        if trainer.strategy.broadcast(is_changed):  # to averages, as with StochasticWeightAveraging
            self._is_changed_at_end = True
            if trainer.enable_validation and self._validate_again(trainer, pl_module):
                self.history[-1] |= self._val_metrics
                self._write_metrics(trainer)
                self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._save_checkpoint(trainer, self.last_model_path)

    def state_dict(self) -> dict[str, Any]:
        """Return Lightning's state, the history and each process's random state, in plain types and tensors."""
        name, keys, *rest = np.random.get_state(legacy=True)
        random_state = {
            "python": random.getstate(),
            "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }
        random_states = [random_state]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            random_states *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(random_states, random_state)
        return {
            **super().state_dict(),
            "config": self.config,
            "history": self.history,
            "seconds": self.seconds,
            "is_stopped": self._is_stopped,
            "is_changed_at_end": self._is_changed_at_end,
            "random_states": random_states,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history, the random state and the best checkpoint of the continued run."""
        if self._continued_from is None or self.dirpath is None:  # an evaluation needs only weights
            return
        self.history = read_history(state_dict)
        self.seconds = float(state_dict["seconds"])
        self._is_stopped = bool(state_dict.get("is_stopped"))
        self._set_random_state(state_dict["random_states"])

        old, new = self._continued_from.with_name("best.ckpt"), Path(self.dirpath, "best.ckpt")
        last_epoch = self.history[-1]["epoch"]
        epoch_of_best = math.inf
        with suppress(Exception):  # a damaged file may raise anything, but the run does not continue from it
            epoch_of_best = SavedRun.read(old).epoch
        if epoch_of_best <= last_epoch:
            _copy(old, new)
            moved = {name: str(new) for name in ("best_model_path", "kth_best_model_path")}
            float(state_dict["best_model_score"])  # raises an error here instead of at the next epoch
            score = {"best_k_models": {str(new): state_dict["best_model_score"]}, "last_model_path": ""}
            super().load_state_dict({**state_dict, **moved, **score, "dirpath": self.dirpath})
        elif state_dict["best_model_path"]:
            reason = (
                "is from a later epoch" if epoch_of_best < math.inf else "is damaged" if old.is_file() else "is gone"
            )
            rank_zero_warn(f"{old} {reason}: only epochs from here on can become the best epoch.")

    def _set_random_state(self, states: list[dict[str, Any]]) -> None:
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_distributed else (0, 1)
        if len(states) != size:
            rank_zero_warn(
                f"This run has another number of processes ({size}) than its checkpoint ({len(states)}): its results "
                "will not be identical."
            )
            return
        state = states[rank]
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    @rank_zero_only
    def _write_metrics(self, trainer: Trainer) -> None:
        if not any(isinstance(each, CSVLogger) and Path(each.log_dir) == self.run_dir for each in trainer.loggers):
            write_csv(self.run_dir / "metrics.csv", self.history)  # CSVLogger's file has the same name


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as partial:
        shutil.copyfile(source, partial)
