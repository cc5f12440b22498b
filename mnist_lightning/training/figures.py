"""The notebook's pictures, as matplotlib figures without global state."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

DIGIT_WIDTH, DIGIT_HEIGHT = 0.636, 0.73  # of DejaVu Sans, matplotlib's own font, in units of its size
RIGHT, WRONG = "#1a7f37", "#cf222e"
FOR, AGAINST = "#d55e00", "#0072b2"  # Okabe and Ito's colors, which color-blind people can tell apart


def pictures(images: Tensor) -> NDArray[Any]:
    """Return images ready to be drawn.

    Args:
        images: Images of shape (n, channels, height, width); values outside [0, 1], as after standardization, are
            scaled to it.

    Returns:
        All three channels, of shape (n, height, width, 3), or else the first channel, of shape (n, height, width).
    """
    low, high = map(float, images.aminmax()) if images.numel() else (0.0, 1.0)
    if low < 0 or high > 1:
        images = (images - low) / (high - low)
    array = images.float().cpu().numpy()
    return array.transpose(0, 2, 3, 1) if images.shape[1] == 3 else array[:, 0]


def colored(images: NDArray[Any], saliency: NDArray[Any] | None = None) -> NDArray[Any]:
    """Return images in color, gray ones as ink on white, overlaid with evidence for a class (red) or against it (blue).

    Args:
        images: Images from :func:`pictures`.
        saliency: Evidence from -1 to 1, of shape (n, height, width).

    Returns:
        Images in [0, 1], of shape (n, height, width, 3).
    """
    colors = images if images.ndim == 4 else np.repeat(1 - images[..., None], 3, axis=-1)
    if saliency is None:
        return colors
    share = np.abs(saliency)[..., None]
    hue = np.where(saliency[..., None] > 0, to_rgb(FOR), to_rgb(AGAINST))
    return np.asarray((0.55 + 0.45 * colors) * (1 - share) + hue * share).clip(0, 1)


def image_grid(
    images: NDArray[Any], titles: Sequence[str], columns: int, colors: Sequence[str] | None = None, scale: float = 1.2
) -> Figure:
    """Draw images in rows, each under its title; gray images as ink on white.

    Args:
        images: Images from :func:`pictures`.
        titles: One title for each image, all with the same number of lines.
        columns: Number of images in a row; the last row may have fewer.
        colors: Colors of the titles, by default black.
        scale: Width of an image in inches.
    """
    rows, lines = -(-len(images) // columns), 1 + titles[0].count("\n")
    size = images.shape[2] / 28  # the text has the same size for any image size
    top, side = round((4 + 6 * lines) * size), round(6 * size)  # pixels of a cell above the image and next to it
    border = [(0, 0), (top, 0), (side, side), (0, 0)][: images.ndim]
    cells = np.pad(images, border, constant_values=images.ndim == 4)
    height, width = cells.shape[1:3]
    figure = Figure(figsize=(columns * scale, rows * scale * height / width))
    axes = figure.add_axes((0, 0, 1, 1))  # one image for all: separate axes take ten times as long to draw
    axes.imshow(mosaic(cells, columns), cmap="gray_r", vmin=0, vmax=1)
    axes.set_axis_off()
    for index, title in enumerate(titles):
        row, column = divmod(index, columns)
        place = ((column + 0.5) * width, row * height + top - 2 * size)
        color = colors[index] if colors else "black"
        # dollar signs in a name do not mean mathematics
        axes.text(*place, title, ha="center", va="bottom", color=color, fontsize=9, parse_math=False)
    return figure


def mosaic(images: NDArray[Any], columns: int) -> NDArray[Any]:
    """Return images in rows as one image, with white in the free places of the last row.

    Args:
        images: Images of shape (n, height, width), where 0 is white, or (n, height, width, 3).
        columns: Number of images in a row.

    Returns:
        An image of shape (rows * height, columns * width) or (rows * height, columns * width, 3), at least one row.
    """
    count, height, width, *channels = images.shape
    rows = max(1, -(-count // columns))
    white = (255 if images.dtype == np.uint8 else 1) if channels else 0
    border = [(0, rows * columns - count), (0, 0), (0, 0), (0, 0)][: images.ndim]
    cells = np.pad(images, border, constant_values=white).reshape(rows, columns, height, width, *channels)
    return cells.swapaxes(1, 2).reshape(rows * height, columns * width, *channels)


def sample_grid(images: NDArray[Any], labels: Sequence[str]) -> Figure:
    """Draw the first 25 images in five rows, each under its label.

    Args:
        images: Images from :func:`pictures`.
        labels: Names of their classes.
    """
    return image_grid(images[:25], labels[:25], columns=5)


def predictions(images: NDArray[Any], labels: Sequence[str], predicted: Sequence[str]) -> Figure:
    """Draw the first ten images in two rows, each under its prediction: green if it is right, red if it is wrong.

    Args:
        images: Images from :func:`pictures`.
        labels: Names of their true classes.
        predicted: Names of the predicted classes.
    """
    pairs = list(zip(predicted[:10], labels[:10], strict=True))
    titles = [f"predicted {guess}\ntrue {label}" for guess, label in pairs]
    colors = [RIGHT if guess == label else WRONG for guess, label in pairs]
    return image_grid(images[:10], titles, columns=5, colors=colors, scale=1.6)


def confusion_matrix(counts: NDArray[Any], title: str, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix, colored by the share of each true class.

    Args:
        counts: Counts of shape (classes, classes): rows are true classes, columns predicted classes.
        title: Title above the matrix.
        classes: Names of the classes.
    """
    # seaborn.heatmap takes 2 s more in a fit of 20 epochs (3.2 s for 20 pictures and 0.2 s to import, against 1.4 s)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    text = max(map(len, classes))
    size, margin = 4.3 * max(1, len(classes) / 10) ** 0.7, 0.4 + 0.09 * text  # in inches, of the matrix and the names
    width, height = margin + size + 0.15, margin + size + 0.3
    figure = Figure(figsize=(width, height))
    box = (margin / width, margin / height, size / width, size / height)
    axes = figure.add_axes(box, title=title, xlabel="predicted", ylabel="true")
    axes.set_xticks(range(len(counts)), classes, rotation=90 if text > 2 else 0, parse_math=False)
    axes.set_yticks(range(len(counts)), classes, parse_math=False)
    # the root makes a handful of mistakes visible next to a thousand right answers
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    for color, cells in (("white", shares > 0.4), ("black", (shares <= 0.4) & (counts > 0))):
        axes.add_artist(PathPatch(_numbers(counts, cells), color=color, linewidth=0))  # add_patch is slow
    return figure


def _numbers(counts: NDArray[Any], cells: NDArray[np.bool_], size: float = 0.33) -> Path:
    """Return the numbers in some cells of a matrix as one path: a hundred texts take ten times as long to draw."""
    paths = []
    for row, column in zip(*np.nonzero(cells), strict=True):
        digits = [_digit(character) for character in str(counts[row, column])]
        for place, digit in enumerate(digits):
            offset = (column + size * DIGIT_WIDTH * (place - len(digits) / 2), row + size * DIGIT_HEIGHT / 2)
            paths.append(Path(digit.vertices * (size, -size) + offset, digit.codes))
    return Path.make_compound_path(*paths)


@cache
def _digit(character: str) -> TextPath:
    return TextPath((0, 0), character, size=1)


def curves(history: Sequence[dict[str, float]], metrics: Sequence[str]) -> Figure:
    """Draw metrics of training and validation over the epochs.

    Args:
        history: One row an epoch with ``epoch`` (from 0) and values like ``train/loss`` and ``val/loss``.
        metrics: Names without their stage; the first is drawn solid, the second dashed.
    """
    figure = Figure(figsize=(7, 4.5))
    axes = figure.add_axes((0.1, 0.11, 0.87, 0.85), xlabel="epoch", ylabel=metrics[0].replace("_", " "))
    for metric, style in zip(metrics, ("-", "--"), strict=False):
        for stage, color in (("train", "tab:blue"), ("val", "tab:orange")):
            points = [(row["epoch"] + 1, row[f"{stage}/{metric}"]) for row in history if f"{stage}/{metric}" in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, marker=".", label=f"{stage}/{metric}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def render(figure: Figure) -> NDArray[np.uint8]:
    """Return the pixels of a figure, of shape (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box replaces a missing glyph
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
