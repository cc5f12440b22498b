"""Use a trained network from Python."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from mnist_lightning.data import Split
from mnist_lightning.data.pictures import normalize_mode, read
from mnist_lightning.training.saved_run import SavedRun


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
        self._run = SavedRun.read(checkpoint)
        self.classifier, self.data = self._run.classifier, self._run.datamodule
        if self.data.standardize:
            self.data.setup("fit")

    def __call__(self, images: str | Path | Image.Image | ArrayLike | Tensor) -> pd.DataFrame:
        """Return the probabilities of the classes, computed in the precision of the run.

        Args:
            images: A picture of any kind, as its file or read by Pillow, which is brought into the form of the data
                set; or images that have it, uint8 or floats from 0 to 1, of shape (n, channels, height, width) or, of
                one image or one channel, without these.

        Returns:
            A row for each image and a column for each class; ``.idxmax(axis=1)`` is what the network says.

        Raises:
            PictureError: If the picture cannot be used.
            ValueError: If the images have another shape or type.
        """
        if isinstance(images, str | Path):
            images, _ = read(Path(images))
        if isinstance(images, Image.Image):
            images = self.data.from_picture(normalize_mode(images))
        array, shape = torch.as_tensor(np.asarray(images)), self.data.image_shape
        if shape[0] == 1 and array.shape[-3:] != shape:
            array = array.unsqueeze(-3)
        is_scaled = array.is_floating_point() and 0 <= array.min() <= array.max() <= 1
        if array.shape[-3:] != shape or array.dim() > 4 or not (is_scaled or array.dtype == torch.uint8):
            raise ValueError(
                f"images of shape {tuple(np.shape(images))} and {array.dtype}: they must be {shape}, or several of "
                "these, uint8 or floats from 0 to 1"
            )
        array = (array if array.dtype == torch.uint8 else array.float()).view(-1, *shape)
        statistics = self.data.train.statistics if self.data.train else None
        split = Split(array, torch.zeros(len(array), dtype=torch.long), statistics=statistics)
        probabilities = self._run.predict(split).softmax(dim=1)
        return pd.DataFrame(probabilities.numpy(), columns=self.data.names(probabilities.shape[1]))
