"""Metrics of a whole epoch: those of torchmetrics by class path, F1 and top-k accuracy by a short name."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from mnist_lightning.system.errors import UserError, one_line

SUMMED = ("loss", "penalized_loss", "accuracy")
"""Names of the metrics that are always logged: means over the images, summed batch by batch."""


class EpochMetrics:
    """Metrics that are computed once from all images of an epoch, which means of batches would only approximate.

    A metric gets the probabilities that ``predict`` returns, in float64, of shape (batch, classes), and the labels.
    With several devices, torchmetrics gathers its state from all of them. If a probability is NaN, so are all values,
    although many metrics would return a number. A metric's name is that of its class in snake case, without
    ``Multiclass``: ``f1_score`` for ``MulticlassF1Score``.

    Args:
        given: Metrics, or words: ``f1`` for the mean over the classes of F1, ``top5_accuracy`` (or any other number)
            for the share of images whose class is among the five most probable ones.

    Raises:
        UserError: If a word is unknown, two metrics have one name, or the result of a metric is not a single number.
    """

    def __init__(self, given: Sequence[Metric | str] | Metric | str | None) -> None:
        self._given: dict[str, Metric | str] = {}
        self._running: dict[str, tuple[Metric, dict[str, Metric]]] = {}  # the number of NaN, and the metrics
        for metric in [given] if isinstance(given, Metric | str) else given or []:
            name = metric if isinstance(metric, str) else _name(metric)
            if isinstance(metric, str) and not _is_word(metric):
                raise UserError(
                    f"metrics: {metric!r} is not f1, top3_accuracy, top5_accuracy, ... For a class of torchmetrics, "
                    "use --model.metrics+=MulticlassRecall."
                )
            if name in (*SUMMED, *self._given):
                raise UserError(
                    f"metrics: two metrics have the name {name}. Leave one out, or use a subclass with another name."
                )
            self._given[name] = metric
            if isinstance(classes := getattr(metric, "num_classes", None), int):
                self._check(name, classes)

    @property
    def names(self) -> list[str]:
        """The names of the metrics."""
        return [*self._given]

    def higher_is_better(self, name: str) -> bool | None:
        """Return whether a high value of a metric is good; None if the metric is unknown or does not say so."""
        metric = self._given.get(name)
        return True if isinstance(metric, str) else getattr(metric, "higher_is_better", None)

    def check(self, outputs: int) -> None:
        """Check, before the training, that all metrics take the probabilities of a network.

        Args:
            outputs: Number of the network's outputs.

        Raises:
            UserError: If a metric does not take them, or its result is not a single number.
        """
        for name in self._given:
            self._check(name, outputs)

    def update(self, stage: str, logits: Tensor, labels: Tensor) -> None:
        """Add the images of a batch.

        Args:
            stage: The images that belong together, such as ``val``.
            logits: Of shape (batch, classes).
            labels: True classes, of shape (batch,).
        """
        if stage not in self._running:
            made = {name: _make(metric, logits.shape[1]).to(logits.device) for name, metric in self._given.items()}
            self._running[stage] = (SumMetric().to(logits.device), made)
        if logits.device.type != "mps":  # mps does not have float64, in which large logits keep their order
            logits = logits.double()
        probabilities = logits.softmax(dim=1)
        not_a_number, metrics = self._running[stage]
        not_a_number.update(probabilities.isnan().sum())
        for metric in metrics.values():
            metric.update(probabilities, labels)

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Return the values by name for all images of a stage since the last call, on all devices together."""
        if stage not in self._running:
            return {}
        not_a_number, metrics = self._running.pop(stage)
        values = {name: metric.compute() for name, metric in metrics.items()}
        if not_a_number.compute():
            return {name: torch.full_like(value, torch.nan, dtype=torch.float32) for name, value in values.items()}
        return values

    def reset(self, stage: str) -> None:
        """Forget the images of a stage, such as those of an epoch that was stopped."""
        self._running.pop(stage, None)

    def _check(self, name: str, classes: int) -> None:
        metric = _make(self._given[name], classes)
        try:
            metric.update(torch.eye(classes).softmax(dim=1), torch.arange(classes))  # an image of each class
            value = metric.compute()
        except Exception as error:  # a user's metric may raise anything
            raise UserError(
                f"metrics: {name} does not take labels and the probabilities of {classes} classes: {one_line(error)}"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"metrics: the result of {type(metric).__name__} is {found}, but only a single number can be logged."
            )


def _is_word(text: str) -> bool:
    return text == "f1" or _top(text) is not None


def _top(text: str) -> int | None:
    """Return the number in a word such as ``top5_accuracy``."""
    found = re.fullmatch(r"top([1-9]\d{0,8})_accuracy", text)
    return int(found[1]) if found else None


def _name(metric: Metric) -> str:
    name = type(metric).__name__.removeprefix("Multiclass")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _make(metric: Metric | str, classes: int) -> Metric:
    """Return a metric that has seen no images."""
    if isinstance(metric, Metric):
        fresh = metric.clone()
        fresh.reset()
        return fresh
    k = _top(metric)
    if k is None:
        return MulticlassF1Score(classes, average="macro", validate_args=False)
    if k > classes:
        raise UserError(f"metrics: {metric} needs at least {k} classes, but the network has {classes}.")
    return MulticlassAccuracy(classes, top_k=k, average="micro", validate_args=False)
