"""Your own pictures: find, read and resize them to the form of a data set."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

SIDE = 1200
"""Pictures whose longer side has at least twice as many pixels are reduced to more than this."""

PIXELS = 25_000_000
"""The most pixels of a picture, so none takes 180 MB to decode. JPEG can be decoded at a smaller size."""

FRUGAL = ("JPEG", "MPO", "PNG", "TIFF", "GIF", "BMP")
"""Formats that take at most seven bytes a pixel; others (WebP, JPEG 2000) take up to 19, and may have a quarter."""

Image.init()  # registers the file name endings of all formats


class PictureError(Exception):
    """A picture that cannot be used; the message follows the picture's name in a sentence."""


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
