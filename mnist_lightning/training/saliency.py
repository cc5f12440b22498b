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
    """How much each pixel adds to the logit of one class, less that of another.

    Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365): the gradients on the way from a baseline to the
    image, times what differs between them. The baseline is the mean of some thousand images of ``split``, and not a
    black image, as in the paper: so ink that is missing counts as well as ink that is there. All pixels of an image add
    up to what separates its logits from the baseline's.

    Args:
        network: In evaluation mode; maps standardised images to logits.
        images: In [0, 1], of shape (n, channels, height, width).
        split: Images of the data set, and how they are standardised.
        classes: That which the pixels speak for, of shape (n,).
        others: That which they speak against, of shape (n,).
        steps: Points on the way (midpoint rule).

    Returns:
        Of shape (n, height, width), summed over the channels.
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
    """Attributions as they are drawn: neighbouring pixels share theirs, and the strongest of an image is 1 or -1."""
    side = max(attributions.shape[1:])
    values = ndimage.gaussian_filter(attributions.numpy(), (0, side / 28, side / 28))
    drawn: NDArray[np.float32] = values / abs(values).max(axis=(1, 2), keepdims=True, initial=1e-12)
    return drawn
