"""Augment training batches: distort, erase, mirror and mix images.

The transforms of torchvision (``torchvision.transforms.v2``) have the same interface and can be used, too, for example
``MixUp`` and ``CutMix``, whose labels are shares of the classes, of shape (batch, classes). But torchvision draws only
once for a whole batch. All draws come from torch's global generators, so a continued run repeats them.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Distortion(nn.Module):
    """Rotate, scale, shear, shift and elastically deform each image by its own draws, in one interpolation.

    The elastic deformation is that of Simard et al. (2003): every pixel is shifted by a draw between -1 and 1 for each
    axis, smoothed over the image by a Gaussian and multiplied by ``alpha``. All other draws are uniform in their range.
    The defaults suit MNIST; a network of less than 10,000 parameters learns more from about two thirds of them.

    Args:
        degrees: Largest angle of the rotation, to either side.
        scale: Largest change of width and of height, drawn independently: 0.1 for factors between 0.9 and 1.1.
        shear: Largest angle of the shear along the width, in degrees, to either side.
        translate: Largest shift along each axis, as a share of the image's side.
        alpha: Factor of the smoothed shifts, in pixels. With ``sigma`` 4, their standard deviation is 0.041 ``alpha``;
            Simard et al. use 34 and 4 for MNIST.
        sigma: Standard deviation of the Gaussian, in pixels.
        padding_mode: Values outside an image, as in ``torch.nn.functional.grid_sample``.

    Raises:
        ValueError: If a value is negative, or ``scale`` or an angle is too large.
    """

    def __init__(
        self,
        degrees: float = 10.0,
        scale: float = 0.1,
        shear: float = 5.0,
        translate: float = 0.07,
        alpha: float = 15.0,
        sigma: float = 4.0,
        padding_mode: Literal["zeros", "border", "reflection"] = "zeros",
    ) -> None:
        super().__init__()
        if min(degrees, scale, shear, translate, alpha) < 0 or scale >= 1 or shear >= 90 or sigma <= 0:
            raise ValueError(
                f"degrees {degrees}, scale {scale}, shear {shear}, translate {translate}, alpha {alpha}, sigma "
                f"{sigma}: none may be negative, scale must be less than 1, shear less than 90 and sigma more than 0"
            )
        self.degrees, self.scale, self.shear, self.translate = degrees, scale, shear, translate
        self.alpha, self.sigma = alpha, sigma
        self.padding_mode = padding_mode

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Distort images of shape (batch, channels, height, width); keep the labels."""
        batch, _, height, width = images.shape
        turn, lean, *stretches, x_shift, y_shift = torch.rand(6, batch, device=images.device) * 2 - 1
        angle, shear = math.radians(self.degrees) * turn, (math.radians(self.shear) * lean).tan()
        x_scale, y_scale = (1 / (1 + self.scale * stretch) for stretch in stretches)
        cos, sin = angle.cos(), angle.sin()
        # rotation · shear · scale maps a pixel to the place of its value; height and width are 2 in a grid
        rows = [
            [cos * x_scale, (cos * shear - sin) * y_scale * height / width, 2 * self.translate * x_shift],
            [sin * x_scale * width / height, (sin * shear + cos) * y_scale, 2 * self.translate * y_shift],
        ]
        matrices = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
        grid = F.affine_grid(matrices, [batch, 1, height, width], align_corners=False)
        if self.alpha:
            shifts = torch.rand(batch, 2, height, width, device=images.device) * 2 - 1
            smooth_height, smooth_width = (_gaussian(side, self.sigma, images.device) for side in (height, width))
            x, y = (smooth_height @ shifts @ smooth_width * self.alpha).unbind(dim=1)
            grid = grid + torch.stack([x * (2 / width), y * (2 / height)], dim=-1)
        distorted = F.grid_sample(images.float(), grid, padding_mode=self.padding_mode, align_corners=False)
        return distorted.to(images.dtype), labels


class Erasing(nn.Module):
    """Fill a random rectangle of each image with one value (random erasing: Zhong et al. 2020).

    Args:
        p: Probability that an image is changed.
        scale: Range of the rectangle's share of the image.
        ratio: Range of the rectangle's height over its width; no side becomes longer than the image's.
        value: Value of the rectangle's pixels.

    Raises:
        ValueError: If ``p`` is not a probability, or a range is invalid.
    """

    def __init__(
        self,
        p: float = 0.5,
        scale: tuple[float, float] = (0.02, 0.33),
        ratio: tuple[float, float] = (0.3, 3.3),
        value: float = 0.0,
    ) -> None:
        super().__init__()
        _check_probability(p)
        if not (0 <= scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]):
            raise ValueError(
                f"scale {scale}, ratio {ratio}: the lower end comes first, scale is at most 1, and ratio is not 0"
            )
        self.p, self.scale, self.ratio, self.value = p, scale, ratio, value

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Erase in images of shape (batch, channels, height, width); keep the labels."""
        batch, _, height, width = images.shape
        chance, size, shape, *places = torch.rand(5, batch, 1, device=images.device)
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * size) * height * width * (chance < self.p)
        low, high = map(math.log, self.ratio)  # wide and tall rectangles are equally likely
        ratio = (low + (high - low) * shape).exp()
        inside = []
        for side, length, place in ((height, area * ratio, places[0]), (width, area / ratio, places[1])):
            length = length.sqrt().round().clamp(max=side)
            start = (place * (side - length + 1)).floor()
            pixels = torch.arange(side, device=images.device)
            inside.append((pixels >= start) & (pixels < start + length))
        rectangle = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return images.masked_fill(rectangle, self.value), labels


class HorizontalFlip(nn.Module):
    """Mirror images, left to right, each with probability ``p``.

    Args:
        p: The probability.

    Raises:
        ValueError: If ``p`` is not a probability.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        _check_probability(p)
        self.p = p

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mirror images of shape (batch, channels, height, width); keep the labels."""
        is_mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < self.p
        return torch.where(is_mirrored, images.flip(-1), images), labels


def _gaussian(size: int, sigma: float, device: torch.device) -> Tensor:
    """Return the matrix of shape (size, size) that smooths a row of pixels, with zeros outside it."""
    pixels = torch.arange(size, device=device)
    distances = (pixels - pixels[:, None]) / sigma
    return (-0.5 * distances.square()).exp() / (sigma * math.sqrt(2 * math.pi))


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p {p} is not a probability: it must be between 0 and 1")
