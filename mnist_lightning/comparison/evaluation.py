"""Read trained runs from their folders and evaluate them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch.nn import functional as F

from mnist_lightning.classifier import Classifier
from mnist_lightning.comparison.significance import calibration_error
from mnist_lightning.data import ImageDataModule, Split
from mnist_lightning.system.errors import UserError
from mnist_lightning.training.saved_run import SavedRun

WEIGHTS = ("last", "best")
"""Checkpoints of a run: of its last epoch, and of the best by validation accuracy."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Of Okabe and Ito, which the colour-blind tell apart; those that are lightest on white come last."""


@dataclass
class Evaluation:
    """What a classifier predicts for a split of n images.

    Attributes:
        probabilities: float32 of shape (n, classes).
        classes: Names of the classes.
        metrics: Means of :meth:`Classifier.metrics`, by their names.
        mistakes: Indices of the images that it gets wrong.
        confidence: Probability of the predicted class, of shape (n,); 0 where it is not a number.
        has_diverged: Whether a probability is not a number, as after a training that diverged.
    """

    split: Split
    probabilities: NDArray[np.float32]
    classes: list[str]
    metrics: dict[str, float]

    def __post_init__(self) -> None:
        self.labels: NDArray[np.int64] = self.split.labels.numpy()
        self.predicted = self.probabilities.argmax(axis=1)
        self._classes = range(self.probabilities.shape[1])  # of which the labels may lack one
        self.correct = self.predicted == self.labels
        self.mistakes = np.flatnonzero(~self.correct)
        self.confidence = np.nan_to_num(self.probabilities.max(axis=1))
        self.has_diverged = not np.isfinite(self.probabilities).all()
        self.accuracy = float(self.correct.mean(dtype=np.float32))  # rounds as the metric does

    @property
    def confident_mistakes(self) -> NDArray[np.intp]:
        """The mistakes, those of the highest confidence first."""
        return self.mistakes[np.argsort(-self.confidence[self.mistakes], kind="stable")]

    @property
    def calibration_error(self) -> float | None:
        """The expected calibration error, which a classifier that has diverged has not."""
        return None if self.has_diverged else calibration_error(self.probabilities, self.labels)

    @property
    def confusion_matrix(self) -> NDArray[np.int64]:
        """Counts of shape (classes, classes): rows are true, columns predicted classes."""
        return np.asarray(confusion_matrix(self.labels, self.predicted, labels=self._classes))

    @property
    def scores(self) -> pd.DataFrame:
        """``precision``, ``recall``, ``f1`` and ``support``, with a row for each class by its name."""
        scores = precision_recall_fscore_support(self.labels, self.predicted, labels=self._classes, zero_division=0)
        columns = ["precision", "recall", "f1", "support"]
        return pd.DataFrame(np.transpose(scores), columns=columns, index=self.classes)


@dataclass
class Run:
    """A trained run.

    Attributes:
        path: Its folder, or the checkpoint that was named instead.
        config: Its configuration; empty without its file.
        history: One row an epoch.
        seconds: Training time.
        parameters: Number of trainable parameters.
        evaluations: By weights and split (``val``, ``test``).
        classifiers: By weights.
        data: Its data module, set up.
    """

    path: Path
    config: dict[str, Any]
    history: list[dict[str, float]]
    seconds: float
    parameters: int
    evaluations: dict[tuple[str, str], Evaluation]
    classifiers: dict[str, Classifier]
    data: ImageDataModule

    @property
    def best_epoch(self) -> int:
        """The earliest epoch with the highest validation accuracy, from 1."""
        return 1 + int(max(self.history, key=lambda row: row.get("val/accuracy", 0.0))["epoch"])


@dataclass
class Model:
    """A model: one run, or several that differ in their seed.

    Attributes:
        name: Given by the user.
        slug: The same for file names, of no other model.
        color: Of its curves.
        runs: The first one is shown where there is room for one only.
        weights: The weights that are compared, of ``WEIGHTS``.
    """

    name: str
    slug: str
    color: str
    runs: list[Run]
    weights: str

    @property
    def test(self) -> Evaluation:
        """The first run on the test images."""
        return self.runs[0].evaluations[self.weights, "test"]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy of each run."""
        return [run.evaluations[self.weights, "test"].accuracy for run in self.runs]

    @property
    def metrics(self) -> dict[str, list[float]]:
        """The values of each metric, split and checkpoint; none of a run without the checkpoint."""
        return {
            f"{split}/{metric} ({weights} epoch)": [
                run.evaluations[weights, split].metrics[metric]
                for run in self.runs
                if (weights, split) in run.evaluations
            ]
            for weights in WEIGHTS
            for split in ("test", "val")
            for metric in self.test.metrics
        }


def load_run(path: Path) -> Run:
    """Read a run from its folder, or from one of its checkpoints, and evaluate it.

    Raises:
        UserError: If there is no checkpoint, or it cannot be used.
    """
    files = {weights: path / f"checkpoints/{weights}.ckpt" for weights in WEIGHTS} if path.is_dir() else {"last": path}
    if not files["last"].is_file():
        raise UserError(
            f"{path} has no checkpoint: it was stopped before the end of its first epoch, or is no run."
            if path.is_dir()
            else f"There is no run or checkpoint at {path}."
        )
    saved = {weights: SavedRun.read(file) for weights, file in files.items() if file.is_file()}
    last = saved["last"]
    history, seconds, data = last.history, last.seconds, last.datamodule
    for stage in ("fit", "test"):
        data.setup(stage)
    config_file = files["last"].absolute().parent.parent / "config.yaml"
    try:
        config = dict(yaml.safe_load(config_file.read_text(encoding="utf-8"))) if config_file.is_file() else {}
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{config_file} is damaged: {' '.join(str(error).split())}") from error
    assert data.val is not None
    assert data.test is not None
    evaluations = {
        (weights, name): evaluate(run, data, split)
        for weights, run in saved.items()
        for name, split in (("val", data.val), ("test", data.test))
    }
    classifiers = {weights: run.classifier for weights, run in saved.items()}
    parameters = sum(parameter.numel() for parameter in classifiers["last"].parameters() if parameter.requires_grad)
    return Run(path, config, history, seconds, parameters, evaluations, classifiers, data)


@torch.no_grad()
def evaluate(run: SavedRun, data: ImageDataModule, split: Split) -> Evaluation:
    """Predict a whole split as the commands do, in the precision of the run."""
    logits = run.predict(split)
    metrics = run.classifier.metrics(logits, split.labels, F.cross_entropy(logits, split.labels))
    means = {name: values.float().mean().item() for name, values in metrics.items()}
    return Evaluation(split, logits.softmax(dim=1).numpy(), data.names(logits.shape[1]), means)


def have_same(name: str, first: Run, other: Run) -> bool:
    """Whether two runs have the same images in a split, ``val`` or ``test``."""
    one, two = (run.evaluations["last", name].split for run in (first, other))
    return torch.equal(one.labels, two.labels) and torch.equal(one.images, two.images)
