"""Cut characters out of ink, and place them as in a data set."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.sparse.csgraph import connected_components

from mnist_lightning.data.ink import ink_of
from mnist_lightning.data.pictures import SIDE, PictureError, opaque

EDGE, STROKE = 0.25, 0.6
"""Least ink at a stroke's edge and in its middle: a part that is nowhere darker is a stain."""


class Placing(NamedTuple):
    """How a data set places the ink of a character in its images.

    Attributes:
        share: Longer side of the ink as a share of the image's side.
        by_mass: Whether the ink is centered by its center of mass, instead of the center of its box.
    """

    share: float
    by_mass: bool


class Strokes(NamedTuple):
    """The usual widths of a data set's strokes, in pixels of its images: four in five are from ``low`` to ``high``."""

    low: float
    median: float
    high: float


def characters(ink: NDArray[np.float32], is_sheet: bool = False) -> list[NDArray[np.float32]]:
    """Return the cropped ink of one character, or of each on a sheet in reading order, without specks.

    On a sheet, two parts belong to one character if they nearly touch, or if one is above the other and too low to be
    a separate character. A character belongs to the row whose last character to its left is at its height, so rows may
    slope.

    Raises:
        PictureError: If there is no ink.
    """
    labels, count = ndimage.label(ink > EDGE, np.ones((3, 3)))
    parts = np.arange(1, count + 1)
    areas = ndimage.sum_labels(labels > 0, labels, parts)
    is_dark = ndimage.maximum(ink, labels, parts) > STROKE if count else areas
    parts = parts[is_dark & (areas >= 0.02 * areas[is_dark].max(initial=1)) & (areas > 3)]
    if not len(parts):
        raise PictureError("there is no ink on it")
    boxes = ndimage.find_objects(labels)
    groups = [parts]
    if is_sheet:
        groups = _in_reading_order([parts[group] for group in _joined(*_edges(boxes, parts))], boxes)
    found = []
    for group in groups:
        top, bottom, left, right = (edge[0] for edge in _edges(boxes, group, whole=True))
        box = np.s_[top:bottom, left:right]
        found.append(np.where(np.isin(labels[box], group), ink[box], np.float32(0)))
    return found


def count_characters(picture: Image.Image) -> int:
    """Return how many characters a picture seems to have: groups of ink of similar height, at least 1."""
    small = picture.copy()
    small.thumbnail((400, 400))
    with suppress(PictureError):
        heights = [len(ink) for ink in characters(ink_of(opaque(small)), is_sheet=True)]
        return sum(height > 0.6 * max(heights) for height in heights)
    return 1


def measure_strokes(images: NDArray[np.float32]) -> Strokes:
    """Measure the strokes in images in [0, 1], of shape (n, height, width)."""
    widths = [_stroke_width(_enlarged(image, 4)) / 4 for image in images]
    return Strokes(*np.quantile(widths, (0.1, 0.5, 0.9)).tolist())


def place_ink(
    ink: NDArray[np.float32], placing: Placing, shape: tuple[int, int], strokes: Strokes | None = None
) -> NDArray[np.uint8]:
    """Return a character as in a data set: its strokes as wide, scaled with antialiasing, and centered.

    MNIST's digits are "size normalized to fit in a 20x20 pixel box while preserving their aspect ratio ..., centered in
    a 28x28 image by computing the center of mass of the pixels" (http://yann.lecun.com/exdb/mnist).

    Args:
        ink: A character's ink from :func:`characters`.
        placing: The data set's placing.
        shape: Height and width of the image.
        strokes: Usual widths of strokes; thinner and wider strokes get the nearest of them.
    """
    longer = placing.share * min(shape)
    if strokes:
        ink = _with_strokes(ink, longer, strokes)
    scale = longer / max(ink.shape)
    size = [max(1, round(scale * length)) for length in ink.shape]
    small = np.asarray(Image.fromarray(ink).resize((size[1], size[0]), Image.Resampling.HAMMING)).clip(0, 1)
    small = small / small.max()
    # MNIST's centers of mass are at pixel 14, counted from 0: the means of its test images are 14.00 and 14.01
    center = ndimage.center_of_mass(small) if placing.by_mass else [length / 2 for length in size]
    start = [  # clipped to the image
        min(max(round(whole / 2 - at), 0), whole - length)
        for whole, at, length in zip(shape, center, size, strict=True)
    ]
    image = np.zeros(shape, np.uint8)
    image[start[0] : start[0] + size[0], start[1] : start[1] + size[1]] = np.rint(255 * small)
    return image


def _with_strokes(ink: NDArray[np.float32], longer: float, strokes: Strokes) -> NDArray[np.float32]:
    """Return a character's ink with strokes that will have a usual width when the ink is scaled.

    Args:
        ink: The character's ink.
        longer: The longer side that it will get, in pixels of the data set's images.
        strokes: The usual widths.
    """
    fine = _enlarged(ink, -(-8 * round(longer) // max(ink.shape)))
    if max(fine.shape) > SIDE:  # distances take forty bytes a pixel
        fine = ndimage.maximum_filter(fine, 2)[::2, ::2]
    side, width = max(fine.shape), _stroke_width(fine)
    usual = min(max(width * longer / side, min(strokes.low, longer / 2)), strokes.high)
    if not 0 < width < side or usual == width * longer / side:
        return ink
    # the pen's path, which is as long as the side without the width, keeps its size
    grown = (usual * (side - width) / (longer - usual) - width) / 2
    is_ink = np.pad(fine, max(1, math.ceil(grown) + 1)) > 0.5
    # how far a pixel lies inside; only the side to which the edge moves matters
    depth = 1 - ndimage.distance_transform_edt(~is_ink) if grown > 0 else ndimage.distance_transform_edt(is_ink)
    changed = (depth + grown).clip(0, 1).astype(np.float32)
    rows, columns = np.nonzero(changed > 0.5)
    if not len(rows):  # all strokes are far thinner than the widest
        return ink
    return np.ascontiguousarray(changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])


def _stroke_width(ink: NDArray[np.float32]) -> float:
    """Return the width of the strokes in pixels; 0 if there are none.

    A pixel of a line of width w lies, on average, w/4 from its edge.
    """
    is_ink = np.pad(ink, 1) > 0.5
    distances = ndimage.distance_transform_edt(is_ink)[is_ink] - 0.5  # from the middle of a pixel to the edge
    return 4 * float(distances.mean()) if distances.size else 0.0


def _enlarged(ink: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    if factor == 1:
        return ink
    height, width = ink.shape
    large = Image.fromarray(ink).resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    return np.asarray(large).clip(0, 1)


def _edges(boxes: Sequence[tuple[slice, slice]], parts: NDArray[np.intp], whole: bool = False) -> NDArray[np.intp]:
    """Return top, bottom, left and right edges of parts, of shape (4, n), or of the whole, of shape (4, 1)."""
    edges = np.array([[(side.start, side.stop) for side in boxes[part - 1]] for part in parts]).reshape(-1, 4).T
    return np.array([[pick(row)] for pick, row in zip((min, max, min, max), edges, strict=True)]) if whole else edges


def _joined(
    top: NDArray[np.intp], bottom: NDArray[np.intp], left: NDArray[np.intp], right: NDArray[np.intp]
) -> list[NDArray[np.intp]]:
    """Return the indices of the parts of each character, from the edges of the parts' boxes."""
    heights = bottom - top
    usual = np.median(heights[heights > 0.3 * heights.max()])

    def gaps(start: NDArray[np.intp], stop: NDArray[np.intp]) -> NDArray[np.intp]:
        return np.maximum(start[:, None], start) - np.minimum(stop[:, None], stop)  # below 0 where they overlap

    across, down = gaps(left, right), gaps(top, bottom)
    lower, narrower = np.minimum(heights[:, None], heights), np.minimum((right - left)[:, None], right - left)
    union = np.maximum(bottom[:, None], bottom) - np.minimum(top[:, None], top)
    is_part = (lower < 0.7 * usual) & (union < 1.6 * usual)
    touching = (across < 0.05 * usual) & (down < 0.05 * usual) & (is_part | (np.minimum(-across, -down) > 0.1 * usual))
    above = (-across > 0.4 * narrower) & (down < 0.3 * usual)
    count, group = connected_components(touching | (above & is_part), directed=False)
    return [np.flatnonzero(group == number) for number in range(count)]


def _in_reading_order(
    groups: Sequence[NDArray[np.intp]], boxes: Sequence[tuple[slice, slice]]
) -> list[NDArray[np.intp]]:
    """Return groups of parts row by row, each row from left to right, without specks."""
    edges = np.hstack([_edges(boxes, group, whole=True) for group in groups])
    top, bottom, left, _ = edges
    heights, middles = bottom - top, (top + bottom) / 2
    usual = np.median(heights[heights > 0.3 * heights.max()])
    rows: list[list[int]] = []
    for index in np.argsort(left):
        if np.ptp(edges[:2, index]) < 0.3 * usual and np.ptp(edges[2:, index]) < 0.3 * usual:
            continue
        offsets = [abs(middles[row[-1]] - middles[index]) for row in rows]
        if offsets and min(offsets) < 0.6 * usual:
            rows[int(np.argmin(offsets))].append(int(index))
        else:
            rows.append([int(index)])
    rows.sort(key=lambda row: float(np.mean(middles[row])))
    return [groups[index] for row in rows for index in row]
