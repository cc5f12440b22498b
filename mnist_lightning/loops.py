"""The training loops: Lightning's, with a short way for steps around which nothing else happens."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from mnist_lightning.callbacks import EpochProgressBar
from mnist_lightning.checkpoints import RunCheckpoint
from mnist_lightning.classifier import Classifier

STEP_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
"""Of a callback, inside a step."""

TRANSFER_HOOKS = ("transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer")
"""Of a data module, inside a step."""


class NoProfiler(PassThroughProfiler):
    """Lightning enters its profiler some 50 times a step, where it makes a context each time; this one has one."""

    context = nullcontext()

    def profile(self, action_name: str) -> Any:
        return self.context


class EpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, without the hooks of a step where nobody listens.

    Calling them takes Lightning a quarter of a millisecond a step, a fifth of the time that the notebook's network
    trains. All batches of an epoch but the last go the short way if nothing that a user can write would see the
    difference: with the package's own module, on one device, in single precision, and without clipping, accumulation,
    profiler, or a hook inside the step of a callback or data module, but for Lightning's averages of weights. The last
    batch and all other trainings go Lightning's own way. The counters, so the checkpoints, are the same.
    """

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on one batch, or on all up to the last of the epoch."""
        if not self.restarting and self._can_skip_hooks():
            self._advance_to_last(data_fetcher)
        super().advance(data_fetcher)

    def _can_skip_hooks(self) -> bool:
        trainer: Any = self.trainer
        module, data = trainer.lightning_module, trainer.datamodule
        own_callbacks, averages = (EpochProgressBar, RunCheckpoint), _averages(trainer)
        return (
            # a subclass may do anything in a step, and so may a method that was set on the module itself
            type(module) is Classifier
            and module.automatic_optimization
            and not any(callable(value) and hasattr(Classifier, name) for name, value in vars(module).items())
            and (data is None or not _overrides(data, LightningDataModule, TRANSFER_HOOKS))
            and not any(
                _overrides(callback, Callback, STEP_HOOKS)
                for callback in trainer.callbacks
                if type(callback) not in own_callbacks and callback not in averages
            )
            and type(trainer.strategy) is SingleDeviceStrategy
            and type(trainer.precision_plugin) is Precision
            and type(trainer.profiler) is NoProfiler
            and trainer.accumulate_grad_batches == 1
            and not trainer.gradient_clip_val
            and trainer.max_steps == -1
            and trainer.check_val_every_n_epoch is not None
            and trainer.val_check_batch == trainer.num_training_batches  # validation only follows the last batch
        )

    def _advance_to_last(self, data_fetcher: _DataFetcher) -> None:
        trainer: Any = self.trainer
        module, bar, (optimizer,) = trainer.lightning_module, trainer.progress_bar_callback, trainer.optimizers
        listeners = [*([bar] if bar is not None else []), *_averages(trainer)]
        step, zero_grad = (
            getattr(self.automatic_optimization.optim_progress.optimizer, name) for name in ("step", "zero_grad")
        )

        def closure() -> Tensor:
            loss: Tensor = module.training_step(batch)
            optimizer.zero_grad()
            zero_grad.increment_ready()
            zero_grad.increment_started()
            zero_grad.increment_completed()
            loss.backward()
            return loss

        while (
            self.batch_idx + 2 < trainer.num_training_batches
            and not trainer.should_stop
            and not trainer.received_sigterm
        ):
            batch, batch_idx, _ = next(data_fetcher)
            batch = trainer.strategy.batch_to_device(batch)
            self.batch_progress.increment_ready()
            self.batch_progress.increment_started()
            step.increment_ready()
            optimizer.step(closure)
            step.increment_completed()
            self.batch_progress.increment_processed()
            if trainer.lr_scheduler_configs:
                self.update_lr_schedulers("step", update_plateau_schedulers=False)
            for listener in listeners:
                listener.on_train_batch_end(trainer, module, {}, batch, batch_idx)
            self.batch_progress.increment_completed()
            if trainer.lr_scheduler_configs:
                self.update_lr_schedulers("step", update_plateau_schedulers=True)
            self._batches_that_stepped += 1


def _averages(trainer: Any) -> list[WeightAveraging]:
    """Lightning's averages of weights, which need nothing of a step but its end."""
    return [
        callback
        for callback in trainer.callbacks
        if isinstance(callback, WeightAveraging) and not _overrides(callback, WeightAveraging, STEP_HOOKS)
    ]


def _overrides(listener: Any, base: type, hooks: Sequence[str]) -> bool:
    return any(getattr(getattr(listener, hook), "__func__", None) is not getattr(base, hook) for hook in hooks)


class FitLoop(_FitLoop):
    """Lightning's loop over the epochs, which also starts and ends a resumed training of which no epoch is left.

    So a run that was killed between its last epoch and its evaluation gets all that a run folder holds.

    Args:
        trainer: The trainer whose loop it becomes.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.min_epochs, trainer.max_epochs)
        self.epoch_loop = EpochLoop(trainer, trainer.min_steps, trainer.max_steps)

    def _iteration_based_training(self) -> bool:
        # Lightning continues a training with max_steps inside an epoch; here all checkpoints are of an epoch's end
        return False

    @property
    def skip(self) -> bool:
        """Whether not even the start and the end of the training are run."""
        return bool(self.trainer.limit_train_batches == 0 or (self.done and not self.is_resuming))
