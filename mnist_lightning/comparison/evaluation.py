"""Read trained runs from their folders and evaluate them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch.nn import functional as F

from mnist_lightning.classifier import Classifier
from mnist_lightning.comparison.significance import calibration_error
from mnist_lightning.data import ImageDataModule, Split
from mnist_lightning.networks import count_parameters
from mnist_lightning.system.console import show_status
from mnist_lightning.system.errors import UserError
from mnist_lightning.training.runs import read_config, read_environment
from mnist_lightning.training.saved_run import SavedRun

WEIGHTS = ("last", "best")
"""The checkpoints of a run: the last epoch, and the epoch with the best validation accuracy."""


@dataclass
class Evaluation:
    """The predictions of a classifier for a split of n images.

    Attributes:
        probabilities: float32 of shape (n, classes).
        classes: Names of the classes.
        metrics: The means of :meth:`Classifier.metrics`, and the classifier's metrics of a whole epoch, by name.
        mistakes: Indices of the misclassified images.
        confidence: Probability of the predicted class, of shape (n,); 0 where it is NaN.
        has_diverged: Whether a probability is not finite, as after a diverged training.
    """

    split: Split
    probabilities: NDArray[np.float32]
    classes: list[str]
    metrics: dict[str, float]

    def __post_init__(self) -> None:
        self.labels: NDArray[np.int64] = self.split.labels.numpy()
        self.predicted = self.probabilities.argmax(axis=1)
        self._classes = range(self.probabilities.shape[1])  # the labels may lack some of them
        self.correct = self.predicted == self.labels
        self.mistakes = np.flatnonzero(~self.correct)
        self.confidence = np.nan_to_num(self.probabilities.max(axis=1))
        self.has_diverged = not np.isfinite(self.probabilities).all()
        self.accuracy = float(self.correct.mean(dtype=np.float32))  # rounded like the metric

    @property
    def confident_mistakes(self) -> NDArray[np.intp]:
        """The mistakes, most confident first."""
        return self.mistakes[np.argsort(-self.confidence[self.mistakes], kind="stable")]

    @property
    def calibration_error(self) -> float | None:
        """The expected calibration error, or None if the classifier has diverged."""
        return None if self.has_diverged else calibration_error(self.probabilities, self.labels)

    @property
    def confusion_matrix(self) -> NDArray[np.int64]:
        """Counts of shape (classes, classes): rows are true classes, columns predicted classes."""
        return np.asarray(confusion_matrix(self.labels, self.predicted, labels=self._classes))

    @property
    def scores(self) -> pd.DataFrame:
        """``precision``, ``recall``, ``f1`` and ``support``, with one row per class, indexed by name."""
        scores = precision_recall_fscore_support(self.labels, self.predicted, labels=self._classes, zero_division=0)
        columns = ["precision", "recall", "f1", "support"]
        return pd.DataFrame(np.transpose(scores), columns=columns, index=self.classes)


@dataclass
class EvaluatedRun:
    """A trained run with its predictions.

    Attributes:
        path: The run folder, or the checkpoint given instead.
        config: The config; empty if its file is missing.
        environment: What made the run, from ``environment.json``; empty if it is missing.
        history: One row per epoch.
        seconds: Training time.
        parameters: Number of trainable parameters.
        evaluations: The evaluations by weights and split (``val``, ``test``).
        classifiers: The classifiers by weights.
        data: The data module of the run, set up.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    history: list[dict[str, float]]
    seconds: float
    parameters: int
    evaluations: dict[tuple[str, str], Evaluation]
    classifiers: dict[str, Classifier]
    data: ImageDataModule

    @property
    def best_epoch(self) -> int:
        """The earliest epoch with the highest validation accuracy, counted from 1."""
        return 1 + int(max(self.history, key=lambda row: row.get("val/accuracy", 0.0))["epoch"])


@dataclass
class Model:
    """A model: one run, or several that differ in their seed.

    Attributes:
        name: The name given by the user.
        slug: A unique form of the name for file names.
        color: Its color in pictures.
        page_color: The custom property that has its color in the page, which differs in dark mode.
        runs: The runs; where only one can be shown, it is the first.
        weights: The compared weights, one of ``WEIGHTS``.
    """

    name: str
    slug: str
    color: str
    page_color: str
    runs: list[EvaluatedRun]
    weights: str

    @property
    def test(self) -> Evaluation:
        """The evaluation of the first run on the test images."""
        return self.runs[0].evaluations[self.weights, "test"]

    @property
    def origin(self) -> dict[str, Any] | None:
        """The study and the trial that produced the first run, if any."""
        origin = self.runs[0].config.get("origin")
        return origin if isinstance(origin, dict) and {"study_name", "trial"} <= origin.keys() else None

    @property
    def accuracies(self) -> list[float]:
        """The test accuracy of each run."""
        return [run.evaluations[self.weights, "test"].accuracy for run in self.runs]

    @property
    def metrics(self) -> dict[str, list[float]]:
        """The values by metric, split and checkpoint, leaving out runs without the checkpoint or the metric."""
        return {
            f"{split}/{metric} ({weights} epoch)": [
                run.evaluations[weights, split].metrics[metric]
                for run in self.runs
                if (weights, split) in run.evaluations and metric in run.evaluations[weights, split].metrics
            ]
            for weights in WEIGHTS
            for split in ("test", "val")
            for metric in self.test.metrics
        }


def load_run(path: Path) -> EvaluatedRun:
    """Read a run from its folder or one of its checkpoints, and evaluate it.

    Raises:
        UserError: If the checkpoint is missing or cannot be used.
    """
    show_status(f"Testing {path} …")
    files = {weights: path / f"checkpoints/{weights}.ckpt" for weights in WEIGHTS} if path.is_dir() else {"last": path}
    if not files["last"].is_file():
        raise UserError(
            f"{path} has no checkpoint: it was stopped before the end of its first epoch, or is not a run."
            if path.is_dir()
            else f"There is no run or checkpoint at {path}."
        )
    saved = {weights: SavedRun.read(file) for weights, file in files.items() if file.is_file()}
    last = saved["last"]
    history, seconds, data = last.history, last.seconds, last.datamodule
    for stage in ("fit", "test"):
        data.setup(stage)
    folder = files["last"].absolute().parent.parent
    config = read_config(folder) if (folder / "config.yaml").is_file() else {}
    assert data.val is not None
    assert data.test is not None
    evaluations = {
        (weights, name): evaluate(run, data, split)
        for weights, run in saved.items()
        for name, split in (("val", data.val), ("test", data.test))
    }
    classifiers = {weights: run.classifier for weights, run in saved.items()}
    parameters = count_parameters(classifiers["last"])
    environment = read_environment(folder)
    return EvaluatedRun(path, config, environment, history, seconds, parameters, evaluations, classifiers, data)


@torch.no_grad()
def evaluate(run: SavedRun, data: ImageDataModule, split: Split) -> Evaluation:
    """Predict a whole split as the commands do, in the precision of the run."""
    logits = run.predict(split)
    metrics = run.classifier.metrics(logits, split.labels, F.cross_entropy(logits, split.labels))
    means = {name: values.float().mean().item() for name, values in metrics.items()}
    chosen = run.classifier.epoch_metrics
    chosen.update("report", logits, split.labels)
    means |= {name: value.item() for name, value in chosen.compute("report").items()}
    return Evaluation(split, logits.softmax(dim=1).numpy(), data.names(logits.shape[1]), means)


def have_same(name: str, first: EvaluatedRun, other: EvaluatedRun) -> bool:
    """Return whether two runs have the same images in a split, ``val`` or ``test``."""
    one, two = (run.evaluations["last", name].split for run in (first, other))
    return torch.equal(one.labels, two.labels) and torch.equal(one.images, two.images)
