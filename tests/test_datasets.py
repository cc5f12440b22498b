"""Data sets of any shape: read right, refused with reason, and known to network, figures, predictions and report."""

import bz2
import io
import json
import os
import pickle
import re
import string
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.datasets
import yaml
from helpers.commands import in_process, write_idx
from helpers.pictures import COLORS, write_files
from helpers.studies import load
from PIL import Image

from mnist_lightning import datasets
from mnist_lightning.data import ImageDataModule, MNISTDataModule
from mnist_lightning.data.pictures import find, read
from mnist_lightning.datasets import CIFAR10, EMNIST, KMNIST, QMNIST, USPS, FashionMNIST, ImageFolder
from mnist_lightning.system.errors import UserError

FASHION = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
RANDOM = np.random.default_rng(0)


def pixels(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def write_pair(folder, prefix, images, labels):
    folder.mkdir(parents=True, exist_ok=True)
    write_idx(folder / prefix.format("images-idx3-ubyte"), images)
    write_idx(folder / prefix.format("labels-idx1-ubyte"), labels)


def both(datamodule):
    datamodule.setup("fit")
    datamodule.setup("test")
    return datamodule


@needs_fashion
def test_fashion_mnist_is_found_and_named():
    data = both(FashionMNIST())
    assert (len(data.train), len(data.val), len(data.test)) == (48_000, 12_000, 10_000)
    # https://github.com/zalandoresearch/fashion-mnist shows boots first in training and test images
    assert [data.classes[split.labels[0]] for split in (data.train, data.test)] == ["boot", "boot"]
    assert data.train.labels.bincount().max() < 5_000
    other = both(FashionMNIST(str(FASHION)))
    assert torch.equal(other.test.images, data.test.images)


def test_mnist_is_not_taken_for_another_data_set(mnist, monkeypatch, tmp_path):
    monkeypatch.setattr(FashionMNIST, "others", ())
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError, match=r"cannot be downloaded .*Put train-images-idx3-ubyte, .*t10k-"):
        FashionMNIST().setup("test")
    write_pair(tmp_path, "t10k-{}", mnist.test.images[:, 0].numpy(), mnist.test.labels.numpy())
    write_pair(tmp_path, "train-{}", pixels(20, 28, 28), np.arange(20) % 10)
    with pytest.raises(UserError, match="are MNIST's, not FashionMNIST's"):
        FashionMNIST(str(tmp_path)).setup("test")


def test_files_are_taken_as_torchvision_leaves_them(tmp_path):
    write_pair(tmp_path / "KMNIST/raw", "train-{}", pixels(50, 28, 28), np.arange(50) % 10)
    write_pair(tmp_path / "KMNIST/raw", "t10k-{}", pixels(20, 28, 28), np.arange(20) % 10)
    data, other = both(KMNIST(str(tmp_path))), torchvision.datasets.KMNIST(tmp_path, train=False)
    assert torch.equal(data.test.images[:, 0], other.data)
    assert torch.equal(data.test.labels, other.targets)
    assert data.classes == other.classes


@pytest.mark.parametrize("split", ["letters", "balanced", "byclass", "bymerge", "digits", "mnist"])
def test_emnist_stands_upright_and_its_letters_count_from_a(tmp_path, split):
    known = [name for name in torchvision.datasets.EMNIST.classes_split_dict[split] if name != "N/A"]
    labels, images = np.arange(2 * len(known)) % len(known) + (split == "letters"), pixels(2 * len(known), 28, 28)
    for part in ("train", "test"):
        write_pair(tmp_path / "EMNIST/raw", f"emnist-{split}-{part}-{{}}", images, labels)
    data = both(EMNIST(split, data_dir=str(tmp_path), val_split=0.5))
    assert data.classes == known
    assert data.test.labels.tolist() == [*range(len(known))] * 2
    assert np.array_equal(data.test.images[0, 0].numpy(), images[0].T)


def test_qmnist_usps_and_cifar10_are_what_torchvision_reads(tmp_path, monkeypatch):
    raw = tmp_path / "QMNIST/raw"
    for part in ("train", "test"):
        raw.mkdir(parents=True, exist_ok=True)
        write_idx(raw / f"qmnist-{part}-images-idx3-ubyte", pixels(30, 28, 28))
        labels = np.zeros((30, 8), ">i4")
        labels[:, 0] = np.arange(30) % 10
        (raw / f"qmnist-{part}-labels-idx2-int").write_bytes(struct.pack(">3I", 0xC02, 30, 8) + labels.tobytes())
    data = both(QMNIST(str(tmp_path)))
    assert data.test.labels.tolist() == [*range(10)] * 3

    for name in ("usps.bz2", "usps.t.bz2"):
        lines = [f"{n % 10 + 1} " + " ".join(f"{i + 1}:{(-1) ** n}" for i in range(256)) for n in range(30)]
        (tmp_path / name).write_bytes(bz2.compress("\n".join(lines).encode()))
    data = both(USPS(str(tmp_path)))
    assert data.test.images.shape[1:] == data.image_shape == (1, 16, 16)
    assert data.test.images.float().mean(dim=(1, 2, 3)).tolist() == [255, 0] * 15
    assert data.test.labels.tolist() == [*range(10)] * 3

    folder, photos = tmp_path / "cifar-10-batches-py", pixels(30, 32, 32, 3)
    folder.mkdir()
    batch = {"data": photos.transpose(0, 3, 1, 2).reshape(30, -1), "labels": [*range(10)] * 3}
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR10.class_names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # the content is not CIFAR's
    data = both(CIFAR10(str(tmp_path)))
    assert np.array_equal(data.test.images.numpy().transpose(0, 2, 3, 1), photos)
    assert (len(data.train), len(data.val)) == (120, 30)


# --- any folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path):
    """A folder of IDX files: images of 12x20 that show their class, with gaps in the labels."""
    folder = tmp_path / "odd"
    for prefix, count in (("train-{}", 300), ("t10k-{}", 60)):
        labels = RANDOM.permutation(np.array([2, 7, 30, 31])[np.arange(count) % 4])
        images = pixels(count, 12, 20) // 4
        for image, label in zip(images, labels, strict=True):
            image[:, [2, 7, 30, 31].index(label) * 5] = 255
        write_pair(folder, prefix, images, labels)
    return folder


@pytest.mark.slow
def test_a_folder_of_any_shape_and_labels_goes_through_all_commands(odd, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = [f"--data.data_dir={odd}", "--data.batch_size=16", "--model.network.l2=0"]
    code, out, err = in_process(capfd, "fit", *options, "--trainer.max_epochs=6")
    assert code == 0, err
    assert "the labels are 2, 7, 30, 31; in the network, these are the classes 0 to 3" in out + err
    assert re.search(r"train +images \(240, 1, 12, 20\)", out)
    run = tmp_path / "lightning_logs/baseline/version_0"
    network = yaml.safe_load((run / "config.yaml").read_text())["model"]["network"]["init_args"]
    assert (network["in_features"], network["num_classes"]) == (240, 4)
    accuracy = pd.read_csv(run / "test.csv")["test/accuracy"][0]
    assert accuracy > 0.95
    code, _, err = in_process(capfd, "predict")
    assert code == 0, err
    table = pd.read_csv("predictions.csv")
    assert {*table.label} == {2, 7, 30, 31}
    assert (table.label == table.predicted).mean() == pytest.approx(accuracy)
    assert [*table.columns[-4:]] == [f"probability_{label}" for label in (2, 7, 30, 31)]

    # only test images, of some of the classes
    some = tmp_path / "some"
    labels, images = table.label.to_numpy(), both(MNISTDataModule(str(odd))).test.images[:, 0].numpy()
    write_pair(some, "t10k-{}", images[labels > 7], labels[labels > 7])
    code, out, err = in_process(capfd, "test", f"--data.data_dir={some}")
    assert code == 0, err
    expected = (table.label == table.predicted)[table.label > 7].mean()
    assert float(re.search(r"test/accuracy +([\d.]+)", out)[1]) == pytest.approx(expected, abs=1e-4)
    write_pair(some, "t10k-{}", images, labels + 1)
    code, _, err = in_process(capfd, "test", f"--data.data_dir={some}")
    assert code == 1
    assert "has the class 3, but the checkpoint's network is for 2, 7, 30, 31" in err
    code, _, err = in_process(capfd, "test", "--data.data_dir=null")
    assert (code, "has the class 0, but the checkpoint" in err) == (1, True)

    code, out, err = in_process(capfd, "report", "baseline")
    assert code == 0, err
    page = (tmp_path / "lightning_logs/report/report.html").read_text()
    assert ">30</th>" in page
    assert json.loads((tmp_path / "lightning_logs/report/report.json").read_text())["images"] == 60


def test_images_of_training_and_test_have_one_size(odd):
    write_pair(odd, "t10k-{}", pixels(8, 12, 12), np.array([2, 7, 30, 31] * 2))
    with pytest.raises(UserError, match="test images are 1x12x12, but training images are 1x12x20"):
        both(MNISTDataModule(str(odd)))


def test_images_sorted_by_class_are_split_by_class_or_shuffled(tmp_path):
    labels = np.arange(300) // 30
    images = pixels(300, 8, 8)
    write_pair(tmp_path, "train-{}", images, labels)
    data = MNISTDataModule(str(tmp_path))
    data.setup("fit")
    assert data.is_split_by_class
    assert "0.2 of each class's training images for validation" in data.describe()
    is_held_out = np.arange(300) % 30 >= 24
    assert np.array_equal(data.val.images[:, 0], images[is_held_out])
    assert np.array_equal(data.train.images[:, 0], images[~is_held_out])
    assert np.array_equal(data.train.labels, labels[~is_held_out])
    splits = []
    for _ in range(2):
        data = MNISTDataModule(str(tmp_path), split_seed=0)
        data.setup("fit")
        assert data.val.labels.unique().tolist() == [*range(10)]
        splits.append(data.val.images)
    assert torch.equal(*splits)


def test_standardised_images_have_mean_0_and_deviation_1_over_the_training_images(data_dir):
    data = both(MNISTDataModule(str(data_dir), standardize=True))
    images = data.train.__getitems__(range(1000))[0]
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    raw = data.train.images.double() / 255
    for split in (data.val, data.test):
        expected = (split.images.double() / 255 - raw.mean()) / raw.std(correction=0)
        assert torch.allclose(split.__getitems__(range(len(split)))[0].double(), expected, atol=1e-5)
    alone = MNISTDataModule(str(data_dir), standardize=True)
    alone.setup("test")
    assert torch.equal(alone.test.__getitems__([0])[0], data.test.__getitems__([0])[0])


# --- image files --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_of_photos_is_trained_predicted_and_reported(drawn, monkeypatch, capfd, tmp_path):
    write_files(tmp_path / "photos/train", 40)
    write_files(tmp_path / "photos/test", 6)
    monkeypatch.chdir(tmp_path)
    code, out, err = in_process(
        capfd, "fit", "--data=ImageFolder", "--data.data_dir=photos", "--trainer.max_epochs=4", "--data.batch_size=8",
        "--model.network.l2=0",
    )  # fmt: skip
    assert code == 0, err
    assert re.search(r"train +images \(96, 3, 8, 10\)", out)
    assert pd.read_csv(tmp_path / "lightning_logs/baseline/version_0/test.csv")["test/accuracy"][0] == 1
    code, _, err = in_process(capfd, "predict")
    assert code == 0, err
    assert (pd.read_csv("predictions.csv").predicted == ["blue"] * 6 + ["green"] * 6 + ["red"] * 6).all()
    samples = np.asarray(Image.open(tmp_path / "lightning_logs/baseline/version_0/figures/samples.png"))
    for color in COLORS.values():  # in their colors
        assert (np.abs(samples.astype(int) - color).max(axis=-1) < 10).mean() > 0.05
    code, out, err = in_process(capfd, "report", "baseline")
    assert code == 0, err
    assert ">green</th>" in (tmp_path / "lightning_logs/report/report.html").read_text()


def test_a_folder_of_classes_alone_is_shuffled_and_shared_out(tmp_path):
    data = both(ImageFolder(str(write_files(tmp_path, 50)), test_split=0.2, val_split=0.25))
    splits = (data.train, data.val, data.test)
    assert [len(split) for split in splits] == [90, 30, 30]
    for split in splits:
        assert split.labels.unique().tolist() == [0, 1, 2]
        assert torch.equal(split.images.flatten(2).float().mean(dim=2).argmax(dim=1), 2 - split.labels)
    numbers = torch.cat([split.images[:, 0, 0, 0] + 100 * split.labels for split in splits])
    assert len(numbers.unique()) == 150  # each image occurs once
    assert torch.equal(both(ImageFolder(str(tmp_path))).test.labels, both(ImageFolder(str(tmp_path))).test.labels)


def test_small_classes_keep_images_in_each_split(tmp_path):
    """Check so many classes that a plain random split would hold out some of them completely."""
    for name in range(300):
        (tmp_path / f"{name:03}").mkdir()
        for shade in range(5):
            Image.new("L", (3, 3), shade + 1).save(tmp_path / f"{name:03}/{shade}.png")
    data = both(ImageFolder(str(tmp_path), test_split=0.4))
    assert data.is_split_by_class
    assert "each class" in data.describe()
    assert [split.labels.bincount().unique().tolist() for split in (data.train, data.val, data.test)] == [[2], [1], [2]]
    numbers = torch.cat([split.images[:, 0, 0, 0] + 100 * split.labels for split in (data.train, data.val, data.test)])
    assert len(numbers.unique()) == 1500
    (tmp_path / "000").rename(tmp_path / "alone")
    for shade in range(1, 5):
        (tmp_path / f"alone/{shade}.png").unlink()
    data = both(ImageFolder(str(tmp_path), test_split=0.4))
    assert [(split.labels == 299).sum() for split in (data.train, data.val, data.test)] == [1, 0, 0]


def test_images_that_do_not_fit_into_memory_are_refused_in_a_line(tmp_path, monkeypatch):
    write_files(tmp_path, 10)
    with pytest.raises(UserError, match=r"^ImageFolder .* GiB are free \(it takes .* GiB\)\. Use.*$"):
        ImageFolder(str(tmp_path), size=(10**6, 10**6)).setup("fit")

    class Large(ImageDataModule):
        def load(self, split):
            return np.zeros((10**9, 10**6), np.uint8), None

    with pytest.raises(UserError, match=r"^Large does not fit .* \(unable to allocate .*\)\. Use.*$"):
        Large().setup("fit")
    monkeypatch.setattr(Large, "load", lambda *_: torch.zeros(10**15))
    with pytest.raises(UserError, match=r"^Large does not fit .* \(tried to allocate .*\)\. Use.*$"):
        Large().setup("fit")
    monkeypatch.setattr(Large, "load", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        Large().setup("fit")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_shows_how_many_files_are_read(tmp_path, monkeypatch, is_terminal):
    write_files(tmp_path, 10)
    errors = io.StringIO()
    monkeypatch.setattr(errors, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", errors)
    ImageFolder(str(tmp_path)).setup("fit")
    assert not errors.getvalue()  # too fast for a progress message
    monkeypatch.setattr(datasets, "BAR_AFTER", 0.01)
    original = ImageFolder._open
    monkeypatch.setattr(ImageFolder, "_open", lambda *arguments: (time.sleep(0.02), original(*arguments))[1])
    ImageFolder(str(tmp_path)).setup("fit")
    assert ("Reading train images: " in errors.getvalue()) == is_terminal


def test_a_folder_s_pictures_are_those_that_predict_takes(tmp_path, capsys):
    write_files(tmp_path, 10)
    image = Image.new("RGB", (10, 8), "red")
    for name in ("10.gif", "11.jfif", "12.webp", ".13.png", "more/14.bmp"):
        path = tmp_path / "red" / name
        path.parent.mkdir(exist_ok=True)
        image.save(path, "JPEG" if path.suffix == ".jfif" else None)
    (tmp_path / "red/._001.png").write_bytes(b"AppleDouble")
    (tmp_path / "red/notes.txt").touch()
    (tmp_path / "red/table.pdf").touch()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    if os.name != "nt":
        (tmp_path / "red/more/again").symlink_to(tmp_path / "red")  # the link makes a loop
    data = both(ImageFolder(str(tmp_path)))
    classes = len(data.classes)
    assert ".ipynb_checkpoints" not in data.classes
    assert len(data.train) + len(data.val) + len(data.test) == 10 * classes + 4
    found = [path for path, _ in find([str(tmp_path)])]
    assert len(found) == 10 * classes + 4
    said = capsys.readouterr().out
    assert said.count("files left out, as Pillow does not read these endings: 1 .pdf, 1 .txt") == 1


@pytest.mark.parametrize("ink", ["black", "white"])
def test_a_drawing_on_nothing_is_seen(tmp_path, ink):
    """Check a drawing as a canvas saves it: all colors below the transparency are the same."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(10):
            alpha = Image.new("L", (12, 12), 0)
            alpha.paste(255, (2 + number % 3, 2, 5 + number % 3, 10) if name == "one" else (2, 4, 10, 8))
            drawing = Image.new("RGB", (12, 12), ink)
            drawing.putalpha(alpha)
            drawing.save(tmp_path / name / f"{number}.png")
    data = both(ImageFolder(str(tmp_path)))
    for split in (data.train, data.val, data.test):
        assert (split.images.amin(dim=(1, 2, 3)) == 0).all()
        assert (split.images.amax(dim=(1, 2, 3)) == 255).all()
    path = tmp_path / "one/0.png"
    seen = data.from_picture(read(path)[0])[0]
    assert seen[0, 5, 3] == (0 if ink == "black" else 255)
    assert any(np.array_equal(seen, image) for image in data.load("train")[0])


def test_images_that_are_all_alike_are_said_to_be(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.new("L", (6, 6), 7).save(tmp_path / name / f"{number}.png")
    both(ImageFolder(str(tmp_path)))
    assert "all 8 train images are the same, so nothing can be learned" in capsys.readouterr().out


def test_a_folder_of_validation_images_is_used(tmp_path):
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        write_files(tmp_path / split, count, "L")
    data = both(ImageFolder(str(tmp_path)))
    assert [len(split) for split in (data.train, data.val, data.test)] == [15, 9, 6]
    assert data.image_shape == (1, 8, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "red/3.png").write_bytes(b"no image"), r"red/3\.png cannot be read"),
        (
            lambda folder: Image.new("L", (5, 5)).save(folder / "red/3.png"),
            r"5x5 pixels, but the first image has 8x10: .*size",
        ),
        (lambda folder: Image.new("RGB", (10, 8)).save(folder / "red/3.png"), "in color, but the first image is gray"),
        (lambda folder: Image.new("I;16", (10, 8)).save(folder / "red/3.png"), "more than 8 bits"),
        (lambda folder: (folder / "empty").mkdir(), "empty has no pictures"),
        (lambda folder: (folder / "train").mkdir(), "must have a folder of images for each class"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named(tmp_path, change, message):
    write_files(tmp_path, 5, "L")
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        both(ImageFolder(str(tmp_path)))


def test_images_are_scaled_and_made_grey_where_that_is_wanted(tmp_path):
    write_files(tmp_path, 5)
    Image.new("L", (5, 5)).save(tmp_path / "red/3.png")
    data = both(ImageFolder(str(tmp_path), size=(6, 7), channels=1))
    assert data.train.images.shape[1:] == (1, 6, 7)


# --- the user's own classes ----------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn
from mnist_lightning.data import ImageDataModule

class Stripes(ImageDataModule):
    def load(self, split):
        if split == "val":
            return None
        generator = torch.Generator().manual_seed(len(split))
        labels = torch.arange(240) % 3
        images = torch.rand(240, 2, 9, 9, generator=generator) / 2
        images[torch.arange(240), :, labels * 4] = 1
        return images, labels + 5

class Net(nn.Module):
    def __init__(self, in_channels: int, num_classes: int, width: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.Flatten(), nn.LazyLinear(num_classes))
    def forward(self, images):
        return self.layers(images)
"""


@pytest.mark.slow
def test_data_and_network_of_one_s_own_fit_together(monkeypatch, capfd, tmp_path):
    (tmp_path / "own_stripes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = ["--data=own_stripes.Stripes", "--model.network=own_stripes.Net", "--model.network.width=6"]
    code, out, err = in_process(capfd, "fit", *options, "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)["model"]["network"]["init_args"] == {"in_channels": 2, "num_classes": 3, "width": 6}
    code, out, err = in_process(capfd, "fit", *options, "--trainer.max_epochs=5")
    assert code == 0, err
    assert pd.read_csv(tmp_path / "lightning_logs/baseline/version_0/test.csv")["test/accuracy"][0] > 0.9
    code, out, err = in_process(capfd, "predict")
    assert code == 0, err
    assert {*pd.read_csv("predictions.csv").label} == {5, 6, 7}
    code, _, err = in_process(capfd, "report", "baseline")
    assert code == 0, err
    code, _, err = in_process(capfd, "fit", *options, "--model.network.num_classes=2", "--trainer.max_epochs=5")
    assert code == 1
    assert "For 3 classes, Net must return logits of shape (batch, 3), but it returns a tensor of shape (1, 2)" in err
    code, _, err = in_process(capfd, "fit", "--data=own_stripes.Stripes", "--model.network.in_features=7")
    assert code == 1
    assert "MLP does not take images of shape (2, 9, 9)" in err


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        ((torch.rand(9, 4, 4) * 255, torch.arange(9)), "floats from 0 to 1"),
        ((torch.zeros(9, 4, 4, dtype=torch.int32), torch.arange(9)), "uint8 or floats"),
        ((torch.rand(9, 4, 4), torch.arange(8)), "9 images but 8 labels"),
        ((torch.rand(9, 4, 4), torch.rand(9)), "each image needs one whole number"),
        ((torch.rand(1, 4, 4), torch.arange(1)), "too few training images"),
    ],
)
def test_what_load_returns_is_checked(loaded, message):
    class Own(ImageDataModule):
        def load(self, split):
            return None if split == "val" else loaded

    with pytest.raises(UserError, match=message):
        Own().setup("fit")


def test_a_checkpoint_from_python_knows_its_data(odd):
    data = MNISTDataModule(str(odd), augmentation=[torch.nn.Identity()])
    assert data.hparams["_class_path"] == "mnist_lightning.data.MNISTDataModule"
    assert "augmentation" not in data.hparams
    assert data.state_dict() == {"classes": ["2", "7", "30", "31"]}
    assert [*EMNIST("digits").classes] == [*string.digits]


@pytest.mark.slow
def test_a_folder_of_photos_is_searched(monkeypatch, capfd, tmp_path):
    write_files(tmp_path / "photos", 20)
    monkeypatch.chdir(tmp_path)
    degrees = "data.augmentation.0.init_args.degrees"  # as on the command line, or with init_args, as in a config
    space = {
        degrees: {"class_path": "IntDistribution", "init_args": {"low": 5, "high": 30}},
        "data.init_args.batch_size": {"class_path": "CategoricalDistribution", "init_args": {"choices": [8, 16]}},
    }
    code, _, err = in_process(
        capfd, "tune", f"--search_space={json.dumps(space)}", "--data=ImageFolder", "--data.data_dir=photos",
        "--data.augmentation+=Distortion", "--n_trials=2", "--workers=1", "--executions_per_trial=1",
        "--trainer.max_epochs=1", "--refit_epochs=1",
    )  # fmt: skip
    assert code == 0, err
    for number, trial in enumerate(load(tmp_path).trials):
        run = tmp_path / f"lightning_logs/tune/trial_{number:03}/execution_0"
        data = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]
        assert data["augmentation"][0]["init_args"]["degrees"] == trial.params[degrees]
        assert data["batch_size"] == trial.params["data.init_args.batch_size"]
    best = yaml.safe_load((tmp_path / "lightning_logs/tune/best.yaml").read_text())
    assert best["model"]["network"]["init_args"]["in_features"] == 240
