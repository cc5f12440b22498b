"""Use a trained network from Python."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from mnist_lightning.data import Split
from mnist_lightning.data.pictures import normalize_mode, read
from mnist_lightning.data.placing import count_characters
from mnist_lightning.training.saved_run import SavedRun


class Predictor:
    """A trained network that takes pictures and arrays and returns probabilities under the names of the classes.

    Args:
        checkpoint: A checkpoint file of a run.

    Attributes:
        classifier: The classifier, in evaluation mode, on the CPU.
        data: The run's data module; it may need its data set for the names of the classes.

    Raises:
        UserError: If the checkpoint cannot be used.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self._run = SavedRun.read(checkpoint)
        self.classifier, self.data = self._run.classifier, self._run.datamodule
        if self.data.standardize:
            self.data.setup("fit")

    def __call__(self, images: str | Path | Image.Image | ArrayLike | Tensor) -> pd.DataFrame:
        """Return the probabilities of the classes, computed in the precision of the run.

        Args:
            images: A picture of any kind, as a file or a Pillow image, which is converted to the form of the data set;
                or images in that form, uint8 or floats from 0 to 1, of shape (n, channels, height, width); n and a
                single channel may be left out.

        Returns:
            A row for each image and a column for each class; ``.idxmax(axis=1)`` returns the predicted classes.

        Raises:
            PictureError: If the picture cannot be used.
            ValueError: If the images have another shape or type.
        """
        if isinstance(images, str | Path):
            images, _ = read(Path(images))
        if isinstance(images, Image.Image):
            picture = normalize_mode(images)
            if self.data.placing and (count := count_characters(picture)) > 1:
                warnings.warn(f"the picture seems to hold {count} characters, which are read as one", stacklevel=2)
            images = self.data.from_picture(picture)
        array, shape = torch.as_tensor(np.asarray(images)), self.data.image_shape
        if shape[0] == 1 and array.shape[-3:] != shape:
            array = array.unsqueeze(-3)
        is_scaled = array.is_floating_point() and 0 <= array.min() <= array.max() <= 1
        if array.shape[-3:] != shape or array.dim() > 4 or not (is_scaled or array.dtype == torch.uint8):
            raise ValueError(
                f"images of shape {tuple(np.shape(images))} and {array.dtype}: they must be {shape} or a batch of "
                "these, uint8 or floats from 0 to 1"
            )
        array = (array if array.dtype == torch.uint8 else array.float()).view(-1, *shape)
        statistics = self.data.train.statistics if self.data.train else None
        split = Split(array, torch.zeros(len(array), dtype=torch.long), statistics=statistics)
        probabilities = self._run.predict(split).softmax(dim=1)
        return pd.DataFrame(probabilities.numpy(), columns=self.data.names(probabilities.shape[1]))
