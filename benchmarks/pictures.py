"""How often a picture of a digit gets the label that the test image gets which it is of, and how well load_digits goes.

Run by hand, with one or more checkpoints, each for a column:
python benchmarks/pictures.py lightning_logs/{baseline,thirty_seconds}/version_0/checkpoints/last.ckpt

Each row saves 300 test images of MNIST as PNG, enlarged ten times and changed in one way, and reads them back. The
images of load_digits keep their 8x8 pixels.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from mnist_lightning.classifier import Classifier
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.data.pictures import PictureError, read

COUNT = 300
generator = np.random.default_rng(0)


def enlarged(digit: NDArray[Any]) -> Image.Image:
    """Enlarge each pixel to a block of ten by ten."""
    return Image.fromarray(digit).resize((280, 280), Image.Resampling.NEAREST)


def smooth(digit: NDArray[Any]) -> Image.Image:
    """Enlarge by bicubic interpolation, which blurs the edges."""
    return Image.fromarray(digit).resize((280, 280), Image.Resampling.BICUBIC)


def inverted(digit: NDArray[Any]) -> Image.Image:
    """Draw black on white."""
    return ImageOps.invert(enlarged(digit))


def colored(digit: NDArray[Any]) -> Image.Image:
    """Draw in two random colors that differ by at least 90 of 255 in a channel."""
    while np.abs(np.subtract(*(colors := generator.integers(0, 256, (2, 3))))).max() < 90:
        pass
    share = np.asarray(enlarged(digit), float)[..., None] / 255
    return Image.fromarray((colors[0] * (1 - share) + colors[1] * share).astype(np.uint8))


def padded(digit: NDArray[Any]) -> Image.Image:
    """Add up to 400 pixels on each side."""
    left, top, right, bottom = generator.integers(0, 400, 4).tolist()
    return ImageOps.expand(inverted(digit), (left, top, right, bottom), 255)


def shifted(digit: NDArray[Any]) -> Image.Image:
    """Move the digit anywhere in the image, up to the edges."""
    rows, columns = np.nonzero(digit)
    shift = [int(generator.integers(-side.min(), 28 - side.max())) for side in (rows, columns)]
    return inverted(np.roll(digit, shift, (0, 1)))


def turned(digit: NDArray[Any]) -> Image.Image:
    """Turn the picture on its side, and say so in EXIF."""
    picture = inverted(digit).transpose(Image.Transpose.ROTATE_90)
    picture.getexif()[0x112] = 6
    return picture


def shadow(digit: NDArray[Any], hard: bool = False) -> Image.Image:
    """Draw on noisy gray paper, up to three times as bright on one side as on the other, or with a shadow's edge."""
    share = np.zeros((480, 360))
    share[100:380, 40:320] = np.asarray(enlarged(digit), float) / 255
    y, x = np.mgrid[-0.5:0.5:480j, -0.5:0.5:360j]
    angle = generator.uniform(0, 2 * np.pi)
    place = np.cos(angle) * x + np.sin(angle) * y
    light = 0.95 - 0.45 / (1 + np.exp(-60 * (place + generator.uniform(-0.2, 0.2)))) if hard else 0.7 + 0.5 * place
    values = 190 * light * (1 - 0.8 * share) + generator.normal(0, 6, share.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def hard_shadow(digit: NDArray[Any]) -> Image.Image:
    """Draw with a shadow whose edge crosses the picture."""
    return shadow(digit, hard=True)


def main() -> None:
    """Print a line for each kind of picture, with the share of each checkpoint."""
    torch.set_num_threads(1)
    data = MNISTDataModule()
    data.setup("test")
    assert data.test is not None
    classifiers = [Classifier.load_from_checkpoint(path, weights_only=True).eval() for path in sys.argv[1:]]
    file = Path(tempfile.mkdtemp()) / "digit.png"

    @torch.no_grad()
    def labels(images: NDArray[Any]) -> NDArray[Any]:
        scaled = torch.tensor(images) / 255
        return np.stack([classifier(scaled).argmax(dim=1).numpy() for classifier in classifiers])

    def answers(digits: NDArray[Any], make: Callable[[NDArray[Any]], Image.Image]) -> NDArray[Any]:
        images = np.zeros((len(digits), 1, 28, 28), np.uint8)
        for image, digit in zip(images, digits, strict=True):
            picture = make(digit)
            picture.save(file, exif=picture.getexif())
            try:
                image[:] = data.from_picture(read(file)[0])[0]
            except PictureError:
                image[:] = 255  # nearly always counts as a mistake
        return labels(images)

    def report(name: str, found: NDArray[Any], wanted: NDArray[Any]) -> None:
        print(f"{name:12}", *[f"{share:.4f}" for share in (found == wanted).mean(axis=1)], flush=True)

    digits = data.test.images[:COUNT]
    truths = labels(digits.numpy())
    for kind in (enlarged, smooth, inverted, colored, padded, shifted, turned, shadow, hard_shadow):
        report(kind.__name__, answers(digits[:, 0].numpy(), kind), truths)
    others = load_digits()
    report("load_digits", answers((others.images * (255 / 16)).astype(np.uint8), Image.fromarray), others.target)


if __name__ == "__main__":
    main()
