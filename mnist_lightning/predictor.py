"""A trained network in a program of one's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.cli import instantiate_module
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from mnist_lightning.checkpoints import checkpoint_errors, load_checkpoint
from mnist_lightning.classifier import Classifier
from mnist_lightning.data import ImageDataModule
from mnist_lightning.pictures import read, usable


def load_classifier(path: Path) -> tuple[dict[str, Any], Classifier]:
    """A checkpoint and its classifier, in evaluation mode.

    Raises:
        UserError: If it cannot be used.
    """
    with checkpoint_errors(path):
        checkpoint = load_checkpoint(path)
        classifier = instantiate_module(Classifier, _arguments(checkpoint["hyper_parameters"])).eval()
        classifier.load_state_dict(checkpoint["state_dict"])
        return checkpoint, classifier


def load_data(checkpoint: dict[str, Any]) -> ImageDataModule:
    """The data module of a checkpoint, which has not been set up."""
    arguments = checkpoint["datamodule_hyper_parameters"]
    class_path = arguments.get("_class_path", "mnist_lightning.data.MNISTDataModule")  # earlier versions had one
    arguments = {"_class_path": class_path, **_arguments(arguments), "augmentation": None}  # which is for training
    data = instantiate_module(ImageDataModule, arguments)
    if saved := checkpoint.get(type(data).__qualname__):
        data.load_state_dict(saved)
    return data


def _arguments(hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    # Lightning's own keys could name another class, and import its module
    return {key: value for key, value in hyper_parameters.items() if not key.startswith("_")}


class Predictor:
    """A trained network that takes pictures and arrays, and says the names of the classes.

    Args:
        checkpoint: A file of a run.

    Attributes:
        classifier: In evaluation mode, on the CPU.
        data: Its data module; for the names of the classes, what it needs of its data set must be there.

    Raises:
        UserError: If it cannot be used.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        state, self.classifier = load_classifier(Path(checkpoint))
        with checkpoint_errors(checkpoint):
            self.data = load_data(state)
        if self.data.standardize:
            self.data.setup("fit")

    @torch.inference_mode()
    def __call__(self, images: str | Path | Image.Image | ArrayLike | Tensor) -> pd.DataFrame:
        """Probabilities of the classes.

        Args:
            images: A picture of any kind, as its file or read by Pillow, which is brought into the form of the data
                set; or images that have it, uint8 or floats from 0 to 1, of shape (n, channels, height, width) or, of
                one image or one channel, without these.

        Returns:
            A row for each image and a column for each class; ``.idxmax(axis=1)`` is what the network says.

        Raises:
            PictureError: The picture cannot be used.
            ValueError: The images have another shape or type.
        """
        if isinstance(images, str | Path):
            images, _ = read(Path(images))
        if isinstance(images, Image.Image):
            images = self.data.from_picture(usable(images))
        array, shape = torch.as_tensor(np.asarray(images)), self.data.image_shape
        if shape[0] == 1 and array.shape[-3:] != shape:
            array = array.unsqueeze(-3)
        is_scaled = array.is_floating_point() and 0 <= array.min() <= array.max() <= 1
        if array.shape[-3:] != shape or array.dim() > 4 or not (is_scaled or array.dtype == torch.uint8):
            raise ValueError(
                f"images of shape {tuple(np.shape(images))} and {array.dtype}: they must be {shape}, or several of "
                "these, uint8 or floats from 0 to 1"
            )
        array = array.view(-1, *shape)
        scaled = array.float() / (1 if is_scaled else 255)
        if self.data.train is not None:
            scaled = self.data.train.standardized(scaled)
        probabilities = torch.cat([self.classifier(some).softmax(dim=1) for some in scaled.split(250)])
        return pd.DataFrame(probabilities.numpy(), columns=self.data.names(probabilities.shape[1]))
