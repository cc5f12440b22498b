"""Make ``fit`` fast: a short way through a training step, around Lightning's hooks.

Lightning calls about 30 hooks around each batch, and most of them do nothing. So all batches of an epoch but the last
take the short way: forward, backward, step, and Lightning's counters. The weights, metrics and checkpoints are the same
to the bit (``tests/training/test_fast.py``).

Lightning's own loop runs wherever anything that a user can write, choose or replace would see the difference: see
:func:`is_unwatched`. With ``--fast false`` it always runs. ``benchmarks/tricks.py`` measures the gain of the short way.

This is the only module that depends on the internals of Lightning's training loop.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.hooks import ModelHooks
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from mnist_lightning.classifier import Classifier
from mnist_lightning.training.checkpoints import RunCheckpoint
from mnist_lightning.training.progress import EpochProgressBar

CALLBACK_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
DATA_HOOKS = ("transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer")
MODULE_HOOKS = (
    *CALLBACK_HOOKS,
    *DATA_HOOKS,
    "training_step",
    "backward",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
)
"""Hooks that Lightning calls in a step: of a callback, a data module and a module."""

KNOWN_FILES = {
    inspect.getfile(each)
    for each in (
        *(Callback, LightningModule, ModelHooks, WeightAveraging),
        *(Classifier, EpochProgressBar, RunCheckpoint),
    )
}
"""Source files whose hooks the short way skips or calls itself."""


def speed_up(trainer: Trainer) -> None:
    """Make a trainer take the short way where possible."""
    trainer.fit_loop.epoch_loop = EpochLoop(trainer, trainer.min_steps, trainer.max_steps)


def is_unwatched(trainer: Any) -> bool:
    """Return whether only Lightning and this package see or change the steps of this epoch.

    The module must be this package's own, on one device and in single precision, without clipping, accumulation or a
    profiler, and every hook in a step must come from a known source file. The files also reveal a function that a user
    has set on a module or its class, in place of ours or around it.
    """
    module, data = trainer.lightning_module, trainer.datamodule
    return (
        type(module) is Classifier  # a subclass may do anything in a step
        and module.automatic_optimization
        and _has_known(module, MODULE_HOOKS)
        and (data is None or _has_known(data, DATA_HOOKS))
        and all(_has_known(callback, CALLBACK_HOOKS) for callback in trainer.callbacks)
        and type(trainer.strategy) is SingleDeviceStrategy
        and type(trainer.precision_plugin) is Precision
        and type(trainer.profiler) is PassThroughProfiler
        and trainer.accumulate_grad_batches == 1
        and not trainer.gradient_clip_val
        and trainer.max_steps == -1
        and trainer.check_val_every_n_epoch is not None
        and math.isfinite(trainer.num_training_batches)
        and trainer.val_check_batch == trainer.num_training_batches  # validation only follows the last batch
    )


def _has_known(listener: Callback | LightningDataModule | LightningModule, hooks: Sequence[str]) -> bool:
    codes = [getattr(getattr(listener, hook), "__code__", None) for hook in hooks]
    return all(code is not None and code.co_filename in KNOWN_FILES for code in codes)


class EpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, which takes the short way if :func:`is_unwatched` allows it."""

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        self._is_unwatched = is_unwatched(self.trainer)

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on one batch, or on all remaining batches of the epoch, all but the last by the short way."""
        if self._is_unwatched and not self.restarting:
            self._advance_to_last(data_fetcher)
        super().advance(data_fetcher)

    def _advance_to_last(self, data_fetcher: _DataFetcher) -> None:
        trainer: Any = self.trainer
        module, (optimizer,) = trainer.lightning_module, trainer.optimizers
        listeners = [each for each in trainer.callbacks if isinstance(each, EpochProgressBar | WeightAveraging)]
        progress, counts = self.batch_progress, self.automatic_optimization.optim_progress.optimizer

        def closure() -> Tensor:
            loss: Tensor = module.training_step(batch)
            optimizer.zero_grad()
            counts.zero_grad.increment_ready()
            counts.zero_grad.increment_started()
            counts.zero_grad.increment_completed()
            loss.backward()
            return loss

        while (
            self.batch_idx + 2 < trainer.num_training_batches
            and not trainer.should_stop
            and not trainer.received_sigterm
        ):
            batch, batch_idx, _ = next(data_fetcher)
            batch = move_data_to_device(batch, trainer.strategy.root_device)
            progress.increment_ready()
            progress.increment_started()
            counts.step.increment_ready()
            optimizer.step(closure)
            counts.step.increment_completed()
            progress.increment_processed()
            if trainer.lr_scheduler_configs:
                self.update_lr_schedulers("step", update_plateau_schedulers=False)
            for listener in listeners:
                listener.on_train_batch_end(trainer, module, {}, batch, batch_idx)
            progress.increment_completed()
            if trainer.lr_scheduler_configs:
                self.update_lr_schedulers("step", update_plateau_schedulers=True)
            self._batches_that_stepped += 1
