"""More data sets by name: those that torchvision downloads, and folders of images."""

import hashlib
import os
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageOps
from tqdm import tqdm

from mnist_lightning.data import FILE_NAMES, ImageDataModule, MNISTDataModule, held_out_by_class, lacks, memory_for
from mnist_lightning.data.idx import MD5, find_idx
from mnist_lightning.data.pictures import PictureError, opaque, pictures_in, resized
from mnist_lightning.data.placing import Placing
from mnist_lightning.system.console import rank_zero_print
from mnist_lightning.system.errors import UserError


def downloads() -> Path:
    """Return the folder of downloaded data sets."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # HOME is not set, and the user has no name, as in a container
        raise UserError(
            "There is no home folder for downloads: set XDG_CACHE_HOME, or give --data.data_dir."
        ) from error
    return cache / "mnist_lightning/torchvision"


def from_torchvision(name: str, data_dir: Path | None, files: str, **arguments: Any) -> Any:
    """Return a data set of torchvision; download it if it is missing.

    Args:
        name: Name of the class in ``torchvision.datasets``.
        data_dir: The data set's ``root``; None for :func:`downloads`.
        files: Files that torchvision reads instead of a download, for the message.
        arguments: Further arguments of the class.

    Raises:
        UserError: If the data set is missing and cannot be downloaded.
    """
    from torchvision import datasets  # takes a second

    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"There is no folder {data_dir}.")
    root = data_dir or downloads()
    try:
        if data_dir is None:
            root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):  # several processes may download it simultaneously
            return getattr(datasets, name)(root, download=True, **arguments)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"{name} is not in {root} and cannot be downloaded ({' '.join(str(error).split())}). "
            f"Put {files} into a folder and pass it as --data.data_dir"
        ) from error


class MNISTLike(MNISTDataModule):
    """Base of data sets in files like MNIST's, which are read from ``data_dir`` or downloaded."""

    image_shape = (1, 28, 28)
    others: Sequence[Path] = ()
    """Further folders that may have the files."""
    arguments: Mapping[str, Any] = MappingProxyType({})
    """Arguments of torchvision's class."""

    def folders(self) -> list[Path]:
        name = type(self).__name__
        folders = [downloads() / name / "raw", *self.others]
        if self.data_dir:
            folders = [self.data_dir, self.data_dir / name / "raw"]
        if find_idx(folders, self.files[0].format(FILE_NAMES["images"])) is None:
            files = ", ".join(prefix.format(kind) for prefix in self.files for kind in FILE_NAMES.values())
            from_torchvision(name, self.data_dir, f"{files} (raw or gzipped)", **self.arguments)
        return folders

    def load(self, split: str) -> tuple[Any, Any] | None:
        loaded = super().load(split)
        if loaded is not None:
            content = b"\0\0\x08\x01" + len(loaded[1]).to_bytes(4) + loaded[1].tobytes()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() in MD5.values():
                raise UserError(f"The files in {self.data_dir} are MNIST's, not {type(self).__name__}'s.")
        return loaded


class FashionMNIST(MNISTLike):
    """Clothes (Xiao, Rasul and Vollgraf, 2017): 60,000 training and 10,000 test images, gray, 28x28.

    Without ``data_dir``, the files come from Debian's package ``dataset-fashion-mnist`` or are downloaded.
    """

    class_names = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    others = (Path("/usr/share/datasets/fashion-mnist"),)

    def from_picture(self, picture: Image.Image, is_sheet: bool = False) -> NDArray[np.uint8]:
        """Make an image from a product photo as Xiao et al. did.

        Margins within 5 % of the color of the corner are cut off, the longer side becomes 28 pixels, the shorter side
        is padded, and a photo on white is inverted.
        """
        if is_sheet:
            raise UserError("--sheet is for characters, but the images of FashionMNIST are of clothes.")
        grey = opaque(picture).convert("L")
        corner = grey.getpixel((0, 0))
        assert isinstance(corner, int)
        if corner > 127:
            grey, corner = ImageOps.invert(grey), 255 - corner
        difference = ImageChops.difference(grey, Image.new("L", grey.size, corner))
        box = difference.point([255 * (level > 0.05 * 255) for level in range(256)]).getbbox()
        if box is None:
            raise PictureError("there is nothing on it")
        return np.asarray(ImageOps.pad(grey.crop(box), self.image_shape[:0:-1]))[None, None]


class KMNIST(MNISTLike):
    """Cursive Japanese characters (Clanuwat et al., 2018): 60,000 training and 10,000 test images, gray, 28x28."""

    placing = Placing(1, by_mass=False)
    class_names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


class EMNIST(MNISTLike):
    """Handwritten digits and letters (Cohen et al., 2017), gray, 28x28.

    Args:
        split: One of its sets: ``byclass`` (62 classes), ``bymerge`` or ``balanced`` (47: some small letters share a
            class with their capitals), ``letters`` (26), ``digits`` or ``mnist``.
    """

    placing = Placing(24 / 28, by_mass=False)  # with a border of two pixels (section II of the paper)

    def __init__(
        self,
        split: Literal["balanced", "byclass", "bymerge", "letters", "digits", "mnist"] = "balanced",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.split = split
        self.files = (f"emnist-{split}-train-{{}}", f"emnist-{split}-test-{{}}")
        self.arguments = {"split": split}

    @property
    def class_names(self) -> Sequence[str]:
        merged = "cijklmopsuvwxyz" if self.split in ("balanced", "bymerge") else ""
        characters = string.digits + string.ascii_uppercase + "".join(sorted({*string.ascii_lowercase} - {*merged}))
        few = {"letters": string.ascii_lowercase, "digits": string.digits, "mnist": string.digits}
        return [*few.get(self.split, characters)]

    def load(self, split: str) -> tuple[Any, Any] | None:
        if split == "val":
            return None
        # EMNIST's files swap rows and columns, and count letters from 1
        return self._read(split, "images").swapaxes(1, 2).copy(), self._read(split, "labels") - (
            self.split == "letters"
        )


class TorchvisionDataModule(ImageDataModule):
    """Base of data sets that torchvision reads."""

    files: str
    """Files that can be put into ``data_dir`` instead of a download."""

    def load(self, split: str) -> tuple[Any, Any] | None:
        if split == "val":
            return None
        name = type(self).__name__
        dataset = from_torchvision(name, self.data_dir, self.files, train=split == "train")
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        images = images.permute(0, 3, 1, 2) if images.dim() == 4 else images
        return images, labels[:, 0] if labels.dim() == 2 else labels  # QMNIST's rows have more numbers than the label


class QMNIST(TorchvisionDataModule):
    """MNIST with all of NIST's 60,000 test digits (Yadav and Bottou, 2019), gray, 28x28."""

    placing = MNISTDataModule.placing
    class_names = tuple(string.digits)
    image_shape = (1, 28, 28)
    files = "QMNIST/raw/ with qmnist-{train,test}-images-idx3-ubyte and qmnist-{train,test}-labels-idx2-int"


class USPS(TorchvisionDataModule):
    """Digits from American envelopes (Hull, 1994): 7,291 training and 2,007 test images, gray, 16x16."""

    placing = Placing(1, by_mass=False)
    class_names = tuple(string.digits)
    image_shape = (1, 16, 16)
    files = "usps.bz2 and usps.t.bz2"


class CIFAR10(TorchvisionDataModule):
    """Photos of animals and vehicles (Krizhevsky, 2009): 50,000 training and 10,000 test images, color, 32x32."""

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    image_shape = (3, 32, 32)
    files = "cifar-10-python.tar.gz, or its folder cifar-10-batches-py,"


BAR_AFTER = 3.0
"""Seconds of reading files after which a terminal shows a progress bar."""

GREY = ("1", "L", "LA")
"""Pillow's modes without color."""


class ImageFolder(ImageDataModule):
    """Image files with a folder for each class, as in torchvision's ``ImageFolder``.

    ``data_dir`` has the folders ``train`` and ``test`` with a folder for each class, and may have ``val``. Or
    ``data_dir`` itself has a folder for each class: then some of the images are held out for testing.

    Args:
        size: Height and width to which images are scaled; by default those of the first image, which all images must
            have.
        channels: 1 for gray, 3 for color; by default that of the first image, and no other image may have more.
        test_split: Share of the images that is held out for testing if ``data_dir`` has no folder ``test``; the share
            of each class if a class would otherwise have no training images.
        split_seed: Seed of the shuffle before images are held out.
    """

    def __init__(
        self,
        data_dir: str,
        size: tuple[PositiveInt, PositiveInt] | None = None,
        channels: Literal[1, 3] | None = None,
        test_split: OpenUnitInterval = 0.2,
        split_seed: NonNegativeInt | None = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir=data_dir, split_seed=split_seed, **kwargs)
        self.size = size
        self.channels = channels
        self.test_split = test_split
        self._left_out: Counter[str] = Counter()

    @property
    def class_names(self) -> Sequence[str]:
        return self._files[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        (path, _), *_ = self._files[1]["train"]
        with self._open(path) as image:
            channels = 1 if image.mode in GREY else 3
            height, width = self.size or (image.height, image.width)
        return self.channels or channels, height, width

    def load(self, split: str) -> tuple[Any, Any] | None:
        files = self._files[1].get(split)
        if files is None:
            return None
        if self._left_out:
            endings = ", ".join(f"{count} {ending}" for ending, count in sorted(self._left_out.items()))
            rank_zero_print(f"{self.source}: files left out, as Pillow does not read these endings: {endings}")
            self._left_out.clear()
        channels, height, width = self.image_shape
        with memory_for(self.source, len(files) * channels * height * width):
            images = np.empty((len(files), channels, height, width), np.uint8)
        bar = tqdm(
            files,
            f"Reading {split} images",
            leave=False,
            disable=getattr(rank_zero_only, "rank", 0) > 0 or None,  # None: if the output is not a terminal
            delay=BAR_AFTER,
        )
        for index, (path, _) in enumerate(bar):
            with self._open(path) as image:
                if self.channels is None and channels == 1 and image.mode not in GREY:
                    raise UserError(
                        f"{path} is in color, but the first image is gray: add --data.channels 3, or 1 to make all "
                        "gray."
                    )
                if self.size is None and image.size != (width, height):
                    raise UserError(
                        f"{path} has {image.height}x{image.width} pixels, but the first image has {height}x{width}: "
                        f"set one size for all, such as --data.size [{height},{width}]"
                    )
                images[index] = resized(image, (channels, height, width))
        if len(images) > 1 and (images == images[0]).all():
            rank_zero_print(
                f"{self.source}: all {len(images)} {split} images are the same, so nothing can be learned from them."
            )
        return images, np.array([label for _, label in files])

    @cached_property
    def _files(self) -> tuple[list[str], dict[str, list[tuple[str, int]]]]:
        """The names of the classes, and the path and class of each image of each split."""
        assert self.data_dir is not None
        has_splits = (self.data_dir / "train").is_dir()
        splits = ("train", "val", "test") if has_splits else (".",)
        folders = {
            split: self.data_dir / split for split in splits if split != "val" or (self.data_dir / "val").is_dir()
        }
        try:
            classes = _classes_in(folders[splits[0]])
            files: dict[str, list[tuple[str, int]]] = {split: [] for split in folders}
            for split, folder in folders.items():
                if unknown := {*_classes_in(folder)} - {*classes}:
                    raise FileNotFoundError(f"{folder / min(unknown)} is a class that train does not have.")
                for label, name in enumerate(classes):
                    pictures, others = pictures_in(folder / name)
                    self._left_out += others
                    files[split] += [(str(path), label) for path in pictures]
                    if split == splits[0] and not pictures:
                        raise FileNotFoundError(f"{folder / name} has no pictures.")
        except OSError as error:
            raise UserError(
                f"{self.data_dir} must have a folder of images for each class, or folders train and test that have "
                f"these: {' '.join(str(error).split())[:300]}"
            ) from error
        if not has_splits:
            (everything,) = files.values()
            order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(self.split_seed or 0))
            shuffled = [everything[i] for i in order]
            count = max(1, int(len(shuffled) * self.test_split))
            labels = torch.tensor([label for _, label in shuffled])
            is_test = torch.arange(len(shuffled)) < count
            if lacks(labels[count:], labels) is not None:
                is_test = held_out_by_class(labels, self.test_split)
            files = {
                name: [file for file, is_in in zip(shuffled, mask, strict=True) if is_in]
                for name, mask in (("train", ~is_test), ("test", is_test))
            }
        return classes, files

    def _open(self, path: str) -> Image.Image:
        try:
            image = ImageOps.exif_transpose(Image.open(path))
            if image.mode[0] in "IF":
                raise ValueError("it has more than 8 bits a channel, which would be cut off")
            is_grey = image.mode in GREY
            if image.has_transparency_data:  # a drawing saved from a canvas is black on transparent
                image = opaque(image.convert("RGBA"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        return image.convert("L") if is_grey else image


def _classes_in(folder: Path) -> list[str]:
    """Return the names of the folders in a folder that are not hidden."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise FileNotFoundError(f"{folder} has no folders.")
    return classes
