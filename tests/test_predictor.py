"""A checkpoint in a program of one's own, against what the command predicts."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.commands import ROOT, ROUNDING
from PIL import Image, ImageOps

from mnist_lightning.predictor import Predictor
from mnist_lightning.system.errors import UserError

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def predictor(fitted):
    return Predictor(fitted[0] / "checkpoints/last.ckpt")


def test_arrays_of_any_shape_give_what_predict_writes(predictor, fitted, quick, mnist, tmp_path):
    shutil.copytree(fitted[0].parents[1], tmp_path / "lightning_logs")
    quick(tmp_path, "predict")
    images = predictor.data.load("test")[0]
    expected = pd.read_csv(tmp_path / "predictions.csv").filter(like="probability_").to_numpy()
    found = predictor(images)
    assert [*found.columns] == [str(digit) for digit in range(10)]
    assert np.abs(found.to_numpy() - expected).max() < ROUNDING
    for given in (images[:3, None], torch.tensor(images[:3]) / 255, np.float64(images[:3]) / 255):
        pd.testing.assert_frame_equal(predictor(given), found[:3], atol=ROUNDING)
    for given in (images[0], images[:1], images[:1, None]):
        pd.testing.assert_frame_equal(predictor(given), found[:1], atol=ROUNDING)


@pytest.mark.slow
def test_pictures_are_brought_into_the_form_of_the_data_set(predictor, mnist, tmp_path):
    images = mnist.test.images[:20, 0].numpy()
    expected = predictor(images).idxmax(axis=1)
    same = 0
    for number, image in enumerate(images):
        picture = ImageOps.invert(Image.fromarray(image).resize((280, 280), Image.Resampling.NEAREST)).convert("P")
        picture.save(tmp_path / "digit.png")
        from_file = predictor(tmp_path / "digit.png")
        if number == 0:
            pd.testing.assert_frame_equal(predictor(picture), from_file)
            pd.testing.assert_frame_equal(predictor(str(tmp_path / "digit.png")), from_file)
        same += from_file.idxmax(axis=1)[0] == expected[number]
    assert same >= 19


def test_several_characters_in_a_picture_are_said(predictor, mnist):
    pair = Image.new("L", (300, 150))
    for number in range(2):
        pair.paste(Image.fromarray(mnist.test.images[number, 0].numpy()).resize((112, 112)), (20 + 150 * number, 20))
    with pytest.warns(UserWarning, match="seems to hold 2 characters"):
        predictor(pair)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", ["--data.standardize=true", "--trainer.precision=bf16-mixed", "--trainer.precision=64-true"]
)
def test_data_are_prepared_and_computed_with_as_in_the_run(quick, tmp_path, option):
    quick(tmp_path, "fit", "--trainer.max_epochs=1", option)
    quick(tmp_path, "predict")
    predictor = Predictor(tmp_path / "lightning_logs/baseline/version_0/checkpoints/last.ckpt")
    expected = pd.read_csv(tmp_path / "predictions.csv").filter(like="probability_").to_numpy()
    assert np.abs(predictor(predictor.data.load("test")[0]).to_numpy() - expected).max() < ROUNDING


@pytest.mark.parametrize(
    "images",
    [np.zeros((27, 28), np.uint8), np.full((28, 28), 255.0), np.zeros((28, 28), int), np.zeros((2, 2, 1, 28, 28))],
)
def test_other_arrays_are_refused(predictor, images):
    with pytest.raises(ValueError, match="they must be"):
        predictor(images)


def test_what_is_not_a_checkpoint_is_said(tmp_path):
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        Predictor(ROOT / "README.md")
    with pytest.raises(FileNotFoundError):
        Predictor(tmp_path / "none.ckpt")
