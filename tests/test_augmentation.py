"""Augmentation: each image is changed by draws of its own, within the range that was asked for."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms import v2

from mnist_lightning.augmentation import Distortion, Erasing, HorizontalFlip

pytestmark = pytest.mark.numeric

STILL = {"degrees": 0.0, "scale": 0.0, "shear": 0.0, "translate": 0.0, "alpha": 0.0}


@pytest.fixture
def batch(mnist):
    torch.manual_seed(0)
    return mnist.train.__getitems__(range(64))


def moments(images):
    """Return mass, center (x, y) and covariance of each image's ink, in pixels from the middle."""
    _, _, height, width = images.shape
    weights = images[:, 0] / images[:, 0].sum(dim=(1, 2), keepdim=True)
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    points = torch.stack([x, y], dim=-1).flatten(0, 1)
    centres = weights.flatten(1) @ points
    covariances = torch.einsum("np,pi,pj->nij", weights.flatten(1), points, points)
    return images.sum(dim=(1, 2, 3)), centres, covariances - centres[:, :, None] * centres[:, None, :]


def bar(height=28, width=28):
    """Return images with a horizontal bar in the middle."""
    images = torch.zeros(200, 1, height, width)
    images[:, :, height // 2 - 1 : height // 2 + 1, width // 2 - 7 : width // 2 + 7] = 1
    return images


def test_no_distortion_leaves_the_images(batch):
    images, labels = batch
    distorted, unchanged = Distortion(**STILL)(images, labels)
    torch.testing.assert_close(distorted, images, rtol=0, atol=1e-5)
    assert unchanged is labels


def test_a_shift_moves_each_image_by_up_to_a_share_of_its_sides():
    images = bar(40, 20)
    mass, centres, _ = moments(Distortion(**{**STILL, "translate": 0.1})(images, None)[0])
    torch.testing.assert_close(mass, images.sum(dim=(1, 2, 3)), rtol=1e-5, atol=0)
    for axis, largest in ((0, 2), (1, 4)):
        assert centres[:, axis].abs().max().item() == pytest.approx(largest, rel=0.05)
        assert centres[:, axis].std().item() == pytest.approx(largest / math.sqrt(3), rel=0.1)  # uniform


@pytest.mark.parametrize("shape", [(28, 28), (60, 30)])
def test_a_rotation_turns_the_shape_without_bending_it(shape):
    _, centres, covariances = moments(Distortion(**{**STILL, "degrees": 30.0})(bar(*shape), None)[0])
    angles = 0.5 * torch.atan2(2 * covariances[:, 0, 1], covariances[:, 0, 0] - covariances[:, 1, 1]).rad2deg()
    assert angles.max().item() == pytest.approx(30, abs=1.5)
    assert angles.min().item() == pytest.approx(-30, abs=1.5)
    lengths = torch.linalg.eigvalsh(covariances)[:, 1]
    assert (lengths.max() / lengths.min()).item() == pytest.approx(1, abs=0.05)
    assert centres.abs().max() < 0.05


def test_a_scale_changes_width_and_height_by_draws_of_their_own():
    _, _, before = moments(bar())
    _, _, after = moments(Distortion(**{**STILL, "scale": 0.3})(bar(), None)[0])
    widths = (after[:, 0, 0] / before[:, 0, 0]).sqrt()
    assert widths.min().item() == pytest.approx(0.7, abs=0.05)
    assert widths.max().item() == pytest.approx(1.3, abs=0.05)
    assert abs(torch.corrcoef(torch.stack([widths, after[:, 1, 1]]))[0, 1]) < 0.2


def test_a_shear_slants_what_stands():
    standing = bar().transpose(2, 3)
    _, _, covariances = moments(Distortion(**{**STILL, "shear": 20.0})(standing, None)[0])
    slants = (covariances[:, 0, 1] / covariances[:, 1, 1]).atan().rad2deg()
    assert slants.abs().max().item() == pytest.approx(20, abs=1)
    heights = covariances[:, 1, 1]
    assert (heights.max() / heights.min()).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("shape", [(28, 28), (20, 32)])
def test_the_elastic_deformation_is_simard_s(batch, shape):
    """Compare with the same draws, smoothed and interpolated by SciPy."""
    images = batch[0][:5, :, : shape[0]]
    images = torch.nn.functional.pad(images, (0, shape[1] - 28))
    distortion = Distortion(**{**STILL, "alpha": 34.0, "sigma": 3.0})
    torch.manual_seed(1)
    distorted, _ = distortion(images, None)
    torch.manual_seed(1)
    torch.rand(6, 5)
    shifts = (torch.rand(5, 2, *shape) * 2 - 1).double().numpy()
    y, x = np.mgrid[: shape[0], : shape[1]]
    for image, (dx, dy), result in zip(images, shifts, distorted, strict=True):
        dx, dy = (34 * ndimage.gaussian_filter(each, 3, mode="constant", truncate=9) for each in (dx, dy))
        expected = ndimage.map_coordinates(image[0].double().numpy(), [y + dy, x + dx], order=1, mode="grid-constant")
        np.testing.assert_allclose(result[0], expected, atol=1e-4)
    assert (distorted - images).abs().max() > 0.5


def test_channels_are_distorted_alike(batch):
    images = batch[0].expand(-1, 3, -1, -1)
    distorted, _ = Distortion()(images, None)
    assert torch.equal(distorted[:, 0], distorted[:, 2])
    assert not torch.allclose(distorted, images, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_keep_their_precision(batch, dtype):
    assert Distortion()(batch[0].to(dtype), None)[0].dtype == dtype


def test_a_rectangle_is_erased_in_the_share_of_images_that_was_asked_for():
    images = torch.ones(2000, 2, 30, 20)
    erased, labels = Erasing(p=0.25, scale=(0.1, 0.2), ratio=(0.5, 2.0), value=0.5)(images, images)
    assert labels is images
    holes = erased[:, 0] == 0.5
    assert torch.equal(holes, erased[:, 1] == 0.5)
    areas, heights, widths = (each.flatten(1).sum(1).float() for each in (holes, holes.any(dim=2), holes.any(dim=1)))
    changed = areas > 0
    assert changed.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(areas, heights * widths)  # the holes are rectangles
    shares, ratios = areas[changed] / 600, heights[changed] / widths[changed]
    assert 0.08 < shares.min() < 0.11 < 0.19 < shares.max() < 0.22
    assert 0.4 < ratios.min() < 0.6 < 1.8 < ratios.max() < 2.5
    covered = holes[changed].float().mean(dim=0)
    assert covered.min() > 0  # every pixel can be erased
    assert covered.argmax() not in (0, 19, 580, 599)


def test_a_rectangle_is_not_longer_than_the_image():
    erased, _ = Erasing(p=1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))(torch.ones(3, 1, 8, 20), None)
    assert torch.equal(erased.sum(dim=(2, 3)), torch.full((3, 1), 8.0 * 20 - 8 * 13))  # √160 ≈ 13


def test_each_image_is_mirrored_or_not(batch):
    images, labels = batch
    flipped, unchanged = HorizontalFlip()(images, labels)
    is_mirrored = (flipped == images.flip(-1)).flatten(1).all(dim=1)
    assert 20 < is_mirrored.sum() < 44
    assert torch.equal(flipped[~is_mirrored], images[~is_mirrored])
    assert unchanged is labels


@pytest.mark.parametrize("augmentation", [Distortion(), Erasing(), HorizontalFlip()])
def test_draws_repeat_with_torch_s_generator(batch, augmentation):
    first, second = augmentation(*batch)[0], augmentation(*batch)[0]
    torch.manual_seed(0)
    again = augmentation(*batch)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mix", [v2.MixUp, v2.CutMix])
def test_torchvision_s_mixtures_stand_in_the_same_list(batch, mix):
    images, labels = batch
    for augmentation in (HorizontalFlip(0.0), mix(num_classes=10), Erasing(0.0)):
        images, labels = augmentation(images, labels)
    assert images.shape == batch[0].shape
    assert labels.shape == (64, 10)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(64))
    assert not torch.equal(images, batch[0])
    assert (labels[range(64), batch[1]] > 0).all()


@pytest.mark.parametrize(
    ("augmentation", "arguments", "message"),
    [
        (Distortion, {"degrees": -1.0}, "none may be negative"),
        (Distortion, {"scale": 1.0}, "scale must be less than 1"),
        (Distortion, {"sigma": 0.0}, "sigma more than 0"),
        (Erasing, {"p": 1.5}, "p 1.5 is not a probability"),
        (Erasing, {"scale": (0.3, 0.2)}, "the lower end comes first"),
        (Erasing, {"ratio": (0.0, 1.0)}, "ratio is not 0"),
        (HorizontalFlip, {"p": -0.1}, "is not a probability"),
    ],
)
def test_what_has_no_sense_is_refused(augmentation, arguments, message):
    with pytest.raises(ValueError, match=message):
        augmentation(**arguments)
