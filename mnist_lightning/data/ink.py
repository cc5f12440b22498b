"""Tell ink from paper in a picture, for any colors of ink and paper, and any light."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from mnist_lightning.data.pictures import PictureError

CONTRAST = 0.05
"""Smallest difference between ink and paper, where black and white differ by 1; the paper's grain is below it."""

GRAIN = 0.01
"""Standard deviation above which the paper's grain, or a camera's noise, is averaged out."""

TINY = 20
"""Pixels on the longer side that are too few to tell ink from uneven light, so light is assumed to be even."""

LINE, SLOPES = 0.015, np.linspace(-0.1, 0.1, 81)
"""The largest width of the lines of ruled paper, as a share of the picture's longer side, and the slopes to try."""

SHADOW = 0.18, 0.14
"""Widths of discs that fit into a shadow but not into a stroke, as shares of the longer side; tried in turn."""


def ink_of(picture: Image.Image, is_sheet: bool = False) -> NDArray[np.float32]:
    """Return the amount of ink in each pixel, for any colors of ink and paper, either of them lighter, and any light.

    The color of the paper is at most a quadratic function of the position that fits most of the picture. The ink is the
    difference from it in one direction of the colors, the first principal component. Areas that are wider than a stroke
    can be (the rest of a shadow, or a shadow with an edge) count as light, too.

    Args:
        picture: A picture of mode L or RGB.
        is_sheet: Whether strokes are at most an eighth of the picture's longer side, instead of half of it.

    Returns:
        Values from 0 for paper to 1 for ink, of shape (height, width), or eight times as high and wide if the picture
        has at most :data:`TINY` pixels a side.

    Raises:
        PictureError: If there is no ink.
    """
    width, height = picture.size
    scale = min(1.0, 96 / max(width, height))
    small_size = max(1, round(width * scale)), max(1, round(height * scale))
    small = _colors(picture.resize(small_size, Image.Resampling.BOX))
    border = np.ones(small.shape[:2], bool)
    margin = max(1, round(0.04 * max(small_size)))
    border[margin:-margin, margin:-margin] = False
    coefficients = _fit(small, border)
    small -= _surface(coefficients, *small.shape[:2])
    # the direction in which the colors differ most from the paper
    direction = np.linalg.eigh(np.einsum("hwc,hwd->cd", small, small))[1][:, -1].astype(np.float32)
    sign, rest = _uneven(small @ direction, 0.125 if is_sheet else 0.5)
    direction *= sign
    rest = _scaled(rest, (width, height))
    paper = -_surface(coefficients @ direction[:, None], height, width)[..., 0] - rest
    ink = _colors(picture) @ direction + paper
    # the lightness of the paper limits the contrast of dark ink
    if paper.max() > CONTRAST:
        ink *= paper.max() / paper.clip(0.2 * paper.max())
    edge = _scaled(border.astype(np.float32), (width, height)) > 0.5
    ink -= np.median(ink[edge])
    noise = _noise(ink)
    if noise > GRAIN:
        ink = ndimage.uniform_filter(ink, max(2, round(max(ink.shape) / 200)))
        noise = _noise(ink)
    strong = ink[ink > max(6 * noise, CONTRAST)]
    if not strong.size:
        raise PictureError("there is no ink on it")
    level = np.percentile(strong, 90)  # not the median: strokes with few full pixels would become too thick
    low = min(2 * noise, 0.3 * level)
    ink = np.asarray(((ink - low) / (level - low)).clip(0, 1), np.float32)
    if max(ink.shape) <= TINY:
        return _sharpened(ink)
    unruled = _without_lines(_without_lines(ink).T).T
    return unruled if unruled.max() > 0.5 else ink  # a line alone is a character, such as a 1


def _noise(ink: NDArray[np.float32]) -> float:
    """Return the standard deviation of the noise, assumed to be normal, from the values below 0, which have no ink."""
    return float(1.4826 * np.median(-ink[ink <= 0]))


def _colors(picture: Image.Image) -> NDArray[np.float32]:
    """Return the values of a picture from 0 to 1, of shape (height, width, channels)."""
    values = np.array(picture, np.float32)
    values /= 255  # in place: a copy of a large picture takes 70 MB
    return values.reshape(*values.shape[:2], -1)


def _terms(height: int, width: int) -> list[NDArray[np.float32]]:
    """Return the terms of a quadratic function of the position, which broadcast to (height, width)."""
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    return [np.ones((1, 1), np.float32), x, y, x * x, x * y, y * y]


def _surface(coefficients: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Return a quadratic function for each channel, from coefficients of shape (6, channels)."""
    surface: NDArray[np.float32] = np.zeros((height, width, coefficients.shape[1]), np.float32)
    for term, row in zip(_terms(height, width), coefficients, strict=True):
        surface += term[..., None] * row
    return surface


def _fit(values: NDArray[np.float32], border: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the coefficients of the surface close to most pixels, by reweighted least squares from the border inwards.

    The fit minimizes the sum of the absolute deviations first, then of their logarithms (Cauchy's weights), for which
    the darkness of ink and hard shadows hardly matters. The surface is the simplest of flat, plane and curved that is
    about as close: a curved one would follow the ink of a character that fills the picture.
    """
    terms = np.stack([np.broadcast_to(term, border.shape).ravel() for term in _terms(*border.shape)], axis=1)
    wanted = values.reshape(len(terms), -1)
    fits, shares = [], []
    for count in (1, 3, 6) if max(border.shape) > TINY else (1,):
        weights = border.ravel() + np.float32(0.05)
        for step in range(40):
            weighted = terms[:, :count] * weights[:, None]
            fit = np.linalg.lstsq(weighted.T @ terms[:, :count], weighted.T @ wanted, rcond=1e-5)[0]
            deviations = np.linalg.norm(wanted - terms[:, :count] @ fit, axis=1)
            weights = 1 / (deviations + 1e-3 if step < 15 else deviations**2 + 0.03**2)
        fits.append(np.pad(fit, ((0, 6 - count), (0, 0))).astype(np.float32))
        shares.append((deviations < 0.04).mean())
    return fits[next(index for index, share in enumerate(shares) if share >= 0.9 * max(shares))]


def _uneven(values: NDArray[np.float32], stroke: float) -> tuple[int, NDArray[np.float32]]:
    """Return the sign of the ink among deviations from the paper, and their part that is light and shadow, not ink.

    If there is no shadow with an edge, that part is whatever is wider than ``stroke``, a share of the longer side, by a
    morphological opening.
    """
    longer = max(values.shape)
    if longer > TINY:
        half = values[::2, ::2]
        around = ndimage.median_filter(half, size=max(half.shape) // 2)  # the paper on either side of an edge
        sign = 1 if ((half - around) ** 3).sum() > 0 else -1
        for width in SHADOW:
            shadow = _shadow(sign * values, round(width / 2 * longer))
            if shadow is not None:
                return sign, shadow
    sign = 1 if (values**3).sum() > 0 else -1
    size = max(3, round((stroke if longer > TINY else 1) * longer))
    return sign, np.asarray(ndimage.grey_opening(sign * values, size=size))


def _shadow(values: NDArray[np.float32], radius: int) -> NDArray[np.float32] | None:
    """Return how much darker than the paper a shadow with an edge is, or how much lighter the area next to it; or None.

    The shadow is what an opening and a closing with a disc leave: an even area of at least a twentieth of the picture.
    But if the thin part, the ink, is as dark as that area or as the paper, the area belongs to a character that fills
    the picture.
    """
    disc = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) < radius + 0.5
    opened = ndimage.grey_opening(values, footprint=disc, mode="nearest")
    broad = np.asarray(ndimage.grey_closing(opened, footprint=disc, mode="nearest"))
    thin = np.abs(values - broad)
    ink = np.median(values[thin >= 0.8 * thin.max()])
    areas, count = ndimage.label(np.abs(broad) > CONTRAST)
    found = False
    for area in (areas == number for number in range(1, count + 1)):
        level = np.percentile(broad[area], 90 if broad[area].mean() > 0 else 10)  # bold ink is lighter at its edges
        is_ink = min(abs(ink), abs(ink - level)) < 0.15 * abs(level)
        if is_ink or np.mean(thin[area] < CONTRAST) < 0.5 or area.mean() < 0.05:
            broad[area] = 0
        else:
            found = True
    return broad if found else None


def _without_lines(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """Remove the rules of lined paper: thin, straight, parallel lines from the left edge to the right edge.

    Ink that is both above and below a line stays.
    """
    height, width = ink.shape
    is_ink = ndimage.maximum_filter1d(ink > 0.25, 3, axis=0)
    columns = np.linspace(0, width - 1, min(width, 60)).astype(int)
    rows = np.arange(height)[:, None]
    best, covered, slope = 0, np.zeros(height), 0.0
    for candidate in SLOPES:
        at = rows + np.rint(candidate * (columns - width / 2)).astype(int)
        shares = np.where((at >= 0) & (at < height), is_ink[at.clip(0, height - 1), columns], False).mean(axis=1)
        if (shares > 0.95).sum() > best:
            best, covered, slope = int((shares > 0.95).sum()), shares, candidate
    labels, count = ndimage.label(covered > 0.6)
    lines = [np.flatnonzero(labels == number) for number in range(1, count + 1)]
    lines = [line for line in lines if covered[line].max() > 0.95 and len(line) - 2 <= max(3, LINE * max(ink.shape))]
    cleared, shift = ink.copy(), np.rint(slope * (np.arange(width) - width / 2)).astype(int)
    for line in lines:
        top, bottom = (
            ink[(edge + shift).clip(0, height - 1), np.arange(width)] for edge in (line[0] - 2, line[-1] + 2)
        )
        for row in range(line[0] - 1, line[-1] + 2):
            at = row + shift
            inside = (at >= 0) & (at < height)
            cleared[at[inside], np.flatnonzero(inside)] = np.minimum(top, bottom)[inside]
    return cleared


def _sharpened(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the ink eight times as high and wide: smooth, and with the given values as means of 8x8 pixels.

    Iterative back-projection (Irani and Peleg, 1991) adds the means' errors and clips the values to [0, 1].
    """
    height, width = ink.shape
    large = np.zeros((8 * height, 8 * width), np.float32)
    for _ in range(10):
        lack = ink - large.reshape(height, 8, width, 8).mean(axis=(1, 3))
        lacking = Image.fromarray(lack).resize((8 * width, 8 * height), Image.Resampling.LANCZOS)
        large = (large + np.asarray(lacking)).clip(0, 1)
    return large


def _scaled(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return values resized to a width and height."""
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR))
