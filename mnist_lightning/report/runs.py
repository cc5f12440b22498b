"""Trained runs, read from their folders: networks, histories, and what they predict."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch.nn import functional as F

from mnist_lightning.checkpoints import INSTANTIATOR, checkpoint_errors, read_history
from mnist_lightning.classifier import Classifier
from mnist_lightning.data import MNISTDataModule, Split

BATCH = 1000


@dataclass
class Evaluation:
    """What a network gives on a split.

    Attributes:
        probabilities: float32 of shape (n, classes).
        loss: Mean cross-entropy.
        penalized_loss: With the L2 penalty.
        accuracy: Share of right predictions.
    """

    probabilities: NDArray[np.float32]
    loss: float
    penalized_loss: float
    accuracy: float

    @property
    def predicted(self) -> NDArray[np.intp]:
        """Predicted classes, of shape (n,)."""
        predicted: NDArray[np.intp] = self.probabilities.argmax(axis=1)
        return predicted


@dataclass
class Run:
    """A trained run.

    Attributes:
        path: Its folder, or the checkpoint that was named instead.
        config: Its configuration.
        history: One row an epoch.
        seconds: Training time.
        parameters: Trainable parameters.
        evaluations: By weights (``last``, ``best``) and split (``val``, ``test``).
        val: The validation images.
        test: The test images.
    """

    path: Path
    config: dict[str, Any]
    history: list[dict[str, float]]
    seconds: float
    parameters: int
    evaluations: dict[tuple[str, str], Evaluation]
    val: Split
    test: Split

    @property
    def best_epoch(self) -> int:
        """The earliest epoch with the highest validation accuracy, from 1."""
        return 1 + int(max(self.history, key=lambda row: row.get("val/accuracy", 0.0))["epoch"])


def load(path: Path) -> Run:
    """Read a run from its folder, or from one of its checkpoints, and evaluate it.

    Raises:
        MisconfigurationException: There is no checkpoint, or it cannot be used.
    """
    checkpoints = {"last": path}
    if path.is_dir():
        checkpoints = {name: path / f"checkpoints/{name}.ckpt" for name in ("last", "best")}
    if not checkpoints["last"].is_file():
        raise MisconfigurationException(
            f"{path} has no checkpoint: it was stopped before the end of its first epoch, or is no run."
            if path.is_dir()
            else f"There is no run or checkpoint at {path}."
        )
    models = {}
    for name, file in checkpoints.items():
        if file.is_file():
            with checkpoint_errors(file):
                models[name] = Classifier.load_from_checkpoint(
                    file, map_location="cpu", weights_only=True, _instantiator=INSTANTIATOR
                ).eval()
                if name == "last":
                    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
                    state = checkpoint["callbacks"]["RunCheckpoint"]
                    history, seconds = read_history(state), float(state["seconds"])
                    arguments = checkpoint["datamodule_hyper_parameters"]
    with checkpoint_errors(checkpoints["last"]):
        data = MNISTDataModule(**{key: value for key, value in arguments.items() if not key.startswith("_")})
        data.setup("fit")
        data.setup("test")
    config_file = checkpoints["last"].absolute().parent.parent / "config.yaml"
    try:
        config = dict(yaml.safe_load(config_file.read_text())) if config_file.is_file() else {}
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise MisconfigurationException(f"{config_file} is damaged: {' '.join(str(error).split())}") from error
    assert data.val is not None
    assert data.test is not None
    splits = {"val": data.val, "test": data.test}
    evaluations = {
        (name, split): evaluate(model, images) for name, model in models.items() for split, images in splits.items()
    }
    parameters = sum(parameter.numel() for parameter in models["last"].parameters() if parameter.requires_grad)
    return Run(path, config, history, seconds, parameters, evaluations, **splits)


def check_same_data(runs: Sequence[Run]) -> None:
    """See that all runs have the same validation and test images.

    Raises:
        MisconfigurationException: They have not, so no comparison means anything.
    """
    for run in runs[1:]:
        for split in ("val", "test"):
            first, other = getattr(runs[0], split), getattr(run, split)
            same = torch.equal(first.labels, other.labels) and torch.equal(first.images, other.images)
            if not same:
                raise MisconfigurationException(
                    f"{runs[0].path} and {run.path} have other {split} images than each other: their results do not "
                    "compare. Train both with the same data_dir and val_split."
                )


@torch.inference_mode()
def evaluate(model: Classifier, split: Split) -> Evaluation:
    """Predict a whole split, without dropout."""
    logits = [model(split.__getitems__(range(i, min(i + BATCH, len(split))))[0]) for i in range(0, len(split), BATCH)]
    all_logits = torch.cat(logits)
    loss = F.cross_entropy(all_logits, split.labels).item()
    accuracy = (all_logits.argmax(dim=1) == split.labels).float().mean().item()
    probabilities = all_logits.softmax(dim=1).numpy()
    return Evaluation(probabilities, loss, loss + model.penalty().item(), accuracy)
