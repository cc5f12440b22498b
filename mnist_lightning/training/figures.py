"""The notebook's pictures, as matplotlib figures without global state, and the theme of all pictures."""

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Colors of models, by Okabe and Ito, which color-blind people can tell apart; the lightest on white come last."""
AGAINST, FOR = COLORS[:2]
RIGHT, WRONG = "#1a7f37", "#cf222e"
DIGIT_WIDTH, DIGIT_HEIGHT = 0.636, 0.73  # of DejaVu Sans, matplotlib's own font, in units of its size
GRID = "#d0d7de"
STAGES = {"val": "validation", "train": "training"}

themed = rc_context(
    {
        "figure.dpi": 150,
        "font.size": 12,
        "axes.titlesize": 14,
        "axes.titleweight": "bold",
        "figure.titlesize": 15,
        "figure.titleweight": "bold",
        "axes.axisbelow": True,
        "axes.edgecolor": "#57606a",
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": GRID,
        "legend.edgecolor": "white",
        "legend.fontsize": 11,
        "text.parse_math": False,  # dollar signs in a name do not mean mathematics
    }
)
"""Decorator of the functions that draw: matplotlib's global style stays as it is."""

History = Sequence[Mapping[str, float]]
"""A run's metrics: one row an epoch with ``epoch`` (from 0) and values like ``train/loss`` and ``val/loss``."""


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


@themed
def image_grid(
    images: NDArray[Any],
    titles: Sequence[str],
    columns: int,
    colors: Sequence[str] | None = None,
    scale: float = 1.3,
    title: str = "",
) -> Figure:
    """Draw images in rows, each under its title; gray images as ink on white.

    Args:
        images: Images from :func:`pictures`.
        titles: One title for each image, all with the same number of lines.
        columns: Number of images in a row; the last row may have fewer.
        colors: Colors of the titles, by default black.
        scale: Width of an image in inches.
        title: Title above all images.
    """
    rows, lines = -(-len(images) // columns), 1 + titles[0].count("\n")
    size = images.shape[2] / 28  # the text has the same size for any image size
    top, side = round((4 + 6 * lines) * size), round(6 * size)  # pixels of a cell above the image and next to it
    border = [(0, 0), (top, 0), (side, side), (0, 0)][: images.ndim]
    cells = np.pad(images, border, constant_values=images.ndim == 4)
    height, width = cells.shape[1:3]
    head, body = 0.4 * bool(title), rows * scale * height / width  # in inches
    figure = Figure(figsize=(columns * scale, head + body))
    figure.suptitle(title, y=1 - 0.1 / (head + body))
    axes = figure.add_axes((0, 0, 1, body / (head + body)))  # one image for all: many axes take ten times as long
    axes.imshow(mosaic(cells, columns), cmap="gray_r", vmin=0, vmax=1)
    axes.set_axis_off()
    for index, text in enumerate(titles):
        row, column = divmod(index, columns)
        place = ((column + 0.5) * width, row * height + top - 2 * size)
        color = colors[index] if colors else "black"
        axes.text(*place, text, ha="center", va="bottom", color=color, fontsize=7.5 * scale)
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
    return image_grid(images[:10], titles, columns=5, colors=colors, scale=1.6, title="the first test images")


@themed
def confusion_matrix(
    counts: NDArray[Any], title: str, classes: Sequence[str], color: str = COLORS[0], is_quick: bool = False
) -> Figure:
    """Draw a confusion matrix, colored by the share of each true class.

    Args:
        counts: Counts of shape (classes, classes): rows are true classes, columns predicted classes.
        title: Title above the matrix.
        classes: Names of the classes.
        color: Color of a class that is always right.
        is_quick: Whether to draw smaller and without seaborn, in a third of the time. More than 30 classes are always
            drawn without it, which would take a minute for a hundred.
    """
    text = max(map(len, classes))
    size, margin = 5.5 * max(1, len(classes) / 10) ** 0.7, 0.6 + 0.1 * text  # in inches, of the matrix and the names
    width, height = margin + size + 0.2, margin + size + 0.4
    figure = Figure(figsize=(width, height), dpi=50 if is_quick else min(150, 3000 / height))
    axes = figure.add_axes((margin / width, margin / height, size / width, size / height))
    # the root makes a handful of mistakes visible next to a thousand right answers
    shares = np.sqrt(counts / counts.sum(axis=1, keepdims=True).clip(min=1))
    style: Any = {"cmap": LinearSegmentedColormap.from_list("shares", ["white", color]), "vmin": 0, "vmax": 1}
    digits = len(str(counts.max()))
    points = min(12, 72 * size / len(classes) / (0.75 * max(3, digits)))  # the longest number fits into its cell
    if is_quick or len(classes) > 30:
        _draw_quickly(axes, counts, shares, style, points * len(classes) / size / 72)
    else:
        import seaborn as sns  # slow to import

        numbers = np.where(counts > 0, counts.astype(str), "")
        sns.heatmap(
            shares, annot=numbers, fmt="", annot_kws={"size": points}, cbar=False, linewidths=0.5, linecolor=GRID,
            ax=axes, **style,
        )  # fmt: skip
    places, angle, gap = np.arange(len(classes)) + 0.5, 90 if text > 2 else 0, len(classes) / 100
    axes.set_title(title, y=1)  # without y, matplotlib lays out the ticks to find a free place
    if is_quick:  # ticks take as long to draw as everything else
        axes.set_axis_off()
        figure.text((margin + size / 2) / width, 0.1 / height, "predicted", ha="center", va="bottom")
        figure.text(0.1 / width, (margin + size / 2) / height, "true", ha="left", va="center", rotation=90)
        for place, name in zip(places, classes, strict=True):
            axes.text(place, len(classes) + gap, name, ha="center", va="top", rotation=angle)
            axes.text(-gap, place, name, ha="right", va="center")
    else:
        axes.set_xticks(places, classes, rotation=angle)
        axes.set_yticks(places, classes, rotation=0)
        axes.set(xlabel="predicted", ylabel="true")
        axes.tick_params(length=0)
        axes.grid(False)
    return figure


def _draw_quickly(axes: Axes, counts: NDArray[Any], shares: NDArray[Any], style: Any, size: float) -> None:
    """Draw a matrix and its numbers as one image and two paths: a hundred texts take ten times as long to draw."""
    axes.imshow(shares, extent=(0, len(counts), len(counts), 0), **style)
    for color, cells in (("white", shares > 0.6), ("black", (shares <= 0.6) & (counts > 0))):
        paths = []
        for row, column in zip(*np.nonzero(cells), strict=True):
            number = str(counts[row, column])
            for place, character in enumerate(number, start=-len(number)):
                digit = _digit(character)
                offset = (
                    column + 0.5 + size * DIGIT_WIDTH * (place + len(number) / 2),
                    row + (1 + size * DIGIT_HEIGHT) / 2,
                )
                paths.append(Path(digit.vertices * (size, -size) + offset, digit.codes))
        axes.add_artist(PathPatch(Path.make_compound_path(*paths), color=color, linewidth=0))  # add_patch is slow


@cache
def _digit(character: str) -> TextPath:
    return TextPath((0, 0), character, size=1)


def tidy(histories: Mapping[str, Sequence[History]]) -> "pd.DataFrame":
    """Return a table with a row for each value: model, run, epoch (from 1), stage, metric, value.

    Args:
        histories: For each model the histories of its runs. A value that is not finite becomes NaN, which is a gap.
    """
    import pandas as pd  # slow to import

    rows = [
        (model, run, int(row["epoch"]) + 1, STAGES[stage], metric, value if math.isfinite(value) else math.nan)
        for model, histories_of in histories.items()
        for run, history in enumerate(histories_of)
        for row in history
        for key, value in row.items()
        for stage, _, metric in [key.partition("/")]
        if stage in STAGES
    ]
    return pd.DataFrame(rows, columns=["model", "run", "epoch", "stage", "metric", "value"])


@themed
def curves(table: "pd.DataFrame", metrics: Sequence[str], colors: Mapping[str, str], title: str = "") -> Figure:
    """Draw metrics over the epochs: a line for each model and stage, with a band from its lowest to its highest run.

    Args:
        table: A table from :func:`tidy`.
        metrics: Names without their stage; each has its own panel.
        colors: Color of each model.
        title: Title above all panels.
    """
    import seaborn as sns  # slow to import

    figure = Figure(figsize=(6.5 * len(metrics), 4.8), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    style: Any = {"marker": "o", "markeredgewidth": 0, "markersize": 5, "style_order": [*STAGES.values()]}
    if len(colors) > 1:
        style |= {"hue": "model", "hue_order": [*colors], "palette": colors}
    else:
        style |= {"color": next(iter(colors.values()))}
    for axes, metric in zip(panels, metrics, strict=True):
        values = table[table["metric"] == metric]
        style["legend"] = axes is panels[0]
        # by default, seaborn would draw random numbers for the band
        sns.lineplot(values, x="epoch", y="value", style="stage", errorbar=("pi", 100), ax=axes, **style)
        if axes.get_legend():
            axes.legend(title=None)
        name = metric.replace("_", " ")
        axes.set(title=name, xlabel="epoch", ylabel=name)
        integer_axis(axes)
    figure.suptitle(title)
    return figure


def integer_axis(axes: Axes) -> None:
    """Label the horizontal axis of an epoch's or a trial's number with integers only."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


@themed
def render(figure: Figure) -> NDArray[np.uint8]:
    """Return the pixels of a figure, of shape (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box replaces a missing glyph
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
