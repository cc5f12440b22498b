"""MNIST from the copy inside the package or from a folder of the user's, split, scaled and served from memory."""

import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""The four files of MNIST and the MD5 of their unpacked bytes, as published with the database."""

MAX_BYTES = 2**30
"""What is read of a file, whatever its header promises: 1.3 million images."""

Batch = tuple[Tensor, Tensor]
"""Images, float32 of shape (batch, 1, 28, 28) in [0, 1], and labels, int64 of shape (batch,)."""


class Split(Dataset[Batch]):
    """Images and labels in memory, from which a whole batch is gathered and scaled at once.

    Args:
        images: uint8 of shape (n, 1, 28, 28); a quarter of the memory of float32, and faster to gather.
        labels: int64 of shape (n,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """The same images and labels on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Batch of the images and labels at ``indices``; the DataLoader calls it once a batch."""
        # index_select takes half the time of indexing with a list or a tensor
        index = torch.as_tensor(indices).to(self.images.device, non_blocking=True)
        return self.images.index_select(0, index) / 255, self.labels.index_select(0, index)


class TensorBatchSampler(BatchSampler):
    """A ``BatchSampler`` that gives the indices of a batch as a tensor: one slice instead of 64 numbers in turn.

    Args:
        sampler: Gives the indices of an epoch.
        batch_size: Indices in a batch.
        drop_last: Leave out a last, smaller batch.
        device: Where the data is; all indices of an epoch are sent there at once.
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

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        """Index tensors of shape (batch,), in the order of the sampler."""
        # Lightning tells a distributed sampler its epoch after this, so its order must wait; others are drawn at once
        return self._batches() if isinstance(self.sampler, DistributedSampler) else iter([*self._batches()])

    def _batches(self) -> Iterator[Tensor]:
        batches = torch.tensor(list(self.sampler), device=self.device).split(self.batch_size)
        yield from batches[:-1] if self.drop_last and len(batches[-1]) < self.batch_size else batches


class MNISTDataModule(LightningDataModule):
    """MNIST, held in memory: the head of the 60,000 training images, their tail as validation, 10,000 test images.

    Nothing is downloaded: the package carries the four files.

    Args:
        data_dir: Folder with an own copy of the four IDX files (raw or ``.gz``, 28x28 images, labels 0 to 9); it is
            only read. By default the copy inside the package is used.
        batch_size: Images in a training batch; the last, smaller batch of an epoch is kept.
        eval_batch_size: Images in a batch of validation, test and prediction; no result depends on it.
        val_split: Share of the training images, taken from their end, that is held out for validation.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: PositiveInt = 64,
        eval_batch_size: PositiveInt = 250,
        val_split: OpenUnitInterval = 0.2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.data_dir = Path(data_dir).expanduser() if data_dir is not None else None
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_split = val_split
        self.train: Split | None = None
        self.val: Split | None = None
        self.test: Split | None = None

    def setup(self, stage: str) -> None:
        """Load the splits that ``stage`` needs, if they are not loaded yet.

        Args:
            stage: ``"fit"`` or ``"validate"`` (training and validation images) or ``"test"`` or ``"predict"``.

        Raises:
            MisconfigurationException: A file of ``data_dir`` is missing, damaged or not what its name says.
        """
        if stage in ("fit", "validate"):
            if self.train is None:
                images, labels = self._load("train")
                split = int(len(labels) * (1 - self.val_split))  # Keras's rule for `validation_split`
                self.train = Split(images[:split], labels[:split])
                self.val = Split(images[split:], labels[split:])
        elif self.test is None:
            self.test = Split(*self._load("t10k"))

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
        sampler = TensorBatchSampler(RandomSampler(train), self.batch_size, device=train.images.device)
        return DataLoader(train, batch_sampler=sampler, collate_fn=_as_is)

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
        return DataLoader(split, batch_size=self.eval_batch_size, sampler=sampler, collate_fn=_as_is)

    def _on_device(self, split: Split | None) -> Split:
        assert split is not None, "call setup() first"
        # 47 MB at most: batches are gathered and scaled where they are used
        return split.to(self.trainer.strategy.root_device) if self.trainer else split

    def _load(self, prefix: str) -> Batch:
        images, labels = (self._read(f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        if len(images) != len(labels):
            raise MisconfigurationException(
                f"{self.data_dir}: {prefix} has {len(images)} images but {len(labels)} labels; "
                "take both files from one copy of the data set."
            )
        return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()

    def _read(self, name: str) -> NDArray[np.uint8]:
        if self.data_dir is None:
            return parse_idx(embedded(name), name)
        for path in (self.data_dir / name, self.data_dir / f"{name}.gz"):
            if path.is_file():
                try:
                    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                        count = int.from_bytes(file.read(8)[4:])
                        file.seek(0)  # no more than the header promises: a small .gz may hold any amount
                        return parse_idx(file.read(min(16 + count * 28 * 28 + 1, MAX_BYTES)), name)
                except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise MisconfigurationException(
                        f"{path} is damaged or no MNIST file: {error}. Copy it anew, or take the package's own "
                        "copy: --data.data_dir null"
                    ) from error
        raise MisconfigurationException(
            f"{self.data_dir} has no file {name} or {name}.gz. --data.data_dir wants these four, raw or gzipped: "
            f"{', '.join(MD5)}; null is the package's own copy."
        )


def _as_is(batch: Any) -> Any:
    return batch


def parse_idx(content: bytes, name: str) -> NDArray[np.uint8]:
    """Read an IDX file of MNIST, the format of http://yann.lecun.com/exdb/mnist.

    Args:
        content: The whole file, not compressed.
        name: Name of the file; ``images`` or ``labels`` in it says what it must hold.

    Returns:
        uint8 array, writable: images of shape (n, 28, 28), or labels of shape (n,) from 0 to 9.

    Raises:
        ValueError: The content is not what the name promises.
    """
    shape = (28, 28) if "images" in name else ()
    kind, header_size = ("images", 16) if shape else ("labels", 8)
    if len(content) < header_size:
        raise ValueError(f"{len(content)} bytes are too few for an IDX header")
    magic, count, *dims = np.frombuffer(content, ">u4", header_size // 4).tolist()
    if magic != 0x801 + len(shape):  # 08: unsigned bytes; then the number of dimensions
        raise ValueError(f"magic number {magic:#010x} is not {0x801 + len(shape):#010x}, that of {kind}")
    if tuple(dims) != shape:
        raise ValueError(f"its images are {'x'.join(map(str, dims))}, not 28x28")
    expected = header_size + count * int(np.prod(shape, dtype=int))
    if len(content) != expected or count == 0:
        found = "more" if len(content) > expected else len(content)
        raise ValueError(f"its header promises {count} {kind}, {expected} bytes in all, but it has {found}")
    array = np.frombuffer(bytearray(content), np.uint8, offset=header_size).reshape(count, *shape)
    if not shape and array.max() > 9:
        raise ValueError(f"label {array.max()} is not a digit")
    return array


def embedded(name: str) -> bytes:
    """The unpacked bytes of one of the package's files, from the cache if that is whole, else unpacked into it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnist_lightning"
    with suppress(OSError):
        content = (cache / name).read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == MD5[name]:
            return content
    content = gzip.decompress((Path(__file__).parent / "mnist" / f"{name}.gz").read_bytes())
    with suppress(OSError):  # a cache that cannot be written only costs the time to unpack
        cache.mkdir(parents=True, exist_ok=True)
        # write aside, then rename: another process never sees half a file
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
            file.write(content)
        Path(file.name).replace(cache / name)
    return content
