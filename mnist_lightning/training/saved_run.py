"""A run as a checkpoint holds it; no other module opens a checkpoint."""

import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from mnist_lightning.classifier import Classifier, classifier_class
from mnist_lightning.data import ImageDataModule, Split
from mnist_lightning.system.errors import UserError, explain


@dataclass
class SavedRun:
    """A run, read from a checkpoint.

    Attributes:
        path: Path of the checkpoint.
        weights: State of the classifier.
        epoch: Number of the epoch after which the checkpoint was written, from 0.
        model: Arguments of the classifier, in plain types; with its class path if it is of a subclass.
        data: Class path and arguments of the data module, in plain types.
        data_state: State of the data module: the names of the classes. None if the data module did not store them.
        callback_state: State of the run's :class:`RunCheckpoint`; empty if the run did not have one.
    """

    path: Path
    weights: dict[str, Tensor]
    epoch: int
    model: dict[str, Any]
    data: dict[str, Any]
    data_state: dict[str, Any] | None
    callback_state: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> "SavedRun":
        """Read a checkpoint.

        Raises:
            UserError: If the file is damaged, or not a checkpoint of this package.
            OSError: If the file cannot be read.
        """
        path = Path(path)
        with checkpoint_errors(path):
            content = load_checkpoint(path)
            model, data = (dict(content.get(name, {})) for name in ("hyper_parameters", "datamodule_hyper_parameters"))
            class_path = data.pop("_class_path")
            for arguments in (model, data):  # Lightning would call the _instantiator, which could be any function
                arguments.pop("_instantiator", None)
            if "_class_path" in model:
                model = {"class_path": model.pop("_class_path"), **model}
            return cls(
                path,
                dict(content["state_dict"]),
                int(content["epoch"]),
                model,
                {"class_path": class_path, "init_args": data},
                content.get(class_path.rpartition(".")[2]),
                dict(content["callbacks"].get("RunCheckpoint", {})),
            )

    @property
    def config(self) -> dict[str, Any]:
        """The run's config; empty if the checkpoint was not written by ``fit``."""
        return self.callback_state.get("config") or {}

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics of each epoch.

        Raises:
            UserError: If the metrics are missing or damaged.
        """
        with checkpoint_errors(self.path):
            return read_history(self.callback_state)

    @property
    def seconds(self) -> float:
        """The training time.

        Raises:
            UserError: If the training time is missing or damaged.
        """
        with checkpoint_errors(self.path):
            return float(self.callback_state["seconds"])

    @property
    def model_class(self) -> type[Classifier]:
        """The class of the classifier.

        Raises:
            UserError: If there is no such class here.
        """
        try:
            return classifier_class(str(self.model.get("class_path", "Classifier")))
        except UserError as error:
            raise UserError(f"{self.path} cannot be used: {error}") from error

    @cached_property
    def classifier(self) -> Classifier:
        """The classifier, in evaluation mode.

        Raises:
            UserError: If its arguments or weights are damaged.
        """
        with checkpoint_errors(self.path):
            # other keys of Lightning could name another class, whose module would be imported
            arguments = {key: value for key, value in self.model.items() if key[:1] != "_" and key != "class_path"}
            with isolate_rng():  # its first weights are drawn, and to look at a run must not change what comes next
                classifier: Classifier = instantiate_module(self.model_class, arguments).eval()
            self.restore(classifier)
        return classifier

    @cached_property
    def datamodule(self) -> ImageDataModule:
        """The data module, not set up, and without augmentation, which is only for training.

        Raises:
            UserError: If its arguments are damaged, or its data set has other classes.
        """
        with checkpoint_errors(self.path):
            given = {key: value for key, value in self.data["init_args"].items() if not key.startswith("_")}
            arguments = {"_class_path": self.data["class_path"], **given, "augmentation": None}
            data: ImageDataModule = instantiate_module(ImageDataModule, arguments)
            if self.data_state:
                data.load_state_dict(self.data_state)
        return data

    def restore(self, classifier: Classifier) -> None:
        """Load the run's weights into a classifier.

        Raises:
            UserError: If the classifier has another network.
        """
        with checkpoint_errors(self.path):
            classifier.load_state_dict(self.weights)

    def predict(self, split: Split) -> Tensor:
        """Return the logits of all images of a split, of shape (n, classes), computed in the precision of the run."""
        with checkpoint_errors(self.path):
            batches = torch.arange(len(split)).split(self.data["init_args"].get("eval_batch_size", 250))
        return outputs(self._network, split, batches)

    @cached_property
    def _network(self) -> Any:
        with checkpoint_errors(self.path):
            precision = self.config.get("trainer", {}).get("precision")
            return Fabric(accelerator="cpu", devices=1, precision=precision).setup_module(self.classifier)


@torch.no_grad()
def outputs(function: Callable[[Tensor], Tensor], split: Split, batches: Iterable[Tensor]) -> Tensor:
    """Return a function's values for images of a split, in float32.

    Args:
        function: A function of images of shape (batch, channels, height, width).
        split: The images.
        batches: Indices of the images in each batch.
    """
    return torch.cat([function(split.__getitems__(batch)[0]).float() for batch in batches])


@contextmanager
def checkpoint_errors(path: Any) -> Iterator[None]:
    """Name the checkpoint in errors: its content may make torch and Lightning raise anything.

    Raises:
        UserError: If the file is damaged, or not a checkpoint of this package.
    """
    try:
        yield
    except Exception as error:
        is_named = getattr(error, "filename", None)  # a file that cannot be read
        if isinstance(error, UserError | MisconfigurationException) or is_named:
            raise
        reason = "it is damaged or not a checkpoint of fit"
        if "loading state_dict" in str(error):
            reason = "its weights do not match its network"
        raised_in = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        names = [type(each).__name__ for each in raised_in if isinstance(each, Callback)]
        if names := [name for name in names if name != "RunCheckpoint"]:
            reason = f"its {names[-1]} cannot be restored ({explain(error)})"
        raise UserError(f"{path} cannot be used: {reason}. Use another checkpoint, or train a new one.") from error


def load_checkpoint(path: Any, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint file of tensors and plain types, after checking its checksums.

    Raises:
        ValueError: If the file is damaged; torch and its unpickler raise other errors.
    """
    with zipfile.ZipFile(path) as archive:  # torch.load does not check the checksums that torch.save writes
        if (member := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {member} differs")
    checkpoint: dict[str, Any] = torch.load(path, map_location, weights_only=True)
    return checkpoint


def check_finite(probabilities: Tensor, path: Any) -> None:
    """Check that the probabilities of a checkpoint's network are numbers.

    Raises:
        UserError: If one is not a number, as after training that diverged.
    """
    if not probabilities.isfinite().all():
        raise UserError(
            f"The training of {path} has diverged: its probabilities are not numbers, so nothing is written. Train "
            "with a lower learning rate, or use the best.ckpt of an earlier epoch."
        )


def read_history(state: dict[str, Any]) -> list[dict[str, float]]:
    """Return the rows of all epochs in the state of a :class:`RunCheckpoint`, or raise an error if there are none."""
    history = [
        {**{n: float(v) for n, v in row.items()}, "epoch": int(row["epoch"]), "step": int(row["step"])}
        for row in state["history"]
    ]
    if not history:
        raise ValueError("no epoch")
    return history
