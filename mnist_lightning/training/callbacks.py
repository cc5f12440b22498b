"""TensorBoard's events of a run, and the notebook's pictures there and in the run's folder."""

import copy
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pkgutil import resolve_name
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from mnist_lightning.data import Batch, ImageDataModule
from mnist_lightning.system.files import atomic_write
from mnist_lightning.system.nested import flatten, spread
from mnist_lightning.training import figures
from mnist_lightning.training.checkpoints import RunCheckpoint

OF_EPOCHS = {"train/loss", "val/loss", "test/loss"}
"""Metrics that are logged together with all others of an epoch."""

SHOWN_EPOCHS = 10
"""The most epochs with a confusion matrix in TensorBoard, which shows ten pictures of a name."""

COMPARED = ("max_epochs", "precision", "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches")
"""Keys of the trainer that TensorBoard's page "HParams" has."""


class RunLogger(TensorBoardLogger):
    """TensorBoard's events of a run or of an execution of a trial.

    The x axis is the epoch, counted from 1, since runs may have different batch sizes. The learning rate is among the
    charts of ``train``.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics, those of an epoch at its number."""
        values = {"train/lr" if name == "lr" else name: value for name, value in metrics.items() if name != "epoch"}
        if "epoch" in metrics and OF_EPOCHS & values.keys():
            step = int(metrics["epoch"]) + 1
        super().log_metrics(values, step)

    @rank_zero_only
    def log_settings(self, config: Mapping[str, Any]) -> None:
        """Log a run's config for the page "HParams", by its keys; a list's items are ``.0``, ``.1`` and so on.

        Without the list of settings and metrics that ``log_hyperparams`` also writes, TensorBoard shows those of all
        runs, not only those of the first.
        """
        trainer = {key: config["trainer"].get(key) for key in COMPARED}
        values = flatten({**_by_layer(config), "trainer": trainer}, with_items=True)
        values = {key: value for key, value in values.items() if isinstance(value, bool | int | float | str)}
        names = [key for key in values if re.match(r"(trainer|model|data|seed_everything)\b", key)]
        _, start, end = hparams({key: values[key] for key in names if not key.endswith(".data_dir")}, {})
        for summary in (start, end):
            self.experiment.file_writer.add_summary(summary)


def _by_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with a list where one number stands for all of a network's layers, as in trials of a search."""
    keys = []
    with suppress(AttributeError, ImportError, KeyError, NameError, TypeError):  # a user's own network may be anything
        hints = get_type_hints(resolve_name(config["model"]["network"]["class_path"]).__init__)
        for name, hint in hints.items():
            if any(get_origin(part) in (list, Sequence) for part in get_args(hint)):
                keys.append(f"model.network.init_args.{name}.0")
    return spread(dict(config), keys)


class Figures(Callback):
    """The notebook's figures, in ``figures/`` of the run folder and in TensorBoard.

    TensorBoard also gets the confusion matrices of up to ten epochs, the graph, for each metric a chart of validation
    and one with training beside it (page "Custom scalars"), and the hyper-parameters (page "HParams").

    Args:
        checkpoint: Keeps the history that the curves show.
    """

    def __init__(self, checkpoint: RunCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._confusion = torch.zeros(0)
        self._is_first = True
        self._loggers: Sequence[Logger] = ()
        self._drawn_at = time.monotonic()
        self._is_tested = False

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show training samples and the network."""
        self._loggers = trainer.loggers  # fit tests without them
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        assert data.train is not None
        indices = range(min(25, len(data.train)))
        with isolate_rng():  # augmentation draws, and a continued run must not draw more often
            images, _ = data.train.__getitems__(indices)
        names = [data.classes[label] for label in data.train.labels[: len(indices)]]
        grid = figures.image_grid(figures.pictures(images), names, columns=5, title="training images")
        self._show(trainer, "samples", grid, trainer.loggers)
        for logger in _tensorboards(trainer):
            # evaluation mode does not use the random state
            network: Any = copy.deepcopy(pl_module.network)
            try:
                logger.experiment.add_graph(network.eval(), images[:1].to(pl_module.device).type(pl_module.dtype))
            except Exception as error:  # a network that cannot be traced may raise anything
                rank_zero_warn(f"TensorBoard gets no graph, because the network cannot be traced: {error}")

    @rank_zero_only
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves at most once a minute, in case the run is killed."""
        if time.monotonic() - self._drawn_at > 60:
            self._draw_curves(trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._confusion.zero_()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor,  # type: ignore[override]
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        labels, (_, classes) = batch[1], outputs.shape
        if not self._confusion.numel():
            self._confusion = torch.zeros(classes, classes, dtype=torch.long, device=labels.device)
        self._confusion.index_put_((labels, outputs.argmax(dim=1)), torch.ones_like(labels), accumulate=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the confusion matrix of the epoch."""
        counts = trainer.strategy.reduce(self._confusion, reduce_op="sum").cpu().numpy()
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        epochs = trainer.current_epoch + 1
        if trainer.loggers and epochs % max(1, math.ceil((trainer.max_epochs or 0) / SHOWN_EPOCHS)) == 0:
            title = f"validation, epoch {epochs}"
            names = trainer.datamodule.names(len(counts))  # type: ignore[attr-defined]
            figure = figures.confusion_matrix(counts, title, names, is_quick=True)
            _log_image(trainer.loggers, "confusion_matrix/val", figures.render(figure), trainer, epochs)
        if self._is_first:
            self._is_first = False
            names = [name.removeprefix("val/") for name in trainer.callback_metrics if name.startswith("val/")]
            layout = {  # of many runs, only one line each can be told apart
                "validation": {name: ["Multiline", [f"^val/{name}$"]] for name in names},
                "training and validation": {name: ["Multiline", [f"^(train|val)/{name}$"]] for name in names},
            }
            for logger in _tensorboards(trainer):
                logger.experiment.add_custom_scalars(layout)
                if isinstance(logger, RunLogger):
                    logger.log_settings(self._checkpoint.config or {})

    @rank_zero_only
    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the curves and the network's predictions for the first ten test images."""
        self._draw_curves(trainer, trainer.loggers)
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        data.setup("test")
        assert data.test is not None
        indices = range(min(10, len(data.test)))
        images, labels = data.test.__getitems__(indices)
        pl_module.eval()
        logits = pl_module(images.to(pl_module.device).type(pl_module.dtype))
        names = data.names(logits.shape[1])
        truths, guesses = ([names[index] for index in classes] for classes in (labels, logits.argmax(dim=1)))
        pictures = figures.pictures(data.test.scaled(indices))
        self._show(trainer, "predictions", figures.predictions(pictures, truths, guesses), trainer.loggers)

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw the curves of a run that was stopped."""
        with suppress(OSError):  # the disk may be full
            self._draw_curves(trainer)

    # fit tests first the weights of the last epoch, then those of the best
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the confusion matrix of the first test, which is of the weights of the last epoch."""
        counts = trainer.strategy.reduce(self._confusion, reduce_op="sum").cpu().numpy()
        is_first, self._is_tested = not self._is_tested, True
        if is_first and trainer.is_global_zero:
            names = trainer.datamodule.names(len(counts))  # type: ignore[attr-defined]
            figure = figures.confusion_matrix(counts, f"{self._run}: test images, last epoch", names)
            self._show(trainer, "confusion_matrix", figure, self._loggers)

    @property
    def _run(self) -> str:
        return " ".join(self._checkpoint.run_dir.parts[-2:])

    def _draw_curves(self, trainer: Trainer, loggers: Sequence[Logger] = ()) -> None:
        """Draw the curves of the epochs so far."""
        model = self._checkpoint.run_dir.parent.name
        table = figures.tidy({model: [self._checkpoint.history]})
        for name, metrics in (("accuracy", ["accuracy"]), ("loss", ["penalized_loss", "loss"])):
            if logged := [metric for metric in metrics if metric in table["metric"].unique()]:
                figure = figures.curves(table, logged, {model: figures.COLORS[0]}, self._run)
                self._show(trainer, name, figure, loggers)
        self._drawn_at = time.monotonic()

    def _show(self, trainer: Trainer, name: str, figure: Figure, loggers: Sequence[Logger]) -> None:
        path = self._checkpoint.run_dir / f"figures/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = figures.render(figure)
        with atomic_write(path) as partial:
            Image.fromarray(pixels).save(partial, "PNG")
        _log_image(loggers, name, pixels, trainer, trainer.current_epoch)


def _log_image(loggers: Sequence[Logger], name: str, pixels: NDArray[np.uint8], trainer: Trainer, epochs: int) -> None:
    """Show a picture in the loggers that take pictures: in a :class:`RunLogger` after so many epochs."""
    step = trainer.global_step
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            at = epochs if isinstance(logger, RunLogger) else step
            logger.experiment.add_image(f"figures/{name}", pixels, at, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, pixels, key=name, step=step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [pixels], step)


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
