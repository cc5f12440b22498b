"""Attributions against those of a linear network, which are known, and against what they must add up to."""

import pytest
import torch
from torch import nn

from mnist_lightning.data import Split
from mnist_lightning.networks import CNN
from mnist_lightning.training.saliency import integrated_gradients, smoothed

pytestmark = pytest.mark.numeric


@pytest.fixture
def split(mnist):
    """Return standardized images; the baseline is the mean of every second image."""
    mnist.setup("test")
    mean, std = torch.full((1, 1, 1), 0.13), torch.full((1, 1, 1), 0.31)
    return Split(mnist.test.images[:2000], mnist.test.labels[:2000], statistics=(mean, std))


def test_of_a_linear_network_it_is_weight_times_difference(split):
    torch.manual_seed(0)
    layer = nn.Linear(784, 10)
    images, classes, others = split.scaled(range(4)), torch.tensor([3, 1, 4, 1]), torch.tensor([5, 9, 2, 6])
    found = integrated_gradients(nn.Sequential(nn.Flatten(), layer), images, split, classes, others, steps=3)
    weights = (layer.weight[classes] - layer.weight[others]).view(4, 28, 28) / 0.31
    baseline = split.scaled(range(0, 2000, 2)).mean(dim=0)
    torch.testing.assert_close(found, ((images - baseline)[:, 0] * weights).detach())


def test_it_adds_up_to_what_separates_an_image_from_the_mean(split):
    torch.manual_seed(0)
    network = CNN([4, 8], convolutions=1).eval()
    images, classes, others = split.scaled(range(8)), torch.arange(8), torch.arange(8) + 1
    found = integrated_gradients(network, images, split, classes, others, steps=64).sum(dim=(1, 2))

    def difference(some):
        logits = network(split.standardized(some)).detach()
        return logits.gather(1, classes[:, None])[:, 0] - logits.gather(1, others[:, None])[:, 0]

    baseline = split.scaled(range(0, 2000, 2)).mean(dim=0).expand_as(images)
    expected = difference(images) - difference(baseline)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert expected.abs().min() > 0.01


def test_what_is_drawn_has_its_sign_and_reaches_one():
    values = torch.zeros(2, 28, 28)
    values[0, 5, 5], values[0, 20, 20] = 2.0, -1.0
    drawn = smoothed(values)
    assert drawn[0].max() == drawn[0, 5, 5] == 1
    assert drawn[0, 20, 20] == pytest.approx(-0.5, abs=0.01)
    assert (drawn[1] == 0).all()
