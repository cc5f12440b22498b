"""The network: shapes, initial weights, and what each layer carries."""

import math

import pytest
import torch
from torch import nn

from mnist_lightning.networks import MLP, Dense, Dropout


def test_the_default_is_the_notebook_s_network():
    network = MLP()
    shapes = [tuple(layer.weight.shape) for layer in network if isinstance(layer, Dense)]
    assert shapes == [(128, 784), (64, 128), (10, 64)]
    assert [layer.p for layer in network if isinstance(layer, nn.Dropout)] == [0.2, 0.2]
    assert [layer.l2 for layer in network if isinstance(layer, Dense)] == [0.01, 0.01, 0]
    assert sum(parameter.numel() for parameter in network.parameters()) == 109_386  # Keras's count
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_kernels_are_glorot_uniform_and_biases_zero():
    layer = Dense(784, 128)
    limit = math.sqrt(6 / (784 + 128))
    assert layer.weight.abs().max() <= limit
    assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert layer.weight.mean().item() == pytest.approx(0, abs=limit / 100)
    assert not layer.bias.any()


def test_each_layer_takes_its_own_values():
    network = MLP(units=[30, 20, 10], dropout=[0.1, 0.2, 0.3], l2=[0, 0.5, 1], activation="Tanh")
    assert [layer.p for layer in network if isinstance(layer, nn.Dropout)] == [0.1, 0.2, 0.3]
    assert [layer.l2 for layer in network if isinstance(layer, Dense)] == [0, 0.5, 1, 0]
    assert sum(isinstance(layer, nn.Tanh) for layer in network) == 3


def test_one_value_serves_all_layers():
    network = MLP(units=[30, 20, 10], dropout=0.4, l2=0.1)
    assert [layer.p for layer in network if isinstance(layer, nn.Dropout)] == [0.4] * 3
    assert [layer.l2 for layer in network if isinstance(layer, Dense)] == [0.1] * 3 + [0]


def test_no_hidden_layer_is_a_linear_classifier():
    assert [type(layer) for layer in MLP(units=[], dropout=0.5, l2=0.1)] == [nn.Flatten, Dense]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": [5]}, "dropout has 2 values for 1 hidden layers"),
        ({"units": [5], "dropout": 0.1}, "l2 has 2 values"),
        ({"units": [5, 0]}, "at least one unit"),
        ({"l2": -0.1}, "a penalty is not negative"),
        ({"dropout": 1.5}, "dropout probability has to be between 0 and 1"),
        ({"activation": "Linear"}, "no activation of torch.nn"),
    ],
)
def test_what_has_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLP(**arguments)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 1.0])
def test_dropout_zeroes_its_share_and_scales_the_rest(rate):
    torch.manual_seed(0)
    dropout, inputs = Dropout(rate), torch.full((1000, 100), 3.0, requires_grad=True)
    outputs = dropout(inputs)
    kept = outputs != 0
    assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.005)  # three standard deviations
    assert torch.allclose(outputs[kept], torch.tensor(3 / (1 - rate) if rate < 1 else 0.0))
    outputs.sum().backward()
    assert torch.equal(inputs.grad * 3, outputs)
    assert not torch.equal(dropout(inputs), outputs) or rate in (0, 1)
    assert dropout.eval()(inputs) is inputs
