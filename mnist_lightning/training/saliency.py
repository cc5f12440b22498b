"""Which pixels speak for a class, and which against it."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from mnist_lightning.data import Split


def integrated_gradients(
    network: nn.Module, images: Tensor, split: Split, classes: Tensor, others: Tensor, steps: int = 32
) -> Tensor:
    """Return how much each pixel adds to the logit of one class minus that of another.

    Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365): the mean gradient on the line from a baseline to
    the image, times the image minus the baseline. The baseline is the mean of about a thousand images of ``split``, not
    a black image as in the paper, so missing ink counts, too. All pixels of an image add up to the difference between
    its logits and the baseline's.

    Args:
        network: A network in evaluation mode, which maps standardized images to logits.
        images: Images in [0, 1], of shape (n, channels, height, width).
        split: Images of the data set, with the statistics to standardize them.
        classes: The class for each image that the pixels speak for, of shape (n,).
        others: The class for each image that the pixels speak against, of shape (n,).
        steps: Number of points on the line (midpoint rule).

    Returns:
        Attributions of shape (n, height, width), summed over the channels.
    """
    baseline = split.scaled(range(0, len(split), max(1, len(split) // 1000))).mean(dim=0)
    total = torch.zeros_like(images)
    for step in range(steps):
        points = (baseline + (step + 0.5) / steps * (images - baseline)).requires_grad_()
        logits = network(split.standardized(points))
        difference = logits.gather(1, classes[:, None]) - logits.gather(1, others[:, None])
        total += torch.autograd.grad(difference.sum(), points)[0]
    return ((images - baseline) * total / steps).sum(dim=1)


def smoothed(attributions: Tensor) -> NDArray[np.float32]:
    """Return attributions to draw: smoothed over neighboring pixels, and with 1 or -1 as the strongest of an image."""
    side = max(attributions.shape[1:])
    values = ndimage.gaussian_filter(attributions.numpy(), (0, side / 28, side / 28))
    drawn: NDArray[np.float32] = values / abs(values).max(axis=(1, 2), keepdims=True, initial=1e-12)
    return drawn
