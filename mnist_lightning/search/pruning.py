"""A callback for an objective of your own: report to an Optuna trial, and prune it."""

import optuna
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from mnist_lightning.system.errors import UserError


class PruningCallback(Checkpoint):
    """Report a metric to an Optuna trial after each validation, and end the training if the study's pruner says so.

    ``tune`` reports by itself; this is for ``study.optimize`` with an objective of your own. Lightning calls a
    Checkpoint last, so the run keeps the epoch after which it was pruned.

    Args:
        trial: The trial.
        monitor: Name of a logged metric, such as ``val/accuracy``.
    """

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        self._trial = trial
        self._monitor = monitor
        self._is_validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the metric.

        Raises:
            TrialPruned: If the pruner ends the trial.
            UserError: If the metric is not logged.
        """
        if not self._is_validated:  # because of check_val_every_n_epoch
            return
        self._is_validated = False
        if self._monitor not in trainer.callback_metrics:
            raise UserError(f"{self._monitor} is not logged. Logged metrics: {', '.join(trainer.callback_metrics)}.")
        self._trial.report(trainer.callback_metrics[self._monitor].item(), trainer.current_epoch)
        if self._trial.should_prune():
            raise optuna.TrialPruned(f"pruned after epoch {trainer.current_epoch + 1}")
