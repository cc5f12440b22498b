"""The project's own data, network, model with another loss, and metric."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from mnist_lightning import Classifier
from mnist_lightning.datasets import ImageFolder


class Letters(ImageFolder):
    """Dark letters on white paper, in a folder for each letter. The network sees ink as 1 and paper as 0."""

    def load(self, split: str) -> tuple[Any, Any] | None:
        found = super().load(split)
        if found is None:  # there is no folder val: a part of train is held out
            return None
        images, labels = found
        return 255 - images, labels

    def from_picture(self, picture: Image.Image, is_sheet: bool = False) -> NDArray[np.uint8]:
        return 255 - super().from_picture(picture, is_sheet)


class Net(nn.Sequential):
    """Convolutions, each followed by pooling, then the mean over the picture.

    Args:
        channels: Channels of each convolution.
        in_channels: Channels of a picture; from the data.
        num_classes: Number of classes; from the data.
    """

    def __init__(self, channels: list[int], in_channels: int, num_classes: int) -> None:
        layers: list[nn.Module] = []
        for before, after in zip([in_channels, *channels], channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes))


class Focal(Classifier):
    """Learn more from pictures that are still wrong than from those that are right (Lin et al. 2017).

    Args:
        gamma: How much more; with 0, all pictures count alike.
        **arguments: Arguments of Classifier.
    """

    def __init__(self, gamma: float = 2.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.gamma = gamma

    def objective(self, logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - (-losses).exp()) ** self.gamma * losses).mean()


class WorstLetter(Metric):
    """The accuracy of the letter that is recognized worst.

    Args:
        num_classes: Number of letters; from the data.
    """

    higher_is_better = True
    right: Tensor
    count: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        for name in ("right", "count"):
            self.add_state(name, torch.zeros(num_classes), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        is_right = (probabilities.argmax(dim=1) == labels).float()
        self.right.index_add_(0, labels, is_right)
        self.count.index_add_(0, labels, torch.ones_like(is_right))

    def compute(self) -> Tensor:
        return (self.right / self.count)[self.count > 0].min()
