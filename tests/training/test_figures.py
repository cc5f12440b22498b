"""The pictures show the numbers they are given."""

import math
import time

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.path import Path

from mnist_lightning.training import figures
from mnist_lightning.training.callbacks import Figures
from mnist_lightning.training.checkpoints import RunCheckpoint


def test_a_grid_shows_digits_under_their_labels(mnist):
    images, labels = figures.pictures(mnist.train.scaled(range(25))), mnist.train.labels[:25].numpy()
    (axes,) = figures.image_grid(images, [*map(str, labels)], columns=5, title="training images").axes
    assert [int(text.get_text()) for text in axes.texts] == labels.tolist()
    mosaic = axes.images[0].get_array()
    assert mosaic.sum() == pytest.approx(images.sum())
    for index, text in ((0, axes.texts[0]), (7, axes.texts[7]), (24, axes.texts[24])):
        x, y = (int(value) for value in text.get_position())  # a digit is centered right below its title
        assert np.array_equal(mosaic[y + 2 : y + 30, x - 14 : x + 14], images[index])


def test_a_last_row_of_images_need_not_be_full():
    images = np.ones((3, 8, 6))  # any size works
    (axes,) = figures.image_grid(images, ["a", "b", "c"], columns=2).axes
    height, width = axes.images[0].get_array().shape
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c"]
    corner = axes.images[0].get_array()[height // 2 :, width // 2 :]
    assert axes.images[0].get_array().sum() == images.sum()
    assert corner.sum() == 0


def test_predictions_are_green_where_right_and_red_where_wrong(mnist):
    labels = mnist.test.labels[:12].numpy()
    predicted = labels.copy()
    predicted[[2, 5]] = (labels[[2, 5]] + 1) % 10
    (axes,) = figures.predictions(
        figures.pictures(mnist.test.scaled(range(12))), [*map(str, labels)], [*map(str, predicted)]
    ).axes
    titles = [text.get_text() for text in axes.texts]
    assert titles == [f"predicted {p}\ntrue {t}" for p, t in zip(predicted[:10], labels[:10], strict=True)]
    colors = [to_rgb(text.get_color()) for text in axes.texts]
    assert [color[0] > color[1] for color in colors] == [index in (2, 5) for index in range(10)]  # red over green


COUNTS = np.array([[50, 0, 1], [3, 1234, 0], [0, 0, 0]])


def test_confusion_matrix_writes_every_count():
    (axes,) = figures.confusion_matrix(COUNTS, "title", ["a", "b", "c"]).axes
    written = {text.get_position(): text.get_text() for text in axes.texts if text.get_text()}
    assert written == {(0.5, 0.5): "50", (2.5, 0.5): "1", (0.5, 1.5): "3", (1.5, 1.5): "1234"}
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("predicted", "true", "title")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c"]


def test_a_confusion_matrix_of_many_classes_is_drawn_in_seconds():
    """Check 100 classes, for which seaborn alone takes a minute, and whose picture would have 50 million pixels."""
    counts = 400 * np.eye(100, dtype=int)
    started = time.process_time()
    pixels = figures.render(figures.confusion_matrix(counts, "title", [f"class {index}" for index in range(100)]))
    assert time.process_time() - started < 20
    assert max(pixels.shape) <= 3000


def test_a_quick_confusion_matrix_writes_every_count():
    (axes,) = figures.confusion_matrix(COUNTS, "title", ["a", "b", "c"], is_quick=True).axes
    written = {}  # by cell (column, row): the outlines of the glyphs
    for patch in axes.patches:
        path = patch.get_path()
        for outline in np.split(path.vertices, np.flatnonzero(path.codes == Path.MOVETO)[1:]):
            written.setdefault(tuple(outline.mean(axis=0).astype(int).tolist()), []).append(outline)
    outlines = {"0": 2, "4": 2}  # a hole has its own outline
    expected = {(0, 0): "50", (2, 0): "1", (0, 1): "3", (1, 1): "1234"}
    assert {cell: len(glyphs) for cell, glyphs in written.items()} == {
        cell: sum(outlines.get(digit, 1) for digit in number) for cell, number in expected.items()
    }
    for (column, row), glyphs in written.items():
        corners = np.concatenate(glyphs)
        assert (abs(corners - [column + 0.5, row + 0.5]) < 0.5).all()


def test_confusion_matrix_of_an_epoch_has_a_row_for_each_logit():
    callback = Figures(RunCheckpoint())
    batch = (torch.zeros(3, 1, 28, 28), torch.tensor([3, 3, 0]))
    logits = torch.nn.functional.one_hot(torch.tensor([11, 11, 0]), 12).float()
    expected = torch.zeros(12, 12, dtype=torch.long)
    expected[3, 11], expected[0, 0] = 2, 1
    for _ in range(2):  # each epoch starts from zero
        callback.on_validation_epoch_start(None, None)
        callback.on_validation_batch_end(None, None, logits, batch, 0)
        assert torch.equal(callback._confusion, expected)


HISTORY = [
    {"epoch": 0, "train/loss": 2.0, "train/accuracy": 0.5},
    {"epoch": 1, "train/loss": 1.0, "train/accuracy": 0.7, "val/loss": 0.5},
]


def drawn(axes):
    """Return the points of the lines of an axes, without the empty ones of the legend."""
    return [line.get_xydata().tolist() for line in axes.lines if len(line.get_xydata())]


def test_curves_draw_training_and_validation_over_the_epochs():
    (axes,) = figures.curves(figures.tidy({"baseline": [HISTORY]}), ["loss"], {"baseline": "red"}).axes
    assert sorted(drawn(axes)) == [[[1, 2.0], [2, 1.0]], [[2, 0.5]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["validation", "training"]
    assert all(to_rgb(line.get_color()) == (1, 0, 0) for line in axes.lines if len(line.get_xydata()))
    figures.render(axes.figure)
    assert {text.get_text() for text in axes.get_xticklabels()} <= {"0", "1", "2", "3"}  # no half epochs


def test_curves_of_several_runs_have_a_band_from_the_lowest_to_the_highest():
    histories = {"a": [[{"epoch": 0, "val/f1": value}, {"epoch": 1, "val/f1": 1.0}] for value in (0.2, 0.5, 0.6)]}
    histories["b"] = [[{"epoch": 0, "val/loss": math.nan}, {"epoch": 1, "val/loss": 0.3}]]
    f1, loss = figures.curves(figures.tidy(histories), ["f1", "loss"], {"a": "red", "b": "blue"}).axes
    (band,) = (band for band in f1.collections if len(band.get_paths()))
    low, high = (band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max())
    assert (low, high) == pytest.approx((0.2, 1.0))
    assert drawn(f1) == [[[1, pytest.approx(1.3 / 3)], [2, 1.0]]]
    assert drawn(loss) == [[[2, 0.3]]]  # a value that is not finite is a gap
    assert [text.get_text() for text in f1.get_legend().get_texts()] == [
        "model", "a", "b", "stage", "validation", "training",
    ]  # fmt: skip
    assert loss.get_legend() is None


def test_curves_without_an_epoch_are_empty():
    (axes,) = figures.curves(figures.tidy({"a": [[]]}), ["loss"], {"a": "red"}).axes
    assert not drawn(axes)


def test_drawing_leaves_matplotlib_as_it_is():
    before = dict(matplotlib.rcParams)
    pixels = figures.render(figures.curves(figures.tidy({"a": [HISTORY]}), ["loss"], {"a": "red"}, "100 $ a $"))
    assert pixels.shape == (720, 975, 3)
    assert pixels.min() < 50 < 250 < pixels.max()
    assert dict(matplotlib.rcParams) == before
