"""Data modules: split, scale, augment and serve images from memory; MNIST is included."""

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
from mnist_lightning.data.ink import ink_of
from mnist_lightning.data.pictures import opaque, resized
from mnist_lightning.data.placing import Placing, Strokes, characters, measure_strokes, place_ink
from mnist_lightning.system.console import rank_zero_print
from mnist_lightning.system.errors import UserError

Batch = tuple[Tensor, Tensor]
"""Images, float32 of shape (batch, channels, height, width), and labels, int64 of shape (batch,)."""

DOUBTFUL = 0.8
"""Answers about pictures with a smaller probability are marked."""


class Split(Dataset[Batch]):
    """Images and labels in memory, from which whole batches are gathered, scaled and augmented.

    Args:
        images: Images of shape (n, channels, height, width): uint8 (a quarter of the memory of float32, and faster to
            gather) or floats in [0, 1].
        labels: int64 of shape (n,).
        augmentation: Modules applied to each batch in turn; each maps images in [0, 1] and labels to the same.
        statistics: Mean and standard deviation of each channel, of shape (channels, 1, 1), to standardize with.
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
        """Return the same images and labels on ``device``."""
        mean, std = self.statistics or (None, None)
        statistics = None if mean is None or std is None else (mean.to(device), std.to(device))
        return Split(self.images.to(device), self.labels.to(device), self.augmentation, statistics)

    def scaled(self, indices: Sequence[int] | NDArray[np.integer[Any]] | Tensor) -> Tensor:
        """Return the images at ``indices`` without augmentation or standardization: float32 in [0, 1]."""
        # index_select takes half the time of indexing with a list or a tensor
        images = self.images.index_select(0, torch.as_tensor(indices).to(self.images.device, non_blocking=True))
        return images / 255 if images.dtype == torch.uint8 else images.float()

    def standardized(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] as the network gets them: standardized if there are statistics."""
        if self.statistics is None:
            return images
        mean, std = self.statistics
        return (images - mean) / std

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return the batch of the images and labels at ``indices``; the DataLoader calls this once a batch."""
        index = torch.as_tensor(indices).to(self.labels.device, non_blocking=True)
        images, labels = self.scaled(index), self.labels.index_select(0, index)
        for augment in self.augmentation:
            images, labels = augment(images, labels)
        return self.standardized(images), labels


class TensorBatchSampler(BatchSampler):
    """A ``BatchSampler`` that yields the indices of a batch as a tensor: one slice instead of 64 numbers in turn.

    A single index that is left over joins the batch before it: batch normalization cannot train on one image.

    Args:
        sampler: Yields the indices of an epoch.
        batch_size: Number of indices in a batch.
        drop_last: Whether to leave out a last, smaller batch.
        device: Device of the data; all indices of an epoch are sent there in one transfer.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        batch_size: int,
        drop_last: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.device = device

    def __len__(self) -> int:
        return super().__len__() - self._joins()

    def _joins(self) -> bool:
        count = len(self.sampler)  # type: ignore[arg-type]
        return not self.drop_last and count > 1 and count % self.batch_size == 1

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        """Return an iterator over index tensors of shape (batch,), in the order of the sampler."""
        # Lightning sets a distributed sampler's epoch after this, so draw its order later, but others' orders now
        return self._batches() if isinstance(self.sampler, DistributedSampler) else iter([*self._batches()])

    def _batches(self) -> Iterator[Tensor]:
        batches = torch.tensor(list(self.sampler), device=self.device).split(self.batch_size)
        if self._joins():
            batches = (*batches[:-2], torch.cat(batches[-2:]))
        yield from batches[:-1] if self.drop_last and len(batches[-1]) < self.batch_size else batches


class ImageDataModule(LightningDataModule):
    """Labeled images, held in memory: training images, validation images (by default the end of these) and test images.

    Your own data set is a subclass with a method :meth:`load`. The network gets the size of the images and the number
    of classes from the data module.

    Args:
        data_dir: Folder with the data set; its files are never changed.
        batch_size: Images in a training batch. The last, smaller batch of an epoch is kept, but a single
            image that is left over joins the batch before it: batch normalization cannot train on one.
        eval_batch_size: Images in a batch of validation, test and prediction; no result depends on it.
        val_split: Share of the training images, taken from their end, that is held out for validation; it is taken from
            the end of each class if a class would otherwise have no training images.
        split_seed: Seed of the shuffle before the training images are split; null keeps their order.
        standardize: Whether each channel gets mean 0 and standard deviation 1 over the training images; otherwise
            values are in [0, 1].
        augmentation: Modules that change training batches on the device of the data; each maps images in [0, 1] and
            labels to the same, as in ``mnist_lightning.augmentation`` and ``torchvision.transforms.v2``.

    Attributes:
        train: The training images, once they are loaded.
        val: The validation images, once they are loaded.
        test: The test images, once they are loaded.
        has_own_val: Whether the data set has validation images, so none are held out; known once they are loaded.
        is_split_by_class: Whether a share of each class is held out; known once the images are loaded.
    """

    placing: Placing | None = None
    """The place of a character's ink in an image; None if images are whole pictures."""

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
        if "_class_path" not in self.hparams:  # not made from a config, where the augmentation has plain types
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
        self._strokes: Strokes | None = None

    def load(self, split: str) -> tuple[Any, Any] | None:
        """Read a part of the data set.

        Args:
            split: ``"train"``, ``"val"`` or ``"test"``.

        Returns:
            Images of shape (n, channels, height, width) or (n, height, width), uint8 or floats in [0, 1], and whole
            numbers as labels, of shape (n,): arrays or tensors. None for ``"val"`` if validation images are held out
            from those of ``"train"``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method load(split) that returns images and labels")

    @property
    def source(self) -> str:
        """The name and folder of the data set, for messages."""
        return f"{type(self).__name__.removesuffix('DataModule')}{f' in {self.data_dir}' if self.data_dir else ''}"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        split = self.train or self.test
        channels, height, width = (split.images if split else self._load(self._some_split())[0]).shape[1:]
        return channels, height, width

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes with the labels 0, 1, ...; None if the distinct labels are the classes."""
        return None

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the network's outputs."""
        if self._own_classes is None:
            names = self.class_names
            self._own_classes = [str(name) for name in (self._distinct_labels() if names is None else names)]
        return self._trained_classes or self._own_classes

    def names(self, outputs: int) -> list[str]:
        """Return the names of a network's outputs: those of the classes, and numbers for further outputs."""
        return [*self.classes[:outputs], *map(str, range(len(self.classes), outputs))]

    @property
    def strokes(self) -> Strokes | None:
        """The usual widths of the strokes in the images, by a hundred of them; None if images are whole pictures."""
        if self._strokes is None and self.placing:
            split = self.train or self.test or Split(*self._load(self._some_split()))
            chosen = torch.linspace(0, len(split) - 1, min(100, len(split))).long()
            self._strokes = measure_strokes(split.scaled(chosen)[:, 0].cpu().numpy())
        return self._strokes

    def _some_split(self) -> str:
        """Return a split that the data set has."""
        return "train"

    def from_picture(self, picture: Image.Image, is_sheet: bool = False) -> NDArray[np.uint8]:
        """Make images from a picture as the data set's were made: place its ink, or resize the whole picture.

        Args:
            picture: A picture from :func:`mnist_lightning.data.pictures.read`.
            is_sheet: Whether the picture has several characters.

        Returns:
            Images of shape (n, channels, height, width), where n is 1 unless the picture is a sheet.

        Raises:
            PictureError: If there is no ink.
            UserError: If the data set does not support sheets.
        """
        picture, (channels, *shape) = opaque(picture), self.image_shape
        if self.placing is None:
            if is_sheet:
                raise UserError(f"--sheet is for characters, but the images of {self.source} are whole pictures.")
            return resized(picture, self.image_shape)[None]
        found = characters(ink_of(picture, is_sheet), is_sheet)
        images = np.stack([place_ink(ink, self.placing, (shape[0], shape[1]), self.strokes) for ink in found])
        return images[:, None].repeat(channels, axis=1)

    def setup(self, stage: str) -> None:
        """Load the splits that ``stage`` needs, if they are not loaded yet.

        Args:
            stage: ``"fit"`` or ``"validate"`` (training and validation images) or ``"test"`` or ``"predict"``.

        Raises:
            UserError: If the data is missing, damaged or invalid.
        """
        needs_training = stage in ("fit", "validate")
        if self.train is None and (needs_training or self.standardize):
            images, labels = self._labeled("train")
            statistics = None
            self.has_own_val = self._load("val") is not None
            if self.has_own_val:
                validation = self._labeled("val")
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
                raise UserError(
                    f"{self.source}: there are too few training images to split: add some, or change --data.val_split."
                )
            if (missing := lacks(labels, validation[1])) is not None:
                raise UserError(
                    f"{self.source}: class {self.classes[missing]} has validation images, but no training images."
                )
            if self.standardize:
                with memory_for(self.source):
                    statistics = _statistics(images)
            self.train = Split(images, labels, self.augmentation, statistics)
            self.val = Split(*validation, statistics=statistics)
        if not needs_training and self.test is None:
            self.test = Split(*self._labeled("test"), statistics=self.train.statistics if self.train else None)
        self._loaded.clear()

    def reuse_splits(self, other: "ImageDataModule") -> None:
        """Take the images that another data module has loaded, if this one would load and split them the same way."""
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

    def reuse_loaded(self, other: "ImageDataModule") -> None:
        """Take the data that another data module with the same arguments has read, to avoid reading it again."""
        self._loaded, self._own_classes = other._loaded, other._own_classes

    def describe(self) -> str:
        """Return a line that describes the loaded data."""
        parts = [f"Data: {self.source}", "standardized" if self.standardize else "scaled to [0, 1]"]
        if self.val is not None:
            of = "each class's training images" if self.is_split_by_class else "the training images"
            images = "its own images" if self.has_own_val else f"{self.val_split:.4g} of {of}"
            parts.append(f"{images} for validation")
        augmentation = ", ".join(type(each).__name__ for each in self.augmentation)
        if self.train is not None and augmentation:
            parts.append(f"augmented in training by {augmentation}, so the metrics of train are on augmented images")
        return ", ".join(parts)

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the classes, to store them in a checkpoint."""
        return {"classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint has the data's classes, and number these as the checkpoint does.

        Raises:
            UserError: If the data has a class that the checkpoint does not have.
        """
        trained, own = [*state_dict["classes"]], self._own_classes or self.classes
        if unknown := [name for name in own if name not in trained]:
            raise UserError(
                f"{self.source} has the class {unknown[0]}, but the checkpoint's network is for {', '.join(trained)}."
            )
        if trained != self.classes:
            self._trained_classes = trained
            for split in (self.train, self.val, self.test):
                if split is not None:
                    split.labels = self._as_trained(split.labels)

    def _as_trained(self, labels: Tensor) -> Tensor:
        """Return labels as the checkpoint numbers them."""
        if self._trained_classes is None or self._own_classes is None:
            return labels
        return torch.tensor([self._trained_classes.index(name) for name in self._own_classes])[labels]

    def digest(self) -> str:
        """Return a hexadecimal digest of the training and validation images and labels, however they are split."""
        digest = hashlib.blake2b(digest_size=8)
        for kind in ("images", "labels"):
            for split in (self.train, self.val):
                digest.update(getattr(split, kind).numpy())
        return digest.hexdigest()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training batches, reshuffled in every epoch; Lightning distributes them among devices."""
        train = self._on_device(self.train)
        sampler = TensorBatchSampler(RandomSampler(train), self.batch_size, device=train.images.device)
        return DataLoader(train, batch_sampler=sampler, collate_fn=_identity)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches, in order."""
        return self._eval_dataloader(self.val)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches, in order."""
        return self._eval_dataloader(self.test)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches: images to predict, with their true labels."""
        return self.test_dataloader()

    def _eval_dataloader(self, split: Split | None) -> DataLoader[Batch]:
        split = self._on_device(split)
        # Lightning's sampler for several devices repeats images that cannot be distributed evenly
        shares = self.trainer.distributed_sampler_kwargs if self.trainer else None
        sampler = UnrepeatedDistributedSampler(split, shuffle=False, **shares) if shares else None
        return DataLoader(split, batch_size=self.eval_batch_size, sampler=sampler, collate_fn=_identity)

    def _on_device(self, split: Split | None) -> Split:
        assert split is not None, "call setup() first"
        # batches are gathered, scaled and augmented on the device that uses them
        with memory_for(self.source):
            return split.to(self.trainer.strategy.root_device) if self.trainer else split

    def _load(self, split: str) -> Any:
        """Return the data from :meth:`load` as tensors of the right shape."""
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
                f"{self.source}: {split} has {len(images)} images but {'x'.join(map(str, labels.shape))} labels; each "
                "image needs one whole number, and both must come from the same copy of the data set."
            )
        return images.contiguous(), labels.long()

    def _distinct_labels(self) -> list[int]:
        labels: list[int] = self._load("train")[1].unique().tolist()
        return labels

    def _labeled(self, split: str) -> Batch:
        """Return images, and labels as the indices of their classes."""
        images, labels = self._load(split)
        if images.shape[1:] != (shape := self.image_shape):
            raise UserError(
                f"{self.source}: {split} images are {'x'.join(map(str, images.shape[1:]))}, but training images are "
                f"{'x'.join(map(str, shape))}."
            )
        numbers = self._distinct_labels() if self.class_names is None else [*range(len(self.class_names))]
        if unknown := {*labels.unique().tolist()} - {*numbers}:
            raise UserError(
                f"{self.source}: a {split} image has label {min(unknown)}, which is not one of the {len(numbers)} "
                "classes."
            )
        if numbers != [*range(len(numbers))]:
            if split == "train":
                rank_zero_print(
                    f"{self.source}: the labels are {', '.join(map(str, numbers))}; in the network, these are the "
                    f"classes 0 to {len(numbers) - 1}"
                )
            labels = torch.searchsorted(torch.tensor(numbers), labels)
        return images, self._as_trained(labels)


FILE_NAMES = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}
"""Ends of the file names."""


class MNISTDataModule(ImageDataModule):
    """MNIST, from the copy inside the package; with ``data_dir``, any data set in files of the same format.

    The files are ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
    ``t10k-labels-idx1-ubyte``, raw or with ``.gz``. Images may have any size. If there are labels other than 0 to 9,
    the distinct labels are the classes.
    """

    placing = Placing(20 / 28, by_mass=True)
    files = ("train-{}", "t10k-{}")
    """Names of the training and test files, around one of ``FILE_NAMES``."""

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
        """Return the split that shape and labels are read from: to evaluate, a folder may have only test images."""
        names = [[prefix.format(kind) for kind in FILE_NAMES.values()] for prefix in self.files]
        has_train, has_test = (all(find_idx(self.folders(), name) for name in pair) for pair in names)
        return "test" if has_test and not has_train else "train"

    def folders(self) -> list[Path]:
        """Return the folders that may have the files; without any, the package's own files are read."""
        return [self.data_dir] if self.data_dir else []

    def _read(self, split: str, kind: str, header_only: bool = False) -> NDArray[np.uint8]:
        name = self.files[split == "test"].format(FILE_NAMES[kind])
        folders = self.folders()
        if not folders:
            return parse_idx(embedded(name), name)
        path = find_idx(folders, name)
        if path is None:
            raise UserError(
                f"{self.data_dir} has no file {name} or {name}.gz. --data.data_dir needs these four, raw or gzipped: "
                f"{', '.join(MD5)}; null is the package's own copy."
            )
        return read_idx(path, header_only)


def lacks(labels: Tensor, others: Tensor) -> int | None:
    """Return the smallest of ``others`` that is not among ``labels``, or None."""
    return min({*others.unique().tolist()} - {*labels.unique().tolist()}, default=None)


def held_out_by_class(labels: Tensor, share: float) -> Tensor:
    """Return a mask of the images to hold out: a share from the end of each class, which keeps at least one."""
    counts = labels.bincount()
    kept = (counts.double() * (1 - share)).long().clamp(min=1)
    order = labels.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return places >= kept[labels]


@contextmanager
def memory_for(what: str, size: int = 0) -> Iterator[None]:
    """Report data that does not fit into memory in one line; if its size is known, before allocating it.

    Args:
        what: Name of the data, for the message.
        size: Number of bytes needed.

    Raises:
        UserError: If there is not enough memory.
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
        raise UserError(f"{what} does not fit into {where}{reason}. Use fewer or smaller images.") from error


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel over images scaled to [0, 1], of shape (channels, 1, 1)."""
    scale = 255 if images.dtype == torch.uint8 else 1
    means, stds = [], []
    for channel in range(images.shape[1]):  # one by one: float64 takes eight times the memory of uint8
        values = images[:, channel].double() / scale
        means.append(values.mean())
        stds.append(values.std(correction=0).clamp(min=1e-7))
    mean, std = (torch.stack(values).float().view(-1, 1, 1) for values in (means, stds))
    return mean, std


def _identity(batch: Any) -> Any:
    return batch
