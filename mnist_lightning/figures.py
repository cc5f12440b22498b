"""The notebook's pictures, as matplotlib figures that belong to no window and no global state."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

DIGIT_WIDTH, DIGIT_HEIGHT = 0.636, 0.73  # of DejaVu Sans, matplotlib's own font, in units of its size
RIGHT, WRONG = "#1a7f37", "#cf222e"


def digits(
    images: NDArray[Any], titles: Sequence[str], columns: int, colors: Sequence[str] | None = None, scale: float = 1.2
) -> Figure:
    """Images in rows, each under its title.

    Args:
        images: Of shape (n, height, width), in [0, 1].
        titles: One for each image, all with the same number of lines.
        columns: Images in a row; the last row may have fewer.
        colors: Of the titles, by default black.
        scale: Width of an image in inches.
    """
    rows, lines = -(-len(images) // columns), 1 + titles[0].count("\n")
    top, side = 4 + 6 * lines, 6  # pixels of an image's cell above and beside it
    cells = np.pad(images, ((0, 0), (top, 0), (side, side)))
    height, width = cells.shape[1:]
    figure = Figure(figsize=(columns * scale, rows * scale * height / width))
    axes = figure.add_axes((0, 0, 1, 1))  # one image for all: an axes for each takes ten times as long to draw
    axes.imshow(mosaic(cells, columns), cmap="gray_r", vmin=0, vmax=1)
    axes.set_axis_off()
    for index, title in enumerate(titles):
        row, column = divmod(index, columns)
        place = ((column + 0.5) * width, row * height + top - 2)
        axes.text(*place, title, ha="center", va="bottom", color=colors[index] if colors else "black", fontsize=9)
    return figure


def mosaic(images: NDArray[Any], columns: int) -> NDArray[Any]:
    """Images in rows as one image, with zeros where the last row has no more.

    Args:
        images: Of shape (n, height, width).
        columns: Images in a row.

    Returns:
        Of shape (rows * height, columns * width), with one row at least.
    """
    count, height, width = images.shape
    rows = max(1, -(-count // columns))
    cells = np.pad(images, ((0, rows * columns - count), (0, 0), (0, 0)))
    return cells.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)


def sample_grid(images: NDArray[Any], labels: NDArray[Any]) -> Figure:
    """The first 25 digits in five rows, each under its label.

    Args:
        images: Of shape (n, height, width), in [0, 1].
        labels: Of shape (n,).
    """
    return digits(images[:25], [str(label) for label in labels[:25]], columns=5)


def predictions(images: NDArray[Any], labels: NDArray[Any], predicted: NDArray[Any]) -> Figure:
    """The first ten digits in two rows, each under what was predicted: green where it is right, red where not.

    Args:
        images: Of shape (n, height, width), in [0, 1].
        labels: True classes, of shape (n,).
        predicted: Predicted classes, of shape (n,).
    """
    pairs = list(zip(predicted[:10], labels[:10], strict=True))
    titles = [f"predicted {guess}\ntrue {label}" for guess, label in pairs]
    colors = [RIGHT if guess == label else WRONG for guess, label in pairs]
    return digits(images[:10], titles, columns=5, colors=colors, scale=1.6)


def confusion_matrix(counts: NDArray[Any], title: str) -> Figure:
    """A confusion matrix, coloured by the share of each true class.

    Args:
        counts: Of shape (classes, classes): rows are true, columns predicted classes.
        title: Stands above the matrix.
    """
    # seaborn.heatmap: 2 s more in a fit of 20 epochs (3.2 s for 20 pictures and 0.2 s to import it, against 1.4 s)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(5, 5))
    axes = figure.add_axes((0.1, 0.09, 0.87, 0.85), title=title, xlabel="predicted", ylabel="true")
    axes.set(xticks=range(len(counts)), yticks=range(len(counts)))
    # the root lets a handful of mistakes be seen beside a thousand right answers
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    for color, cells in (("white", shares > 0.4), ("black", (shares <= 0.4) & (counts > 0))):
        axes.add_artist(PathPatch(_numbers(counts, cells), color=color, linewidth=0))  # add_patch is slow
    return figure


def _numbers(counts: NDArray[Any], cells: NDArray[np.bool_], size: float = 0.33) -> Path:
    """The numbers in some cells of a matrix as one path: a hundred texts take ten times as long to draw."""
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
    """Metrics of training and validation over the epochs.

    Args:
        history: One row an epoch with ``epoch`` (from 0) and values like ``train/loss`` and ``val/loss``.
        metrics: Names without their stage; the first is drawn solid, the next dashed.
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
    """The pixels of a figure, of shape (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
