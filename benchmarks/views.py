"""What the mean over several views of an image is worth (test-time augmentation), on validation images.

Run by hand, with one or more checkpoints: python benchmarks/views.py lightning_logs/cnn/version_0/checkpoints/last.ckpt

Each line has accuracy and cross-entropy of the mean probabilities of a checkpoint over the views.
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import InterpolationMode, affine

from mnist_lightning.classifier import Classifier
from mnist_lightning.training.saved_run import SavedRun, outputs

View = Callable[[Tensor], Tensor]


def moved(down: int, right: int) -> View:
    """Return a view that is moved by whole pixels."""
    return lambda images: affine(images, 0, [right, down], 1, [0, 0])


def turned(degrees: float, scale: float = 1) -> View:
    """Return a view that is rotated and scaled."""
    return lambda images: affine(images, degrees, [0, 0], scale, [0, 0], InterpolationMode.BILINEAR)


NEXT = [(1, 0), (-1, 0), (0, 1), (0, -1)]
VIEWS = {
    "one view": [moved(0, 0)],
    "four shifts": [moved(0, 0), *(moved(*shift) for shift in NEXT)],
    "eight shifts": [moved(*shift) for shift in product((-1, 0, 1), repeat=2)],
    "rotations": [moved(0, 0), turned(-7), turned(7)],
    "rotations and sizes": [moved(0, 0), *(turned(*each) for each in product((-6, 6), (0.94, 1.06)))],
}


def mean_over(views: list[View], classifier: Classifier, images: Tensor) -> Tensor:
    """Return the mean of the probabilities over views of images, of shape (batch, classes)."""
    return torch.stack([classifier(view(images)).softmax(dim=1) for view in views]).mean(dim=0)


def main() -> None:
    """Print a line for each checkpoint and kind of views."""
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        saved = SavedRun.read(path)
        data = saved.datamodule
        data.setup("fit")
        assert data.val is not None
        labels, batches = data.val.labels, torch.arange(len(data.val)).split(1000)
        for name, views in VIEWS.items():
            probabilities = outputs(partial(mean_over, views, saved.classifier), data.val, batches)
            accuracy = (probabilities.argmax(dim=1) == labels).float().mean()
            loss = F.nll_loss(probabilities.log(), labels)
            print(f"{path} {name:20} accuracy {accuracy:.4f} loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
