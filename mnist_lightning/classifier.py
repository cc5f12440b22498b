"""The LightningModule: cross-entropy and L2, metrics, any optimizer and schedule."""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers

from mnist_lightning.data import Batch
from mnist_lightning.optimizers import KerasAdam, KerasRMSprop
from mnist_lightning.system.console import rank_zero_print
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.nested import flatten

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
"""Arguments of a scheduler for its steps in all: -1 stands for those of the training."""

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

SCHEDULE = ("lr_scheduler", "lr_interval", "lr_frequency")
"""Hyper-parameters that may be others where a run is continued."""

SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum", "max_momentum", "base_momentum")
"""What a schedule keeps in the parameter groups of an optimizer."""


class Classifier(LightningModule):
    """Trains a network on cross-entropy plus λ‖W‖² for every kernel that carries an ``l2`` (see ``networks.Dense``).

    The gradient of the penalty, 2λW, comes as weight decay from optimizers that couple it, beside a ``weight_decay`` of
    their own; for others (AdamW, LBFGS, ...), where gradients are clipped, and for kernels that are computed from other
    parameters, as by ``weight_norm``, the penalty is added to the loss. Either way a step has it once, whatever batches
    it accumulates. The :meth:`metrics` are logged once an epoch, for each of ``train``, ``val`` and ``test``. Those of
    ``train`` are means over the epoch, while the weights move and dropout is on, as Keras gives them. ``lr`` is the
    learning rate of an epoch's first step.

    A training batch may have labels of shape (batch, classes) instead of (batch,), as MixUp makes them: shares of the
    classes. The loss takes them as they are, the other metrics the class of the largest share.

    Args:
        network: Maps images of shape (batch, channels, height, width) to logits of shape (batch, classes).
        optimizer: Makes an optimizer from parameters or parameter groups.
        lr_scheduler: Makes a learning-rate scheduler from the optimizer. If its ``total_steps``, ``T_max`` or
            ``total_iters`` is -1, it gets the number of times that it steps in the training.
        lr_interval: What the scheduler counts; by default steps for OneCycleLR and CyclicLR, epochs for others.
        lr_frequency: It steps after every so many of them; by default after each, or after each validation if it
            monitors one.
        label_smoothing: Share of a label that is spread evenly over all classes (Szegedy et al. 2016) in the loss that
            the optimizer follows. The ``loss`` that is logged is without, so that runs compare.
        compile: Compile the network with ``torch.compile`` where a trainer uses it: True, or one of its modes.
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
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.lr_frequency = lr_frequency
        self.label_smoothing = label_smoothing
        self.compile_mode = compile
        self.penalized: list[Any] = [layer for layer in network.modules() if getattr(layer, "l2", 0)]
        self.penalty_in_loss = False
        self.totals: dict[str, dict[str, Tensor]] = {}
        self.schedule_steps: dict[str, int] = {}
        self.earlier_schedule: str | None = None
        self.example_input_array = torch.zeros(1, 1, 28, 28)  # for the layer table

    def __deepcopy__(self, memo: dict[int, Any]) -> "Classifier":
        """Copy all but what makes the optimizer and the schedule.

        jsonargparse's know the parser and by it the trainer, whose processes and locks cannot be copied; and averages
        of weights are kept in a copy.
        """
        memo.update({id(factory): factory for factory in (self.optimizer, self.lr_scheduler)})
        copied: Classifier = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def setup(self, stage: str) -> None:
        """Set up this process, and compile the network if that is wanted.

        Subnormal numbers are flushed to zero: L2 drives the kernels of pixels that are always black, and Adam's moments
        of them, into subnormals; without this every step takes three times as long from the third epoch on. And with
        several devices, each draws dropout masks of its own.

        Raises:
            UserError: If torch has no compiler here.
        """
        torch.set_flush_denormal(True)
        if isinstance(self.trainer.precision_plugin, DoublePrecision):
            self.double()  # Lightning does so after it has restored weights, and so would round them
        if self.trainer.global_rank > 0 and stage == "fit":
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank)
        shape = getattr(getattr(self.trainer, "datamodule", None), "image_shape", None)
        if shape is not None:
            self.example_input_array = torch.zeros(1, *shape)
        if self.compile_mode and self.network._compiled_call_impl is None:
            check_compiler(self.trainer.strategy.root_device)
            # in place, so that the names of the weights stay; copies, as those of averages, are not compiled
            self.network.compile(mode=None if self.compile_mode is True else self.compile_mode)

    def check_images(self, shape: Sequence[int], classes: int) -> None:
        """See that the network takes images of a shape and has an output for each class; the layer table needs it, too.

        Args:
            shape: Channels, height and width.
            classes: Number of classes.

        Raises:
            UserError: If the network refuses the images, or has too few outputs.
        """
        self.example_input_array = torch.zeros(1, *shape)
        is_training = self.network.training
        try:
            with torch.no_grad():
                logits = self.network.eval()(self.example_input_array)
        except Exception as error:  # a network may be anybody's
            reason = str(error).strip().partition("\n")[0]
            is_torchvision = type(self.network).__module__.startswith("torchvision.")
            other = "mnist_lightning.networks.TorchvisionModel with its name" if is_torchvision else "another network"
            raise UserError(
                f"{type(self.network).__name__} does not take images of shape {tuple(shape)} (channels, height, "
                f"width): {reason}. Give its arguments to fit, or take {other}."
            ) from error
        finally:
            self.network.train(is_training)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < classes:
            found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"For {classes} classes, {type(self.network).__name__} must give logits of shape (batch, {classes}), "
                f"but gives {found} for one image."
            )

    @property
    def kernels(self) -> dict[Tensor, float]:
        """The kernels with a penalty as they are now, each with its λ; one that several layers share is one."""
        return {layer.weight: layer.l2 for layer in self.penalized}

    def needs_two_images(self) -> bool:
        """Whether one image gives a batch normalization one value for a channel, on which it refuses to train."""
        network, counts = copy.deepcopy(self.network).eval(), []
        norms = [layer for layer in network.modules() if isinstance(layer, BATCH_NORMS)]
        for norm in norms:
            norm.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0][:, :1].numel()))
        if norms:
            with torch.no_grad():
                network(self.example_input_array.to(next(network.parameters())))  # type: ignore[union-attr]
        return 1 in counts

    def configure_optimizers(self) -> Any:
        """Make the optimizer, with one parameter group for each distinct λ, and the scheduler."""
        optimizer, l2 = self.optimizer(self.parameters()), self.kernels
        coupled = isinstance(optimizer, COUPLED) and not optimizer.defaults.get("decoupled_weight_decay")
        coupled = coupled and all(isinstance(kernel, nn.Parameter) for kernel in l2)  # else computed from others
        # weight decay comes after the clipping, which the penalty's gradient must not escape
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
        given = getattr(self.lr_scheduler, "keywords", {})  # of a partial
        totals = [name for name in TOTAL_STEPS if given.get(name) == -1]
        if "total_steps" in given and given["total_steps"] is given.get("epochs") is None:  # OneCycleLR's defaults
            totals.append("total_steps")
        # what kind it is decides how often it steps, so how many steps it must have: one is made to be looked at
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
                    f"{' and '.join(totals)} of the lr_scheduler cannot be -1 in a training without max_epochs."
                )
            steps = self.schedule_steps = dict.fromkeys(totals, max(1, int(total)))
        scheduler = self.lr_scheduler(optimizer, **steps)
        config = {"scheduler": scheduler, "interval": interval, "frequency": frequency, "monitor": monitor}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of a run's schedule from another that was given to continue it."""
        before, now = checkpoint.get("hyper_parameters", {}), self.hparams
        if not all(name in parameters for parameters in (before, now) for name in SCHEDULE):
            return
        then, given = (flatten({name: parameters[name] for name in SCHEDULE}) for parameters in (before, now))
        if any(key not in given or given[key] != value for key, value in then.items()):
            checkpoint["lr_schedulers"] = []
            self.earlier_schedule = then.get("lr_scheduler.class_path", "a constant rate").rpartition(".")[2]

    def _scheduler_steps(self, interval: str, frequency: int, epochs: int | None = None) -> float:
        """How often a scheduler steps in some epochs or the whole training, as Lightning counts; maybe infinitely."""
        trainer = self.trainer
        trainer.fit_loop.setup_data()  # or Lightning says that it does so
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
        """Images of shape (batch, channels, height, width) to logits of shape (batch, classes)."""
        logits: Tensor = self.network(images)
        return logits

    def penalty(self) -> Tensor:
        """The sum of λ‖W‖² over the kernels that carry an ``l2``: a scalar."""
        flat = [(_at_least_float32(kernel).flatten(), factor) for kernel, factor in self.kernels.items()]
        penalties = [factor * kernel.dot(kernel) for kernel, factor in flat]
        return sum(penalties[1:], start=penalties[0]) if penalties else torch.zeros((), device=self.device)

    def metrics(self, logits: Tensor, labels: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """All metrics of a batch: what is named here is logged, printed, saved, compared and can be searched for.

        Args:
            logits: Of shape (batch, classes).
            labels: True classes, of shape (batch,).
            loss: Cross-entropy, a scalar, without label smoothing.

        Returns:
            From a metric's name to its values, of shape (batch,), or to their mean, a scalar: ``loss``,
            ``penalized_loss`` (with the penalty: what Keras calls loss) and ``accuracy``.
        """
        return {"loss": loss, "penalized_loss": loss + self.penalty(), "accuracy": logits.argmax(dim=1) == labels}

    def training_step(self, batch: Batch) -> Tensor:
        """Loss of a batch, whose gradient the optimizer follows."""
        loss, logits = self._step(batch, "train")
        if self.label_smoothing:
            loss = F.cross_entropy(logits, batch[1], label_smoothing=self.label_smoothing)
        return loss + self._penalty_weight() * self.penalty() if self.penalty_in_loss else loss

    def validation_step(self, batch: Batch) -> Tensor:
        """Logits of a batch, of shape (batch, classes)."""
        return self._step(batch, "val")[1]

    def test_step(self, batch: Batch) -> Tensor:
        """Logits of a batch, of shape (batch, classes)."""
        return self._step(batch, "test")[1]

    def predict_step(self, batch: Batch) -> Tensor:
        """Probabilities of the classes for a batch, of shape (batch, classes)."""
        probabilities: Tensor = _at_least_float32(self(batch[0])).softmax(dim=1)
        return probabilities

    def on_train_start(self) -> None:
        """Let the penalty's gradient come by one way, and a schedule last as long as the training.

        Raises:
            UserError: If one ends before.
        """
        trainer: Any = self.trainer
        l2 = self.kernels
        for group in trainer.optimizers[0].param_groups:  # a checkpoint's are of whether that training was clipped
            own, decay = trainer.optimizers[0].defaults.get("weight_decay", 0), 2 * l2.get(group["params"][0], 0)
            if decay and group.get("weight_decay") in (own, own + decay):
                group["weight_decay"] = own if self.penalty_in_loss else own + decay
        self._reschedule()
        if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
            return  # it brings a schedule of its own, and with batch normalization an epoch more
        for config in self.trainer.lr_scheduler_configs:
            name = type(config.scheduler).__name__
            for argument in (
                TOTAL_STEPS if name == "PolynomialLR" else TOTAL_STEPS[:2]
            ):  # other total_iters are of a warm-up
                total: float = getattr(config.scheduler, argument, math.inf)
                steps = self._scheduler_steps(config.interval, config.frequency)
                if total < steps < math.inf:
                    raise UserError(
                        f"The schedule of {name} ends too early: {argument} is {total}, but it steps {steps} times "
                        f"in this training (after each {config.interval}). Take -1, or make the training shorter."
                    )

    def _reschedule(self) -> None:
        """Bring the schedule of a continued run, if it is another or longer now, to where it would be by now."""
        trainer: Any = self.trainer
        (optimizer,), earlier, self.earlier_schedule = trainer.optimizers, self.earlier_schedule, None
        if not trainer.lr_scheduler_configs:
            if earlier is not None:
                rate = optimizer.param_groups[0]["lr"]
                rank_zero_print(f"Continuing with the learning rate {rate:.4g}, which stays: the run had {earlier}")
            return
        (config,) = trainer.lr_scheduler_configs
        name = type(config.scheduler).__name__
        lengths = [(getattr(config.scheduler, total, now), now) for total, now in self.schedule_steps.items()]
        longer = [(before, now) for before, now in lengths if before < now]
        if earlier is not None:
            rank_zero_print(
                f"Continuing with {name}: the run had {'other options of it' if earlier == name else earlier}"
            )
        elif longer:
            ((before, now),) = longer
            rank_zero_print(
                f"Continuing with {name} over {now} steps: the run had {before}. For a learning rate that stays as it "
                "is, add --model.lr_scheduler null"
            )
        if config.reduce_on_plateau or (earlier is None and not longer):
            return
        fresh = self.configure_optimizers()
        scheduler = fresh["lr_scheduler"]["scheduler"]
        steps = self._scheduler_steps(config.interval, config.frequency, trainer.current_epoch)
        with warnings.catch_warnings(action="ignore"):  # torch misses the optimizer's steps
            for _ in range(int(steps)):
                scheduler.step()
        config.scheduler.load_state_dict(scheduler.state_dict())
        for group, other in zip(optimizer.param_groups, fresh["optimizer"].param_groups, strict=True):
            group.update({key: other[key] for key in SCHEDULED if key in other})

    def on_train_epoch_start(self) -> None:
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self) -> None:
        self._log("train")
        self._update_averages()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._update_averages()

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def _update_averages(self) -> None:
        """Let averages of weights be validated as they are saved.

        Lightning's callback validates those of the epoch before if it updates them at an epoch's end, and saves the
        initial weights until it begins.
        """
        trainer: Any = self.trainer
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAveraging):
                if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                    callback.on_train_epoch_end(trainer, self)  # which does nothing when it is called again
                average = callback._average_model
                if average is not None and not average.n_averaged:
                    average.module.load_state_dict(self.state_dict())

    def _penalty_weight(self) -> float:
        """The weight of the penalty in a batch's loss, with which the step that follows has it once.

        Lightning divides the loss by the batches that a step accumulates, but the last step of an epoch may have fewer.
        """
        accumulated = self.trainer.accumulate_grad_batches if self._trainer else 1
        if accumulated == 1:
            return 1
        batches, batch = self.trainer.num_training_batches, self.trainer.fit_loop.batch_idx
        return accumulated / min(accumulated, batches - batch // accumulated * accumulated)

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
            # sums on tensors: a tenth of the time of a value logged in every step
            totals = self.totals[stage]
            for name, value in values.items():
                totals[name].add_(value.sum()) if value.dim() else totals[name].add_(value, alpha=len(labels))
            totals["images"].add_(len(labels))
        return loss, logits

    def _log(self, stage: str) -> None:
        names = list(self.totals[stage])
        totals = torch.stack([*self.totals.pop(stage).values()])
        if totals.device.type != "mps":  # which has no float64
            totals = totals.double()
        *sums, images = self.trainer.strategy.reduce(totals, reduce_op="sum")  # over the processes
        self.log_dict(
            {f"{stage}/{name}": total / images for name, total in zip(names, sums, strict=False)}, sync_dist=True
        )


def check_compiler(device: torch.device) -> None:
    """Compile next to nothing.

    Raises:
        UserError: If that fails.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # of torch's private classes
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"torch.compile does not work here: {reason}. Install a C++ compiler (for a GPU, Triton), or take compile "
            "false."
        ) from error


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision is enough for a layer, not for a sum."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
