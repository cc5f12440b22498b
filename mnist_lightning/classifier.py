"""The LightningModule: cross-entropy and L2, metrics, any optimizer and schedule."""

import copy
import importlib
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ProgressBar, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers
from torchmetrics import Metric

from mnist_lightning.data import Batch
from mnist_lightning.metrics import EpochMetrics
from mnist_lightning.optimizers import KerasAdam, KerasRMSprop
from mnist_lightning.system.console import rank_zero_print
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.nested import flatten
from mnist_lightning.training.progress import CellProgressBar, is_in_cell

COUPLED = (
    KerasAdam,
    KerasRMSprop,
    torch.optim.Adam,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
)
"""Optimizers that add ``weight_decay * parameter`` to the gradient, unless their ``decoupled_weight_decay`` is set."""

TOTAL_STEPS = ("total_steps", "T_max", "total_iters")
"""Arguments of a scheduler for its total number of steps: -1 stands for that of the training."""

SCHEDULE = ("lr_scheduler", "lr_interval", "lr_frequency")
"""Hyper-parameters that may differ when a run is continued."""

SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum", "max_momentum", "base_momentum")
"""Values that a schedule keeps in the parameter groups of an optimizer."""


class Classifier(LightningModule):
    """Train a network on cross-entropy plus λ‖W‖² for every kernel that has an ``l2`` (see ``networks.Dense``).

    Optimizers that couple weight decay apply the gradient of the penalty, 2λW, as weight decay, in addition to their
    own ``weight_decay``. The penalty is added to the loss for other optimizers (AdamW, LBFGS, ...), if gradients are
    clipped, and if a kernel is computed from other parameters, as with ``weight_norm``. Either way a step applies the
    penalty once, however many batches it accumulates. The :meth:`metrics` are logged once an epoch, for each of
    ``train``, ``val`` and ``test``. The metrics of ``train`` are means over the epoch, while the weights change and
    dropout is on, as in Keras. ``lr`` is the learning rate of an epoch's first step.

    A training batch may have labels of shape (batch, classes) instead of (batch,), as MixUp makes them: shares of the
    classes. The loss uses the shares; the other metrics use the class with the largest share.

    Args:
        network: Maps images of shape (batch, channels, height, width) to logits of shape (batch, classes).
        optimizer: Makes an optimizer from parameters or parameter groups.
        lr_scheduler: Makes a learning-rate scheduler from the optimizer. If its ``total_steps``, ``T_max`` or
            ``total_iters`` is -1, it gets the number of times that it steps in the training.
        lr_interval: Unit that the scheduler counts; by default steps for OneCycleLR and CyclicLR, epochs for others.
        lr_frequency: The scheduler steps after this many units; by default after each, or after each validation if it
            monitors a validation metric.
        label_smoothing: Share of a label that is spread evenly over all classes (Szegedy et al. 2016) in the loss that
            the optimizer minimizes. The logged ``loss`` is computed without smoothing, so that runs can be compared.
        compile: Whether a trainer compiles the network with ``torch.compile``: True, or one of its modes.
        class_weights: Weight of each class in the loss that the optimizer minimizes, for unbalanced data, or
            ``balanced``: see :func:`balanced_weights`. As in Keras, the weighted losses of a batch are summed and
            divided by the number of its images. No logged metric is weighted.
        metrics: More metrics for ``val`` and ``test``, computed once an epoch from all images: classes of torchmetrics,
            or the words ``f1``, ``top3_accuracy``, ``top5_accuracy``, ... (see :class:`EpochMetrics`).

    Raises:
        UserError: If a class weight is negative or not finite, or a metric cannot be used.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = KerasAdam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] | None = None,
        lr_frequency: PositiveInt | None = None,
        label_smoothing: ClosedUnitInterval = 0.0,
        compile: bool | Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = False,
        class_weights: Literal["balanced"] | list[float] | None = None,
        metrics: list[Metric | str] | str | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.lr_frequency = lr_frequency
        self.label_smoothing = label_smoothing
        self.compile_mode = compile
        self.class_weights = class_weights
        self.loss_weights = checked_weights(class_weights) if isinstance(class_weights, list | tuple) else None
        self.epoch_metrics = EpochMetrics(metrics)
        self.penalized: list[Any] = [layer for layer in network.modules() if getattr(layer, "l2", 0)]
        self.penalty_in_loss = False
        self.totals: dict[str, dict[str, Tensor]] = {}
        self.schedule_steps: dict[str, int] = {}
        self.earlier_schedule: str | None = None
        self.example_input_array = torch.zeros(1, 1, 28, 28)  # for the layer table

    def __deepcopy__(self, memo: dict[int, Any]) -> "Classifier":
        """Copy everything but the factories of the optimizer and the schedule.

        Callbacks that average weights keep them in a copy. jsonargparse's factories refer to the parser and thereby to
        the trainer, whose processes and locks cannot be copied.
        """
        memo.update({id(factory): factory for factory in (self.optimizer, self.lr_scheduler)})
        copied: Classifier = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def configure_callbacks(self) -> list[Callback]:
        """Return a table of the epochs, if a trainer of the user's own would show its bar in a cell of a notebook."""
        bars = [callback for callback in self.trainer.callbacks if isinstance(callback, ProgressBar)]  # type: ignore[attr-defined]
        is_shown = not bars or any(isinstance(bar, CellProgressBar) for bar in bars)
        return [] if is_shown or not is_in_cell() else [CellProgressBar()]

    def setup(self, stage: str) -> None:
        """Set up this process, and compile the network if requested.

        Subnormal numbers are flushed to zero: L2 drives the kernels of pixels that are always black, and Adam's moments
        of them, into subnormals. Otherwise every step takes three times as long from the third epoch on. With several
        devices, each draws its own dropout masks.

        Raises:
            UserError: If torch cannot compile on this machine, or classes without training images cannot be balanced.
        """
        torch.set_flush_denormal(True)
        if isinstance(self.trainer.precision_plugin, DoublePrecision):
            self.double()  # Lightning does this after it has restored weights, which would round them
        if self.trainer.global_rank > 0 and stage == "fit":
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank)
        shape = getattr(getattr(self.trainer, "datamodule", None), "image_shape", None)
        if shape is not None:
            self.example_input_array = torch.zeros(1, *shape)
        if self.compile_mode and self.network._compiled_call_impl is None:
            check_compiler(self.trainer.strategy.root_device)
            # in place, so the names of the weights do not change; copies, such as averages, are not compiled
            self.network.compile(mode=None if self.compile_mode is True else self.compile_mode)
        if stage == "fit":
            self.balance(getattr(self.trainer, "datamodule", None))

    def balance(self, data: Any) -> None:
        """Compute the class weights from the training images of a data module, if they are ``balanced``.

        Raises:
            UserError: If there is no data module, or a class has no training images.
        """
        if self.class_weights != "balanced":
            return
        if getattr(data, "train", None) is None:
            raise UserError(
                "class_weights balanced needs a data module with training images. Add one, or give a list of weights."
            )
        self.loss_weights = balanced_weights(data.train.labels, data.classes)

    def check_images(self, shape: Sequence[int], classes: int) -> None:
        """Check that the network takes images of a shape and fits the classes; set the layer table's input.

        Args:
            shape: Channels, height and width.
            classes: Number of classes.

        Raises:
            UserError: If the network refuses the images or has too few outputs, or if the class weights or a metric are
                for another number of outputs.
        """
        self.example_input_array = torch.zeros(1, *shape)
        is_training = self.network.training
        try:
            with torch.no_grad():
                logits = self.network.eval()(self.example_input_array)
        except Exception as error:  # a user's network may raise anything
            reason = str(error).strip().partition("\n")[0]
            is_torchvision = type(self.network).__module__.startswith("torchvision.")
            other = "mnist_lightning.networks.TorchvisionModel with its name" if is_torchvision else "another network"
            raise UserError(
                f"{type(self.network).__name__} does not take images of shape {tuple(shape)} (channels, height, "
                f"width): {reason}. Change its arguments to fit, or use {other}."
            ) from error
        finally:
            self.network.train(is_training)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < classes:
            found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"For {classes} classes, {type(self.network).__name__} must return logits of shape (batch, {classes}), "
                f"but it returns {found} for one image."
            )
        self._check_weights(logits.shape[1])
        self.epoch_metrics.check(logits.shape[1])

    @property
    def kernels(self) -> dict[Tensor, float]:
        """The current kernels with a penalty, each with its λ; a kernel that several layers share appears once."""
        return {layer.weight: layer.l2 for layer in self.penalized}

    def configure_optimizers(self) -> Any:
        """Make the optimizer, with one parameter group for each distinct λ, and the scheduler."""
        optimizer, l2 = self.optimizer(self.parameters()), self.kernels
        coupled = isinstance(optimizer, COUPLED) and not optimizer.defaults.get("decoupled_weight_decay")
        coupled = coupled and all(isinstance(kernel, nn.Parameter) for kernel in l2)  # else computed from others
        # the penalty's gradient must be clipped, too, but weight decay comes after the clipping
        is_clipped = bool(self._trainer and self.trainer.gradient_clip_val)
        self.penalty_in_loss = bool(l2) and (is_clipped or not coupled)
        if l2 and coupled:
            own = optimizer.defaults.get("weight_decay", 0)
            groups: dict[float | None, list[nn.Parameter]] = defaultdict(list)
            for parameter in self.parameters():
                groups[l2.get(parameter)].append(parameter)
            optimizer = self.optimizer(
                [
                    {"params": parameters}
                    if factor is None
                    else {"params": parameters, "weight_decay": own + (0 if is_clipped else 2 * factor)}
                    for factor, parameters in groups.items()
                ]
            )
        if self.lr_scheduler is None:
            return optimizer
        given = getattr(self.lr_scheduler, "keywords", {})  # of a functools.partial
        totals = [name for name in TOTAL_STEPS if given.get(name) == -1]
        if "total_steps" in given and given["total_steps"] is given.get("epochs") is None:  # OneCycleLR's defaults
            totals.append("total_steps")
        # the scheduler's class decides how often it steps and so its total steps: make a sample to inspect
        steps = dict.fromkeys(totals, 100)
        sample = self.lr_scheduler(self.optimizer(self.parameters()), **steps)
        monitor = getattr(sample, "monitor", None)
        interval, frequency = self.lr_interval, self.lr_frequency
        if interval is None:
            interval = "step" if isinstance(sample, schedulers.OneCycleLR | schedulers.CyclicLR) else "epoch"
        if frequency is None:
            of_validation = interval == "epoch" and monitor and not monitor.startswith("train/") and self._trainer
            frequency = (self.trainer.check_val_every_n_epoch or 1) if of_validation else 1
        if totals and self._trainer:
            total = self._scheduler_steps(interval, frequency)
            if math.isinf(total):
                raise UserError(
                    f"{' and '.join(totals)} of the lr_scheduler cannot be -1 without max_epochs: set max_epochs, or "
                    "give a number."
                )
            steps = self.schedule_steps = dict.fromkeys(totals, max(1, int(total)))
        scheduler = self.lr_scheduler(optimizer, **steps)
        config = {"scheduler": scheduler, "interval": interval, "frequency": frequency, "monitor": monitor}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the state of the checkpoint's schedule if the continued run has another schedule."""
        before, now = checkpoint.get("hyper_parameters", {}), self.hparams
        if not all(name in parameters for parameters in (before, now) for name in SCHEDULE):
            return
        then, given = (flatten({name: parameters[name] for name in SCHEDULE}) for parameters in (before, now))
        if any(key not in given or given[key] != value for key, value in then.items()):
            checkpoint["lr_schedulers"] = []
            self.earlier_schedule = then.get("lr_scheduler.class_path", "a constant rate").rpartition(".")[2]

    def _scheduler_steps(self, interval: str, frequency: int, epochs: int | None = None) -> float:
        """Return how often a scheduler steps in some epochs or the whole training, as Lightning counts; maybe inf."""
        trainer = self.trainer
        trainer.fit_loop.setup_data()  # otherwise Lightning prints that it does so
        steps = trainer.estimated_stepping_batches
        if math.isinf(steps) or math.isinf(trainer.num_training_batches):
            return math.inf
        batches, accumulated = int(trainer.num_training_batches), trainer.accumulate_grad_batches
        epochs = math.ceil(steps / math.ceil(batches / accumulated)) if epochs is None else epochs
        if interval == "epoch":
            return epochs // frequency
        counted = [b for b in range(frequency, batches + 1, frequency) if b % accumulated == 0 or b == batches]
        return min(epochs * len(counted), steps)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, channels, height, width) to logits of shape (batch, classes)."""
        logits: Tensor = self.network(images)
        return logits

    def penalty(self) -> Tensor:
        """Return the sum of λ‖W‖² over the kernels that have an ``l2``: a scalar."""
        flat = [(_at_least_float32(kernel).flatten(), factor) for kernel, factor in self.kernels.items()]
        penalties = [factor * kernel.dot(kernel) for kernel, factor in flat]
        return sum(penalties[1:], start=penalties[0]) if penalties else torch.zeros((), device=self.device)

    def metrics(self, logits: Tensor, labels: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """Return all metrics of a batch: each is logged, printed, saved and compared, and a search can optimize it.

        Args:
            logits: Of shape (batch, classes).
            labels: True classes, of shape (batch,).
            loss: Cross-entropy, a scalar, without label smoothing.

        Returns:
            A dict from a metric's name to its values, of shape (batch,), or to their mean, a scalar: ``loss``,
            ``penalized_loss`` (with the penalty, as Keras's loss) and ``accuracy``.
        """
        return {"loss": loss, "penalized_loss": loss + self.penalty(), "accuracy": logits.argmax(dim=1) == labels}

    def objective(self, logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        """Return the loss of a training batch that the optimizer minimizes, without the penalty.

        Args:
            logits: Of shape (batch, classes).
            labels: True classes, of shape (batch,), or shares of the classes, of shape (batch, classes).
            loss: Cross-entropy, a scalar, without label smoothing and class weights.
        """
        if self.class_weights is None:
            smoothing = self.label_smoothing
            return F.cross_entropy(logits, labels, label_smoothing=smoothing) if smoothing else loss
        self._check_weights(logits.shape[1])
        assert self.loss_weights is not None, "call balance() first"
        self.loss_weights = self.loss_weights.to(logits)
        # torch's mean would divide by the sum of the weights, but by the number of images if labels are shares
        total = F.cross_entropy(
            logits, labels, self.loss_weights, reduction="sum", label_smoothing=self.label_smoothing
        )
        return total / len(labels)

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss of a batch that the optimizer minimizes."""
        loss, logits = self._step(batch, "train")
        loss = self.objective(logits, batch[1], loss)
        return loss + self._penalty_weight() * self.penalty() if self.penalty_in_loss else loss

    def validation_step(self, batch: Batch) -> Tensor:
        """Return the logits of a batch, of shape (batch, classes)."""
        return self._step(batch, "val")[1]

    def test_step(self, batch: Batch) -> Tensor:
        """Return the logits of a batch, of shape (batch, classes)."""
        return self._step(batch, "test")[1]

    def predict_step(self, batch: Batch) -> Tensor:
        """Return the probabilities of the classes for a batch, of shape (batch, classes)."""
        probabilities: Tensor = _at_least_float32(self(batch[0])).softmax(dim=1)
        return probabilities

    def on_train_start(self) -> None:
        """Apply the penalty's gradient in one way only, and check that a schedule lasts as long as the training.

        Raises:
            UserError: If a schedule ends earlier.
        """
        trainer: Any = self.trainer
        l2 = self.kernels
        for group in trainer.optimizers[0].param_groups:  # a checkpoint's depend on that training's clipping
            own, decay = trainer.optimizers[0].defaults.get("weight_decay", 0), 2 * l2.get(group["params"][0], 0)
            if decay and group.get("weight_decay") in (own, own + decay):
                group["weight_decay"] = own if self.penalty_in_loss else own + decay
        self._reschedule()
        if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
            return  # it has its own schedule, and one more epoch with batch normalization
        for config in self.trainer.lr_scheduler_configs:
            name = type(config.scheduler).__name__
            for argument in (
                TOTAL_STEPS if name == "PolynomialLR" else TOTAL_STEPS[:2]
            ):  # other total_iters are a warm-up's
                total: float = getattr(config.scheduler, argument, math.inf)
                steps = self._scheduler_steps(config.interval, config.frequency)
                if total < steps < math.inf:
                    raise UserError(
                        f"The schedule of {name} ends too early: {argument} is {total}, but it steps {steps} times "
                        f"in this training (after each {config.interval}). Use -1, or make the training shorter."
                    )

    def _reschedule(self) -> None:
        """Advance a continued run's schedule to the current epoch if the schedule has changed or become longer."""
        trainer: Any = self.trainer
        (optimizer,), earlier, self.earlier_schedule = trainer.optimizers, self.earlier_schedule, None
        if not trainer.lr_scheduler_configs:
            if earlier is not None:
                rate = optimizer.param_groups[0]["lr"]
                rank_zero_print(f"Continuing with the constant learning rate {rate:.4g}: the run had {earlier}")
            return
        (config,) = trainer.lr_scheduler_configs
        name = type(config.scheduler).__name__
        lengths = [(getattr(config.scheduler, total, now), now) for total, now in self.schedule_steps.items()]
        longer = [(before, now) for before, now in lengths if before < now]
        if earlier is not None:
            rank_zero_print(
                f"Continuing with {name}: the run had {'it with other options' if earlier == name else earlier}"
            )
        elif longer:
            ((before, now),) = longer
            rank_zero_print(
                f"Continuing with {name} over {now} steps: the run had {before}. To keep the current learning rate, "
                "add --model.lr_scheduler null"
            )
        if config.reduce_on_plateau or (earlier is None and not longer):
            return
        fresh = self.configure_optimizers()
        scheduler = fresh["lr_scheduler"]["scheduler"]
        steps = self._scheduler_steps(config.interval, config.frequency, trainer.current_epoch)
        with warnings.catch_warnings(action="ignore"):  # torch warns that the optimizer has not stepped
            for _ in range(int(steps)):
                scheduler.step()
        config.scheduler.load_state_dict(scheduler.state_dict())
        for group, other in zip(optimizer.param_groups, fresh["optimizer"].param_groups, strict=True):
            group.update({key: other[key] for key in SCHEDULED if key in other})

    def on_train_epoch_start(self) -> None:
        self._start("train")
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step, and log the learning rate where it changes within an epoch."""
        super().lr_scheduler_step(scheduler, metric)
        trainer: Any = self.trainer
        (config,) = trainer.lr_scheduler_configs
        if config.interval == "step" and trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics({"train/lr_by_step": scheduler.get_last_lr()[0]}, trainer.global_step)

    def on_train_epoch_end(self) -> None:
        self._log("train")
        self._update_averages()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._update_averages()

    def on_validation_epoch_start(self) -> None:
        self._start("val")

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_start(self) -> None:
        self._start("test")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def _update_averages(self) -> None:
        """Update averages of weights, so that the validated averages are the saved ones.

        Lightning's callback validates the averages of the epoch before if it updates them at an epoch's end, and saves
        the initial weights until it starts.
        """
        trainer: Any = self.trainer
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAveraging):
                if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                    callback.on_train_epoch_end(trainer, self)  # a second call does nothing
                average = callback._average_model
                if average is not None and not average.n_averaged:
                    average.module.load_state_dict(self.state_dict())

    def _penalty_weight(self) -> float:
        """Return the weight of the penalty in a batch's loss with which the next step applies the penalty once.

        Lightning divides the loss by ``accumulate_grad_batches``, but the last step of an epoch may have fewer batches.
        """
        accumulated = self.trainer.accumulate_grad_batches if self._trainer else 1
        if accumulated == 1:
            return 1
        batches, batch = self.trainer.num_training_batches, self.trainer.fit_loop.batch_idx
        return accumulated / min(accumulated, batches - batch // accumulated * accumulated)

    def _check_weights(self, outputs: int) -> None:
        """Check that each output of the network has a class weight; outputs without a class get the weight 1.

        Raises:
            UserError: If the number of given weights differs from the number of outputs.
        """
        if self.loss_weights is None or len(self.loss_weights) == outputs:
            return
        if self.class_weights != "balanced":
            raise UserError(
                f"The network has {outputs} outputs, but the length of class_weights is {len(self.loss_weights)}: give "
                "one weight for each output."
            )
        self.loss_weights = F.pad(self.loss_weights, (0, outputs - len(self.loss_weights)), value=1.0)

    def _step(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = _at_least_float32(self.network(images))
        loss = F.cross_entropy(logits, labels)
        with torch.no_grad():
            if labels.dim() == 2:
                labels = labels.argmax(dim=1)
            values = self.metrics(logits, labels, loss)
            if stage not in self.totals:
                self.totals[stage] = {
                    name: torch.zeros((), device=self.device, dtype=torch.float32) for name in [*values, "images"]
                }
            # summing on tensors takes a tenth of the time of logging in every step
            totals = self.totals[stage]
            for name, value in values.items():
                totals[name].add_(value.sum()) if value.dim() else totals[name].add_(value, alpha=len(labels))
            totals["images"].add_(len(labels))
            if self.epoch_metrics.names and stage != "train":
                self.epoch_metrics.update(stage, logits, labels)
        return loss, logits

    def _start(self, stage: str) -> None:
        """Forget the images of an epoch that was stopped, as with a notebook's stop button."""
        self.totals.pop(stage, None)
        self.epoch_metrics.reset(stage)

    def _log(self, stage: str) -> None:
        names = list(self.totals[stage])
        totals = torch.stack([*self.totals.pop(stage).values()])
        if totals.device.type != "mps":  # mps does not have float64
            totals = totals.double()
        *sums, images = self.trainer.strategy.reduce(totals, reduce_op="sum")  # over the processes
        values = {name: total / images for name, total in zip(names, sums, strict=False)}
        values |= self.epoch_metrics.compute(stage)
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)


def classifier_class(path: str) -> type[Classifier]:
    """Return the class of a class path: Classifier or a subclass of it.

    Raises:
        UserError: If there is no such class, or it is not a Classifier.
    """
    if path == "Classifier":
        return Classifier
    module, _, name = path.rpartition(".")
    found: Any = object
    # a checkpoint may name any module, and importing one has effects: the standard library does not have models
    if module.partition(".")[0] not in sys.stdlib_module_names:
        try:
            found = getattr(importlib.import_module(module), name, None)
        except (ImportError, ValueError) as error:
            reason = f": {error}" if module else ": give its class path, such as my_module.MyClassifier"
            raise UserError(f"model: there is no class {path}{reason}.") from error
    if found is None:
        raise UserError(f"model: there is no class {path}: {module} has no {name}.")
    if not isinstance(found, type) or not issubclass(found, Classifier):
        raise UserError(
            f"model: {path} is not a subclass of mnist_lightning.Classifier. It lacks the network, metrics and logits "
            "that the commands use: derive it from Classifier, and override what differs, such as objective."
        )
    return found


def check_compiler(device: torch.device) -> None:
    """Check that torch can compile a tiny function.

    Raises:
        UserError: If the compilation fails.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # torch raises private classes
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"torch.compile does not work here: {reason}. Install a C++ compiler (for a GPU, Triton), or set compile "
            "to false."
        ) from error


def checked_weights(weights: Sequence[float]) -> Tensor:
    """Return class weights as a tensor.

    Raises:
        UserError: If a weight is negative or not finite.
    """
    if not all(0 <= weight < math.inf for weight in weights):
        raise UserError(f"class_weights {list(weights)}: each weight must be a finite number that is not negative.")
    return torch.tensor([float(weight) for weight in weights])


def balanced_weights(labels: Tensor, classes: Sequence[str]) -> Tensor:
    """Return n / (number of classes * count of the class) for each class, where n is the number of labels.

    This is the formula of scikit-learn's ``compute_class_weight("balanced", ...)`` (King and Zeng 2001). The classes
    get the same total weight, and the mean weight of an image is 1.

    Args:
        labels: True classes, of shape (n,).
        classes: Names of the classes.

    Raises:
        UserError: If a class has no images.
    """
    counts = labels.cpu().bincount(minlength=len(classes))
    if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise UserError(
            f"class_weights balanced: class {missing[0]} has no training images. Add some, or give a list of weights."
        )
    return len(labels) / (len(classes) * counts)


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or more: half precision is enough for a layer, but not for a sum."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
