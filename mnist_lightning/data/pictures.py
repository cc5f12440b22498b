"""Turn any picture into the form of a data set: find, read, remove paper, cut, place."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from scipy.sparse.csgraph import connected_components

SIDE = 1200
"""Pictures whose longer side has at least twice as many pixels are reduced to more than this."""
PIXELS = 25_000_000
"""Most pixels of a picture, so none takes 180 MB to decode. JPEG can be decoded at a smaller size."""
FRUGAL = ("JPEG", "MPO", "PNG", "TIFF", "GIF", "BMP")
"""Formats that take at most seven bytes a pixel; others (WebP, JPEG 2000) take up to 19, and may have a quarter."""
CONTRAST = 0.05
"""Smallest difference between ink and paper, where black and white differ by 1; the paper's grain is below it."""

GRAIN = 0.01
"""Standard deviation above which the paper's grain, or a camera's noise, is averaged out."""

TINY = 20
"""Pixels on the longer side that are too few to tell ink from uneven light, so light is assumed to be even."""

SHADOW = 0.18, 0.14
"""Widths of discs that fit into a shadow but not into a stroke, as shares of the longer side; tried in turn."""

EDGE, STROKE = 0.25, 0.6
"""Least ink at a stroke's edge and in its middle: a part that is nowhere darker is a stain."""

Image.init()  # registers the file name endings of all formats


class PictureError(Exception):
    """A picture that cannot be used; the message follows the picture's name in a sentence."""


class Placing(NamedTuple):
    """How a data set places the ink of a character in its images.

    Attributes:
        share: Longer side of the ink as a share of the image's side.
        by_mass: Whether the ink is centered by its center of mass, instead of the center of its box.
    """

    share: float
    by_mass: bool


def pictures_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Return the pictures in a folder, and the number of other files by ending.

    The search goes to any depth and follows symbolic links; hidden files and folders are skipped.
    """
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()  # skip links to a parent folder: they never end
        folders[:] = sorted(n for n in folders if n[0] != "." and not real.is_relative_to(Path(parent, n).resolve()))
        files += [Path(parent, name) for name in sorted(names) if name[0] != "."]
    is_read = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    pictures = [file for file in files if file.suffix.lower() in is_read]
    return pictures, Counter(file.suffix.lower() or "none" for file in files if file.suffix.lower() not in is_read)


def find(names: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Yield the files for names of files, folders and patterns, each once, with an error or an empty string.

    A folder stands for all pictures in it by their names, at any depth, but not the hidden ones.
    """
    seen = set()
    for name in names:
        path = Path(name).expanduser()
        paths = [path] if path.exists() else sorted(map(Path, glob(str(path), recursive=True)))
        if not paths:
            yield path, "there is no such file, folder or match"
        for given in paths:
            files = [given]
            if given.is_dir():
                files, _ = pictures_in(given)
                if not files:
                    yield given, "the folder has no pictures"
            for file in files:
                if file not in seen:
                    seen.add(file)
                    yield file, "" if file.is_file() else "it is not a file"


def read(path: Path) -> tuple[Image.Image, str]:
    """Read a picture, upright, and reduced to less than twice :data:`SIDE` pixels a side.

    Returns:
        The picture, in mode L, RGB, RGBA, I or F, and a note on it or an empty string.

    Raises:
        PictureError: If the file is damaged, too large or not a picture.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            size = image.size
            if image.format in ("JPEG", "MPO"):
                image.draft(None, (2 * SIDE, 2 * SIDE))
                if not image.info.get("progressive"):  # a progressive JPEG is decoded as a whole, at any size
                    size = image.size
            limit = PIXELS if image.format in FRUGAL else PIXELS // 4
            if size[0] * size[1] > limit:
                raise PictureError(f"it has more than {limit / 1e6:.0f} megapixels: scale it down")
            # the further pictures in a phone's MPO are previews or other views
            has_frames = image.format != "MPO" and getattr(image, "is_animated", False)
            picture = normalize_mode(image)
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        is_heic = path.suffix.lower() in (".heic", ".heif")
        raise PictureError(
            "HEIC is not supported: save it as JPEG" if is_heic else "it is not a picture that Pillow reads"
        ) from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"it has far more than {PIXELS / 1e6:.0f} megapixels: scale it down") from error
    except Exception as error:  # Pillow's readers raise anything
        raise PictureError(f"it cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error
    return picture, "it has several frames or pages: the first is used" if has_frames else ""


def normalize_mode(image: Image.Image) -> Image.Image:
    """Return a picture upright, with less than twice :data:`SIDE` pixels a side, in mode L, RGB, RGBA, I or F."""
    # strip by strip to save memory: Pillow copies to convert, and to reduce transparent pictures
    mode = {"1": "L", "P": "RGBA", "PA": "RGBA"}.get(image.mode, image.mode.split(";")[0])
    (width, height), factor = image.size, max(1, max(image.size) // SIDE)
    picture = Image.new(mode, (-(-width // factor), -(-height // factor)))
    for top in range(0, height, 9 * factor):
        strip = image.crop((0, top, width, min(top + 9 * factor, height))).convert(mode)
        picture.paste(strip.reduce(factor), (0, top // factor))
    picture.info = image.info
    ImageOps.exif_transpose(picture, in_place=True)
    if mode in ("L", "I", "F"):
        return picture
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def opaque(picture: Image.Image) -> Image.Image:
    """Return a picture without transparency and with 8 bits a channel, in mode L or RGB.

    Transparent pixels become white, or black behind a light drawing. If values have more bits, the largest tells
    whether the range has 1, 8, 12 or 16 bits.
    """
    if picture.mode in ("I", "F"):
        values = np.asarray(picture, np.float32)
        most = float(values.max())
        white = next((white for white in (1, 255, 4095, 65535) if most <= white), most)
        return Image.fromarray((values.clip(0) * (255 / white)).astype(np.uint8))
    if picture.mode == "RGBA":
        colors = np.asarray(picture, np.float32)
        opacity = colors[..., 3].sum()
        is_light = opacity > 0 and (colors[..., :3].mean(axis=2) * colors[..., 3]).sum() / opacity > 127.5
        behind = Image.new("RGBA", picture.size, "black" if is_light else "white")
        return Image.alpha_composite(behind, picture).convert("RGB")
    return picture


def resized(picture: Image.Image, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return a whole picture of mode L or RGB with the channels, height and width of ``shape``."""
    channels, height, width = shape
    array = np.asarray(picture.convert("L" if channels == 1 else "RGB").resize((width, height)))
    return array.reshape(height, width, -1).transpose(2, 0, 1)


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
    nothing = PictureError("there is no ink on it")
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
        raise nothing
    level = np.percentile(strong, 90)  # not the median: strokes with few full pixels would become too thick
    low = min(2 * noise, 0.3 * level)
    ink = np.asarray(((ink - low) / (level - low)).clip(0, 1), np.float32)
    return ink if max(ink.shape) > TINY else _sharpened(ink)


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


def place_ink(ink: NDArray[np.float32], placing: Placing, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a character as in a data set: scaled with antialiasing to a part of ``shape``, and centered.

    MNIST's digits are "size normalized to fit in a 20x20 pixel box while preserving their aspect ratio ..., centered in
    a 28x28 image by computing the center of mass of the pixels" (http://yann.lecun.com/exdb/mnist).

    Args:
        ink: A character's ink from :func:`characters`.
        placing: The data set's placing.
        shape: Height and width of the image.
    """
    scale = placing.share * min(shape) / max(ink.shape)
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
