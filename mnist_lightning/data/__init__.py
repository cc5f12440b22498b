"""Data modules: split, scale, augment and serve images from memory; MNIST is inside."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler

from mnist_lightning.data.idx import MD5, embedded, find_idx, parse_idx, read_idx
from mnist_lightning.data.pictures import Placing, characters, ink_of, opaque, place_ink, resized
from mnist_lightning.system.console import rank_zero_print
from mnist_lightning.system.errors import UserError

Batch = tuple[Tensor, Tensor]
"""Images, float32 of shape (batch, channels, height, width), and labels, int64 of shape (batch,)."""


class Split(Dataset[Batch]):
    """Images and labels in memory, from which a whole batch is gathered, scaled and augmented at once.

    Args:
        images: Of shape (n, channels, height, width): uint8 (a quarter of the memory of float32, and faster to gather),
            or floats in [0, 1].
        labels: int64 of shape (n,).
        augmentation: Applied to each batch, one after the other; each maps images in [0, 1] and labels to such.
        statistics: Mean and standard deviation of each channel, of shape (channels, 1, 1), to standardise with.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        augmentation: Sequence[nn.Module] = (),
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.augmentation = augmentation
        self.statistics = statistics

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """The same images and labels on ``device``."""
        mean, std = self.statistics or (None, None)
        statistics = None if mean is None or std is None else (mean.to(device), std.to(device))
        return Split(self.images.to(device), self.labels.to(device), self.augmentation, statistics)

    def scaled(self, indices: Sequence[int] | NDArray[np.integer[Any]] | Tensor) -> Tensor:
        """The images at ``indices`` as they are in the data set: float32 in [0, 1]."""
        # index_select takes half the time of indexing with a list or a tensor
        images = self.images.index_select(0, torch.as_tensor(indices).to(self.images.device, non_blocking=True))
        return images / 255 if images.dtype == torch.uint8 else images.float()

    def standardized(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as a network gets them, if they are standardised."""
        if self.statistics is None:
            return images
        mean, std = self.statistics
        return (images - mean) / std

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Batch of the images and labels at ``indices``; the DataLoader calls it once a batch."""
        index = torch.as_tensor(indices).to(self.labels.device, non_blocking=True)
        images, labels = self.scaled(index), self.labels.index_select(0, index)
        for augment in self.augmentation:
            images, labels = augment(images, labels)
        return self.standardized(images), labels


class TensorBatchSampler(BatchSampler):
    """A ``BatchSampler`` that gives the indices of a batch as a tensor: one slice instead of 64 numbers in turn.

    Args:
        sampler: Gives the indices of an epoch.
        batch_size: Indices in a batch.
        drop_last: Leave out a last, smaller batch.
        device: Where the data is; all indices of an epoch are sent there at once.
        join_single: Add a single last index to the batch before.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        batch_size: int,
        drop_last: bool = False,
        device: torch.device | None = None,
        join_single: bool = False,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.device = device
        self.join_single = join_single

    def __len__(self) -> int:
        return super().__len__() - self._joins()

    def _joins(self) -> bool:
        count = len(self.sampler)  # type: ignore[arg-type]
        return self.join_single and count > 1 and count % self.batch_size == 1

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        """Index tensors of shape (batch,), in the order of the sampler."""
        # Lightning tells a distributed sampler its epoch after this, so its order must wait; others are drawn at once
        return self._batches() if isinstance(self.sampler, DistributedSampler) else iter([*self._batches()])

    def _batches(self) -> Iterator[Tensor]:
        batches = torch.tensor(list(self.sampler), device=self.device).split(self.batch_size)
        if self._joins():
            batches = (*batches[:-2], torch.cat(batches[-2:]))
        yield from batches[:-1] if self.drop_last and len(batches[-1]) < self.batch_size else batches


class ImageDataModule(LightningDataModule):
    """Labelled images, held in memory: the head of the training images, their tail as validation, and test images.

    A data set of one's own is a subclass with a method :meth:`load`, and needs no more. A network gets the size of the
    images and the number of classes from here.

    Args:
        data_dir: Folder with the data set; what is there is never changed.
        batch_size: Images in a training batch. The last, smaller batch of an epoch is kept; a single image is added to
            the batch before if the network has batch normalization that needs two.
        eval_batch_size: Images in a batch of validation, test and prediction; no result depends on it.
        val_split: Share of the training images, taken from their end, that is held out for validation; from the end of
            each class instead, where that would leave none of a class to train with.
        split_seed: Shuffles the training images before they are split, always alike; null keeps their order.
        standardize: Whether each channel gets mean 0 and standard deviation 1 over the training images; else they are
            in [0, 1].
        augmentation: Changes training batches, on the device where they are: modules that map images in [0, 1] and
            labels to such, as ``mnist_lightning.augmentation`` and ``torchvision.transforms.v2`` have them.

    Attributes:
        train: The training images, once they are loaded; likewise ``val`` and ``test``.
        has_own_val: Whether the data set has validation images, so that none are held out; known once they are loaded.
        is_split_by_class: Whether a share of each class is held out; likewise.
    """

    placing: Placing | None = None
    """How the ink of a character lies in an image; None where images are whole pictures."""

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: PositiveInt = 64,
        eval_batch_size: PositiveInt = 250,
        val_split: OpenUnitInterval = 0.2,
        split_seed: NonNegativeInt | None = None,
        standardize: bool = False,
        augmentation: list[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if "_class_path" not in self.hparams:  # not made from a config, which has the augmentation in plain types
            self.hparams.pop("augmentation", None)
            self.hparams["_class_path"] = f"{type(self).__module__}.{type(self).__qualname__}"
        self.data_dir = Path(data_dir).expanduser() if data_dir is not None else None
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_split = val_split
        self.split_seed = split_seed
        self.standardize = standardize
        self.augmentation = augmentation or []
        self.train: Split | None = None
        self.val: Split | None = None
        self.test: Split | None = None
        self.has_own_val = False
        self.is_split_by_class = False
        self._own_classes: list[str] | None = None
        self._trained_classes: list[str] | None = None
        self._loaded: dict[str, Any] = {}

    def load(self, split: str) -> tuple[Any, Any] | None:
        """Read a part of the data set.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.

        Returns:
            Images of shape (n, channels, height, width) or (n, height, width), uint8 or floats in [0, 1], and whole
            numbers as labels, of shape (n,): arrays or tensors. None for ``"val"`` if validation images are to be held
            out from those of ``"train"``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method load(split) that returns images and labels")

    @property
    def source(self) -> str:
        """Where the data is from, for people."""
        return f"{type(self).__name__.removesuffix('DataModule')}{f' in {self.data_dir}' if self.data_dir else ''}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        split = self.train or self.test
        channels, height, width = (split.images if split else self._load("train")[0]).shape[1:]
        return channels, height, width

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes with the labels 0, 1, ...; None if the labels are to be counted."""
        return None

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the network's outputs."""
        if self._own_classes is None:
            names = self.class_names
            self._own_classes = [str(name) for name in (self._distinct_labels() if names is None else names)]
        return self._trained_classes or self._own_classes

    def names(self, outputs: int) -> list[str]:
        """Names of a network's outputs: those of the classes, and numbers for what it has beyond them."""
        return [*self.classes[:outputs], *map(str, range(len(self.classes), outputs))]

    def from_picture(self, picture: Image.Image, is_sheet: bool = False) -> NDArray[np.uint8]:
        """Make images of a picture as those of the data set were made: its ink, placed, or all of it, resized.

        Args:
            picture: As :func:`mnist_lightning.data.pictures.read` gives it.
            is_sheet: Whether there are several characters on it.

        Returns:
            Of shape (n, channels, height, width), where n is 1 but for a sheet.

        Raises:
            PictureError: There is no ink.
            UserError: If sheets are not for this data set.
        """
        picture, (channels, *shape) = opaque(picture), self.image_shape
        if self.placing is None:
            if is_sheet:
                raise UserError(f"--sheet is for characters, but the images of {self.source} are whole pictures.")
            return resized(picture, self.image_shape)[None]
        found = characters(ink_of(picture, is_sheet), is_sheet)
        images = np.stack([place_ink(ink, self.placing, (shape[0], shape[1])) for ink in found])
        return images[:, None].repeat(channels, axis=1)

    def setup(self, stage: str) -> None:
        """Load the splits that ``stage`` needs, if they are not loaded yet.

        Args:
            stage: ``"fit"`` or ``"validate"`` (training and validation images) or ``"test"`` or ``"predict"``.

        Raises:
            UserError: If the data is missing, damaged or not what it should be.
        """
        needs_training = stage in ("fit", "validate")
        if self.train is None and (needs_training or self.standardize):
            images, labels = self._labelled("train")
            statistics = None
            self.has_own_val = self._load("val") is not None
            if self.has_own_val:
                validation = self._labelled("val")
            else:
                order = torch.arange(len(labels))
                if self.split_seed is not None:
                    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))
                split = int(len(labels) * (1 - self.val_split))  # Keras's rule for `validation_split`
                self.is_split_by_class = lacks(labels[order[:split]], labels[order[split:]]) is not None
                if self.is_split_by_class:
                    is_held_out = held_out_by_class(labels[order], self.val_split)
                    split, order = int((~is_held_out).sum()), torch.cat([order[~is_held_out], order[is_held_out]])
                if self.is_split_by_class or self.split_seed is not None:
                    with memory_for(self.source, images.nbytes):
                        images, labels = images[order], labels[order]
                validation = images[split:], labels[split:]
                images, labels = images[:split], labels[:split]
            if not min(len(labels), len(validation[1])):
                raise UserError(f"{self.source}: there are too few training images to split.")
            if (missing := lacks(labels, validation[1])) is not None:
                raise UserError(
                    f"{self.source}: of class {self.classes[missing]} there are validation images, but none to train "
                    "with."
                )
            if self.standardize:
                with memory_for(self.source):
                    statistics = _statistics(images)
            self.train = Split(images, labels, self.augmentation, statistics)
            self.val = Split(*validation, statistics=statistics)
        if not needs_training and self.test is None:
            self.test = Split(*self._labelled("test"), statistics=self.train.statistics if self.train else None)
        self._loaded.clear()

    def take_images(self, other: "ImageDataModule") -> None:
        """Take the images that another data module has loaded, if it would load and split them alike."""
        names = ("data_dir", "val_split", "split_seed", "standardize")
        own, others = ({**each.hparams, **{n: getattr(each, n) for n in names}} for each in (self, other))
        for settings in (own, others):
            for name in ("batch_size", "eval_batch_size", "augmentation"):
                settings.pop(name, None)
        if type(self) is not type(other) or own != others:
            return
        for name in ("train", "val", "test"):
            if (split := getattr(other, name)) is not None:
                augmentation = self.augmentation if name == "train" else []
                setattr(self, name, Split(split.images, split.labels, augmentation, split.statistics))
        self.has_own_val, self.is_split_by_class = other.has_own_val, other.is_split_by_class

    def share(self, other: "ImageDataModule") -> None:
        """Take what another data module with the same arguments has read, so that it is not read again."""
        self._loaded, self._own_classes = other._loaded, other._own_classes

    def describe(self) -> str:
        """Return the data in a line, once it is loaded."""
        parts = [f"Data: {self.source}", "standardised" if self.standardize else "scaled to [0, 1]"]
        if self.val is not None:
            of = "each class's training images" if self.is_split_by_class else "the training images"
            held_out = f"{self.val_split:.4g} of {of} held out"
            parts.append(f"{'its own images' if self.has_own_val else held_out} for validation")
        augmentation = ", ".join(type(each).__name__ for each in self.augmentation)
        if self.train is not None and augmentation:
            parts.append(f"augmented in training by {augmentation}, so that metrics of train are of augmented images")
        return ", ".join(parts)

    def state_dict(self) -> dict[str, Any]:
        """The names of the classes, to be stored in a checkpoint."""
        return {"classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See that a checkpoint's classes are those of the data, or number the data's as the checkpoint does.

        Raises:
            UserError: If the data has a class that the checkpoint does not have.
        """
        trained, own = [*state_dict["classes"]], self._own_classes or self.classes
        if unknown := [name for name in own if name not in trained]:
            raise UserError(
                f"{self.source} has a class {unknown[0]}, but the checkpoint is of a network for {', '.join(trained)}."
            )
        if trained != self.classes:
            self._trained_classes = trained
            for split in (self.train, self.val, self.test):
                if split is not None:
                    split.labels = self._as_trained(split.labels)

    def _as_trained(self, labels: Tensor) -> Tensor:
        """Labels as a checkpoint numbers them."""
        if self._trained_classes is None or self._own_classes is None:
            return labels
        return torch.tensor([self._trained_classes.index(name) for name in self._own_classes])[labels]

    def digest(self) -> str:
        """What tells the training and validation images and labels, however split, from any others, in hexadecimal."""
        digest = hashlib.blake2b(digest_size=8)
        for kind in ("images", "labels"):
            for split in (self.train, self.val):
                digest.update(getattr(split, kind).numpy())
        return digest.hexdigest()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training batches, shuffled anew in every epoch; Lightning shares them out among devices."""
        train = self._on_device(self.train)
        sampler = TensorBatchSampler(
            RandomSampler(train), self.batch_size, device=train.images.device, join_single=self._joins_single()
        )
        return DataLoader(train, batch_sampler=sampler, collate_fn=_identity)

    def _joins_single(self) -> bool:
        """Whether there would be a training batch of one image, which the network cannot take.

        Raises:
            UserError: If there is no batch to which the image could be added.
        """
        assert self.train is not None
        share = -(-len(self.train) // getattr(self.trainer, "world_size", 1))
        if self.batch_size > 1 and share % self.batch_size != 1:
            return False
        needs_two = getattr(getattr(self.trainer, "lightning_module", None), "needs_two_images", None)
        if needs_two is None or not needs_two():
            return False
        if self.batch_size == 1 or share == 1:
            raise UserError(
                "The network has batch normalization, which cannot train on batches of one image: give it more with "
                f"--data.batch_size (now {self.batch_size}), or take another normalization."
            )
        rank_zero_print(
            "The last training batch would be of one image, which batch normalization cannot take: it is added to the "
            "batch before."
        )
        return True

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches, in order."""
        return self._eval_dataloader(self.val)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches, in order."""
        return self._eval_dataloader(self.test)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test batches again: images to predict, with the labels that they should get."""
        return self.test_dataloader()

    def _eval_dataloader(self, split: Split | None) -> DataLoader[Batch]:
        split = self._on_device(split)
        # Lightning's own sampler for several devices repeats images where they cannot be shared out evenly
        shares = self.trainer.distributed_sampler_kwargs if self.trainer else None
        sampler = UnrepeatedDistributedSampler(split, shuffle=False, **shares) if shares else None
        return DataLoader(split, batch_size=self.eval_batch_size, sampler=sampler, collate_fn=_identity)

    def _on_device(self, split: Split | None) -> Split:
        assert split is not None, "call setup() first"
        # batches are gathered, scaled and augmented where they are used
        with memory_for(self.source):
            return split.to(self.trainer.strategy.root_device) if self.trainer else split

    def _load(self, split: str) -> Any:
        """What :meth:`load` gives, as tensors that have the shape they should."""
        if split not in self._loaded:
            with memory_for(self.source):
                loaded = self.load(split)
                self._loaded[split] = None if loaded is None else self._as_tensors(split, *loaded)
        return self._loaded[split]

    def _as_tensors(self, split: str, images: Any, labels: Any) -> Batch:
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
        if images.dim() == 3:
            images = images.unsqueeze(1)
        is_scaled = images.dtype == torch.uint8 or (
            images.is_floating_point() and 0 <= images.min() <= images.max() <= 1
        )
        if images.dim() != 4 or not is_scaled:
            raise UserError(
                f"{self.source}: {split} images have shape {tuple(images.shape)}, {images.dtype}; they must be (n, "
                "channels, height, width) or (n, height, width), uint8 or floats from 0 to 1."
            )
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise UserError(
                f"{self.source}: {split} has {len(images)} images but {'x'.join(map(str, labels.shape))} labels; there "
                "must be a whole number for each image, and both must come from one copy of the data set."
            )
        return images.contiguous(), labels.long()

    def _distinct_labels(self) -> list[int]:
        labels: list[int] = self._load("train")[1].unique().tolist()
        return labels

    def _labelled(self, split: str) -> Batch:
        """Images, and labels as the indices of their classes."""
        images, labels = self._load(split)
        if images.shape[1:] != (shape := self.image_shape):
            raise UserError(
                f"{self.source}: {split} images are {'x'.join(map(str, images.shape[1:]))}, those of training "
                f"{'x'.join(map(str, shape))}."
            )
        numbers = self._distinct_labels() if self.class_names is None else [*range(len(self.class_names))]
        if unknown := {*labels.unique().tolist()} - {*numbers}:
            raise UserError(
                f"{self.source}: a {split} image has label {min(unknown)}, which is none of the {len(numbers)} classes."
            )
        if numbers != [*range(len(numbers))]:
            if split == "train":
                rank_zero_print(
                    f"{self.source}: its labels {_ranges(numbers)} are the network's classes 0 to {len(numbers) - 1}"
                )
            labels = torch.searchsorted(torch.tensor(numbers), labels)
        return images, self._as_trained(labels)


FILE_NAMES = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}
"""Ends of the names of files."""


class MNISTDataModule(ImageDataModule):
    """MNIST, from the copy inside the package; with ``data_dir`` any data set in files of the same format.

    The files are ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
    ``t10k-labels-idx1-ubyte``, raw or with ``.gz``. Images may have any size. If the labels are not just 0 to 9, the
    distinct ones are the classes.
    """

    placing = Placing(20 / 28, by_mass=True)
    files = ("train-{}", "t10k-{}")
    """Names of the files to train and to test with, around one of ``FILE_NAMES``."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        if not self.folders():
            return 1, 28, 28
        _, height, width = self._read(self._some_split(), "images", header_only=True).shape
        return 1, height, width

    @property
    def class_names(self) -> Sequence[str] | None:
        names = [str(digit) for digit in range(10)]
        return names if self.data_dir is None or max(self._distinct_labels()) < 10 else None

    def load(self, split: str) -> tuple[Any, Any] | None:
        return None if split == "val" else (self._read(split, "images"), self._read(split, "labels"))

    def _distinct_labels(self) -> list[int]:
        return [*map(int, np.unique(self._read(self._some_split(), "labels")))]

    def _some_split(self) -> str:
        """Training images tell what the data is like; to evaluate, a folder may have test images alone."""
        names = [[prefix.format(kind) for kind in FILE_NAMES.values()] for prefix in self.files]
        has_train, has_test = (all(find_idx(self.folders(), name) for name in pair) for pair in names)
        return "test" if has_test and not has_train else "train"

    def folders(self) -> list[Path]:
        """Where the files may be; without any, they are those of the package."""
        return [self.data_dir] if self.data_dir else []

    def _read(self, split: str, kind: str, header_only: bool = False) -> NDArray[np.uint8]:
        name = self.files[split == "test"].format(FILE_NAMES[kind])
        folders = self.folders()
        if not folders:
            return parse_idx(embedded(name), name)
        path = find_idx(folders, name)
        if path is None:
            raise UserError(
                f"{self.data_dir} has no file {name} or {name}.gz. --data.data_dir wants these four, raw or gzipped: "
                f"{', '.join(MD5)}; null is the package's own copy."
            )
        return read_idx(path, header_only)


def lacks(labels: Tensor, others: Tensor) -> int | None:
    """Return the least of ``others`` that is not among ``labels``, or None."""
    return min({*others.unique().tolist()} - {*labels.unique().tolist()}, default=None)


def held_out_by_class(labels: Tensor, share: float) -> Tensor:
    """Return which images are held out where each class gives a share from its end, but keeps one: a mask."""
    counts = labels.bincount()
    kept = (counts.double() * (1 - share)).long().clamp(min=1)
    order = labels.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return places >= kept[labels]


@contextmanager
def memory_for(what: str, size: int = 0) -> Iterator[None]:
    """Say in a line what does not fit into memory; before anything is tried, where its size is known.

    Args:
        what: For the message.
        size: Bytes that will be needed.

    Raises:
        UserError: If there is not enough.
    """
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    try:
        if size > free:
            raise MemoryError(f"it takes {size / 2**30:.1f} GiB")
        yield
    except (MemoryError, RuntimeError) as error:
        found = re.search(r"(?:it takes|unable to allocate|tried to allocate) [\d.]+ \w+", str(error), re.IGNORECASE)
        if isinstance(error, RuntimeError) and not found:
            raise
        is_device = isinstance(error, torch.OutOfMemoryError)
        where = "the device's memory" if is_device else f"memory, of which {free / 2**30:.1f} GiB are free"
        reason = f" ({found[0].lower().replace('gib', 'GiB')})" if found else ""
        raise UserError(f"{what} does not fit into {where}{reason}. Take fewer or smaller images.") from error


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over images scaled to [0, 1], of shape (channels, 1, 1)."""
    scale = 255 if images.dtype == torch.uint8 else 1
    means, stds = [], []
    for channel in range(images.shape[1]):  # one after the other: float64 takes eight times the memory of uint8
        values = images[:, channel].double() / scale
        means.append(values.mean())
        stds.append(values.std(correction=0).clamp(min=1e-7))
    mean, std = (torch.stack(values).float().view(-1, 1, 1) for values in (means, stds))
    return mean, std


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers for people, such as ``1 to 26`` or ``0, 3 to 5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _identity(batch: Any) -> Any:
    return batch
