"""The data: right bytes, right split, right batches, and errors that help."""

import gzip
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.commands import write_idx
from lightning.pytorch import Trainer
from torch.utils.data import BatchSampler, RandomSampler
from torchvision.datasets.mnist import read_image_file, read_label_file

from mnist_lightning.classifier import Classifier
from mnist_lightning.data import MNISTDataModule, TensorBatchSampler
from mnist_lightning.data.idx import MD5, embedded, parse_idx
from mnist_lightning.networks import MLP
from mnist_lightning.system.errors import UserError

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0,
}  # fmt: skip


def test_the_split_is_keras_s_and_equals_what_torchvision_reads(mnist, tmp_path):
    for name in MD5:
        (tmp_path / name).write_bytes(embedded(name))
    train, test = (
        (
            read_image_file(f"{tmp_path}/{prefix}-images-idx3-ubyte"),
            read_label_file(f"{tmp_path}/{prefix}-labels-idx1-ubyte"),
        )
        for prefix in ("train", "t10k")
    )
    assert (len(mnist.train), len(mnist.val), len(mnist.test)) == (48_000, 12_000, 10_000)
    assert torch.equal(torch.cat([mnist.train.images, mnist.val.images]).squeeze(1), train[0])
    assert torch.equal(torch.cat([mnist.train.labels, mnist.val.labels]), train[1])
    assert torch.equal(mnist.test.images.squeeze(1), test[0])
    assert torch.equal(mnist.test.labels, test[1])


def test_batches_are_float_images_from_0_to_1(mnist):
    images, labels = next(iter(mnist.val_dataloader()))
    assert images.shape == (250, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal(images, mnist.val.images[:250].float() / 255)
    assert torch.equal(labels, mnist.val.labels[:250])


def test_an_epoch_has_every_image_once_in_another_order(data_dir):
    datamodule = MNISTDataModule(str(data_dir), batch_size=64)
    datamodule.setup("fit")
    torch.manual_seed(0)
    first, second = (list(datamodule.train_dataloader()) for _ in range(2))
    assert [len(labels) for _, labels in first] == [64] * 15 + [40]
    whole = [torch.cat([images for images, _ in epoch]).flatten(1) for epoch in (first, second)]
    expected = (datamodule.train.images / 255).flatten(1)
    for epoch in whole:
        assert not torch.equal(epoch, expected)
        assert torch.equal(torch.unique(epoch, dim=0), torch.unique(expected, dim=0))
    assert not torch.equal(*whole)


def test_a_single_last_image_is_trained_on_with_the_batch_before(data_dir):
    classifier = Classifier(MLP([8], normalization="batch"))  # which cannot train on one image
    seen = []
    original = classifier.training_step
    classifier.training_step = lambda batch: (seen.append(len(batch[1])), original(batch))[1]
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(classifier, MNISTDataModule(str(data_dir), batch_size=333))
    assert seen == [333, 333, 334]
    assert trainer.num_training_batches == 3


def test_batches_may_be_of_one_image(data_dir):
    trainer = Trainer(max_epochs=1, limit_train_batches=2, **QUIET)
    trainer.fit(Classifier(MLP([8])), MNISTDataModule(str(data_dir), batch_size=1))
    assert trainer.global_step == 2


def test_a_single_index_is_joined_as_each_device_has_it():
    for count, sizes in ((7, [3, 4]), (8, [3, 3, 2]), (9, [3, 3, 3]), (1, [1]), (4, [4])):
        sampler = TensorBatchSampler(range(count), 3)
        batches = list(sampler)
        assert [len(batch) for batch in batches] == sizes
        assert len(sampler) == len(sizes)
        assert torch.cat(batches).tolist() == [*range(count)]


def test_batches_are_made_on_the_trainer_s_device(data_dir):
    datamodule = MNISTDataModule(str(data_dir))
    datamodule.setup("fit")
    strategy = SimpleNamespace(root_device=torch.device("meta"))
    datamodule.trainer = SimpleNamespace(strategy=strategy, distributed_sampler_kwargs=None)
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        assert {tensor.device.type for batch in loader for tensor in batch} == {"meta"}
    assert {batch.device.type for batch in datamodule.train_dataloader().batch_sampler} == {"meta"}
    assert (datamodule.train.images.device.type, datamodule.val.labels.device.type) == ("cpu", "cpu")


@pytest.mark.parametrize("drop_last", [False, True])
def test_index_tensors_are_the_batches_of_torch_s_sampler(drop_last):
    def batches(sampler):
        order = RandomSampler(range(100), generator=torch.Generator().manual_seed(3))
        return [list(map(int, batch)) for batch in sampler(order, 32, drop_last)]

    assert batches(TensorBatchSampler) == batches(BatchSampler)


def test_val_split_counts_from_the_end(data_dir):
    datamodule = MNISTDataModule(str(data_dir), val_split=0.1)
    datamodule.setup("fit")
    assert (len(datamodule.train), len(datamodule.val)) == (1125, 125)


def test_gzipped_and_raw_files_are_read_alike(data_dir, tmp_path):
    for name in MD5:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((data_dir / name).read_bytes()))
    raw, zipped = (MNISTDataModule(str(folder)) for folder in (data_dir, tmp_path))
    for datamodule in (raw, zipped):
        datamodule.setup("test")
    assert torch.equal(raw.test.images, zipped.test.images)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.gz" for name in MD5)


def test_training_does_not_touch_the_test_files(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("t10k*"):
        path.unlink()
    datamodule = MNISTDataModule(str(tmp_path))
    datamodule.setup("fit")
    datamodule.setup("validate")
    with pytest.raises(UserError, match="has no file t10k-images-idx3-ubyte"):
        datamodule.setup("test")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "has no file train-images-idx3-ubyte or"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "its header says 1250x28x28 values"),
        (lambda path: path.write_bytes(b"\0\0"), "too few for an IDX header"),
        (lambda path: path.write_bytes(b"no images at all, just text"), "magic number"),
        (
            lambda path: path.write_bytes(path.with_name("train-labels-idx1-ubyte").read_bytes()),
            "magic number 0x00000801",
        ),
        (lambda path: write_idx(path, np.zeros((3, 28, 28))), "3 images but 1250 labels"),
        (lambda path: path.rename(f"{path}.gz"), "damaged or not an IDX file: Not a gzipped file"),
    ],
)
def test_a_bad_copy_is_named(data_dir, tmp_path, damage, message):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "train-images-idx3-ubyte")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message) as error:
        MNISTDataModule(str(tmp_path)).setup("fit")
    assert str(tmp_path) in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_truncated_gzip_file_is_named(data_dir, tmp_path):
    for name in MD5:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((data_dir / name).read_bytes())[:-20])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        MNISTDataModule(str(tmp_path)).setup("fit")


def test_parse_idx_gives_labels():
    assert parse_idx(b"\0\0\x08\x01\0\0\0\x03\x07\x00\x09", "labels").tolist() == [7, 0, 9]
