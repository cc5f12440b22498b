"""The network: shapes, initial weights, and what each layer carries."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from mnist_lightning.networks import CNN, MLP, Convolution, Dense, Dropout, Ensemble, TorchvisionModel

pytestmark = pytest.mark.numeric


def test_the_default_is_the_notebook_s_network():
    network = MLP()
    shapes = [tuple(layer.weight.shape) for layer in network if isinstance(layer, Dense)]
    assert shapes == [(128, 784), (64, 128), (10, 64)]
    assert [layer.p for layer in network if isinstance(layer, nn.Dropout)] == [0.2, 0.2]
    assert [layer.l2 for layer in network if isinstance(layer, Dense)] == [0.01, 0.01, 0]
    assert sum(parameter.numel() for parameter in network.parameters()) == 109_386  # Keras counts the same
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
    network = MLP(units=[30])  # the defaults also apply to each layer
    assert [layer.p for layer in network if isinstance(layer, nn.Dropout)] == [0.2]
    assert [layer.l2 for layer in network if isinstance(layer, Dense)] == [0.01, 0]


def test_no_hidden_layer_is_a_linear_classifier():
    assert [type(layer) for layer in MLP(units=[], dropout=0.5, l2=0.1)] == [nn.Flatten, Dense]


def test_the_default_has_the_names_and_draws_of_the_first_version():
    """Check that old checkpoints load and old runs repeat: only the kernels are drawn, one after another."""
    torch.manual_seed(0)
    weights = MLP().state_dict()
    torch.manual_seed(0)
    expected = nn.ModuleDict({"dense_1": Dense(784, 128), "dense_2": Dense(128, 64), "logits": Dense(64, 10)})
    assert [*weights] == [*expected.state_dict()]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.state_dict().items())
    names = ["flatten", *(f"{layer}_{i}" for i in (1, 2) for layer in ("dense", "activation", "dropout")), "logits"]
    assert [name for name, _ in MLP().named_children()] == names


def test_an_mlp_normalizes_before_the_activation_and_drops_pixels():
    network = MLP([8, 6], 0.1, 0.0, normalization="batch", input_dropout=0.3)
    layer = ["dense", "normalization", "activation", "dropout"]
    names = ["flatten", "input_dropout", *(f"{name}_{i}" for i in (1, 2) for name in layer), "logits"]
    assert [name for name, _ in network.named_children()] == names
    assert network.input_dropout.p == 0.3
    assert isinstance(network.normalization_2, nn.BatchNorm1d)
    network = MLP([8], 0.1, 0.0, normalization="layer")
    outputs = network.normalization_1(torch.randn(5, 8) * 3 + 2)
    torch.testing.assert_close(outputs.std(dim=1, correction=0), torch.ones(5), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": [5], "dropout": [0.2, 0.2]}, "the length of dropout is 2, but the number of hidden layers"),
        ({"units": [5], "l2": [0.1, 0.1]}, "the length of l2 is 2"),
        ({"units": [5, 0]}, "at least one unit"),
        ({"l2": -0.1}, "a penalty must not be negative"),
        ({"dropout": 1.5}, "dropout 1.5, 1.5: a share must be between 0 and 1"),
        ({"activation": "Linear"}, "not an activation in torch.nn"),
    ],
)
def test_what_has_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLP(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 1.0])
def test_dropout_zeroes_its_share_and_scales_the_rest(rate, dtype):
    torch.manual_seed(0)
    dropout, inputs = Dropout(rate), torch.full((1000, 100), 3.0, requires_grad=True, dtype=dtype)
    outputs = dropout(inputs)
    kept = outputs != 0
    assert kept.float().mean().item() == pytest.approx(1 - rate, abs=0.005)  # three standard deviations
    assert torch.allclose(outputs[kept], torch.tensor(3 / (1 - rate) if rate < 1 else 0.0, dtype=dtype))
    outputs.sum().backward()
    torch.testing.assert_close(inputs.grad * 3, outputs)
    assert not torch.equal(dropout(inputs), outputs) or rate in (0, 1)
    assert dropout.eval()(inputs) is inputs


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (33, 96), (1, 1)])
@pytest.mark.parametrize("normalization", ["batch", "layer", None])
def test_a_cnn_takes_images_of_any_size_and_channels(size, normalization):
    network = CNN([4, 6, 8, 8], [1, 2, 1, 1], normalization=normalization, in_channels=3, num_classes=7).eval()
    assert network(torch.rand(2, 3, *size)).shape == (2, 7)


def test_each_stage_takes_its_own_values():
    network = CNN([4, 8], [1, 3], kernel_size=[5, 3], dropout=[0.1, 0.2], l2=[0.5, 0], activation="GELU")
    layers = [layer for layer in network.modules() if isinstance(layer, Convolution)]
    shapes = [(4, 1, 5, 5), (8, 4, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3)]
    assert [tuple(layer.weight.shape) for layer in layers] == shapes
    assert [layer.l2 for layer in layers] == [0.5, 0, 0, 0]
    assert [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)] == [0.1, 0.2]
    assert sum(isinstance(layer, nn.GELU) for layer in network.modules()) == 4
    # normalization has a bias, so the convolution does not need one
    expected = sum(math.prod(shape) for shape in shapes) + 2 * (4 + 3 * 8) + 8 * 10 + 10
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_a_cnn_is_what_its_layers_are_in_usual_memory_order(mnist):
    torch.manual_seed(0)
    network = CNN([4, 8], dropout=0.0).double()  # in float64, both orders agree to 1e-15
    images = mnist.train.scaled(range(16)).double()
    layers = [layer for layer in network.modules() if not [*layer.children()]]
    plain = nn.Sequential(*layers)
    expected = images
    for layer in plain:
        expected = layer(expected.contiguous())
    torch.testing.assert_close(network(images), expected)
    assert network.stage_2.convolution_1(images.expand(-1, 4, -1, -1)).is_contiguous(memory_format=torch.channels_last)


def test_a_convolution_keeps_the_variance_under_relu():
    torch.manual_seed(0)
    layer = Convolution(32, 32, 3)
    outputs = layer(torch.randn(8, 32, 30, 30).relu())[..., 1:-1, 1:-1]
    assert outputs.square().mean().item() == pytest.approx(1, rel=0.1)  # the input had 1 before ReLU
    assert not layer.bias.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": []}, "there must be at least one stage"),
        ({"channels": [8, 0]}, "at least one channel"),
        ({"convolutions": [1, 2]}, "the length of convolutions is 2, but the number of stages"),
        ({"convolutions": 0}, "at least one channel and one convolution"),
        ({"kernel_size": 4}, "only an odd size"),
        ({"l2": -1.0}, "a penalty must not be negative"),
        ({"activation": "relu"}, "not an activation in torch.nn"),
    ],
)
def test_a_cnn_refuses_what_has_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        CNN(**arguments)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvision_s_models_are_fitted_to_channels_and_classes(name):
    network = TorchvisionModel(name, in_channels=2, num_classes=7).eval()
    assert network(torch.rand(1, 2, 32, 32)).shape == (1, 7)


def test_a_model_that_wants_large_images_gets_them():
    assert TorchvisionModel("alexnet", image_size=64).eval()(torch.rand(1, 1, 28, 28)).shape == (1, 10)


def test_auxiliary_heads_are_left_out():
    assert TorchvisionModel("googlenet")(torch.rand(2, 1, 32, 32)).shape == (2, 10)


def test_pretrained_kernels_see_a_grey_image_as_a_grey_picture(monkeypatch):
    from torchvision import models

    torch.manual_seed(0)
    pretrained = models.resnet18().double().eval()  # without a download
    monkeypatch.setattr(models, "get_model", lambda *_, **__: pretrained)
    grey = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    expected = pretrained.conv1(grey.expand(-1, 3, -1, -1))
    network = TorchvisionModel("resnet18", "DEFAULT").double().eval()
    torch.testing.assert_close(network.model.conv1(grey), expected)
    assert network(grey).shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet19"}, "not a classifier in torchvision.models; try resnet1"),
        ({"model": "fcn_resnet50"}, "not a classifier"),
        ({"weights": "IMAGENET"}, "resnet18 has no weights 'IMAGENET'; use IMAGENET1K_V1, DEFAULT"),
    ],
)
def test_a_model_that_torchvision_has_not_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TorchvisionModel(**arguments)


@pytest.mark.slow
def test_torchvision_is_imported_only_where_it_is_needed():
    code = "import sys, mnist_lightning.networks; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def make_ensemble(count=3):
    torch.manual_seed(0)
    return Ensemble([MLP([8], dropout=0.0, normalization="batch") for _ in range(count)]).double()


def test_an_ensemble_averages_probabilities(mnist):
    ensemble, images = make_ensemble().eval(), mnist.train.scaled(range(50)).double()
    expected = torch.stack([member(images).softmax(dim=1) for member in ensemble]).mean(dim=0)
    torch.testing.assert_close(ensemble(images).exp(), expected)
    with torch.no_grad():  # members that are as certain as can be, and disagree
        for number, member in enumerate(ensemble):
            member.logits.weight.zero_()
            member.logits.bias.copy_(1e4 * torch.eye(10)[number])
    torch.testing.assert_close(ensemble(images).softmax(dim=1)[:, :3], torch.full((50, 3), 1 / 3).double())


@pytest.mark.parametrize("size", [30, 6, 31])
def test_a_member_of_an_ensemble_learns_from_its_part_as_it_would_alone(mnist, size):
    ensemble, alone = make_ensemble(), make_ensemble()
    images, labels = mnist.train.scaled(range(size)).double(), mnist.train.labels[:size]
    logits = ensemble(images)
    nn.functional.cross_entropy(logits, labels).backward()
    parts = zip(alone, images.tensor_split(3), labels.tensor_split(3), strict=True)
    expected = []
    for member, own_images, own_labels in parts:
        expected.append(member(own_images))
        # an uneven part weighs by its images
        (nn.functional.cross_entropy(expected[-1], own_labels) * 3 * len(own_labels) / size).backward()
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=0)
    for own, other in zip(ensemble.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_a_batch_too_small_to_be_split_trains_every_member_of_an_ensemble(mnist):
    ensemble = make_ensemble()
    for size in range(2, 6):
        ensemble.zero_grad()
        logits = ensemble(mnist.train.scaled(range(size)).double())
        assert logits.shape == (size, 10)
        nn.functional.cross_entropy(logits, mnist.train.labels[:size]).backward()
        assert all(parameter.grad.isfinite().all() for parameter in ensemble.parameters())
        assert all(member.logits.weight.grad.any() for member in ensemble)


def test_an_ensemble_needs_a_member():
    with pytest.raises(ValueError, match="at least one network"):
        Ensemble([])
