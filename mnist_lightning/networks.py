"""Networks that map images to logits: MLP, CNN, those of torchvision, and ensembles."""

import difflib
import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dense(nn.Linear):
    """A linear layer like Keras's: Glorot-uniform kernel, zero bias and an optional L2 penalty on the kernel.

    Args:
        in_features: Size of an input.
        out_features: Size of an output.
        l2: λ of the penalty λ‖W‖² on the kernel. The layer only stores the number: the
            :class:`~mnist_lightning.classifier.Classifier` finds it in any module that has an attribute ``l2`` and a
            ``weight``.
    """

    def __init__(self, in_features: int, out_features: int, l2: float = 0.0) -> None:
        super().__init__(in_features, out_features)
        self.l2 = l2

    def reset_parameters(self) -> None:
        """Draw the kernel from Glorot and Bengio's uniform distribution and set the bias to zero."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, l2={self.l2}"


class Dropout(nn.Dropout):
    """``nn.Dropout`` with a mask that takes at most half the time on a CPU, where torch draws its values one by one."""

    def forward(self, input: Tensor) -> Tensor:
        """Zero each value with probability ``p`` and divide the others by ``1 - p``; in evaluation, do nothing."""
        is_supported = input.device.type == "cpu" and input.dtype in (torch.float32, torch.bfloat16)
        if self.training and self.p < 1 and is_supported:
            mask = torch.rand_like(input, dtype=torch.float32).ge_(self.p).div_(1 - self.p)
            return input * mask.to(input.dtype)
        return super().forward(input)


class Convolution(nn.Conv2d):
    """A convolution that keeps the image's size, with He et al.'s (2015) normal kernel and an optional L2 penalty.

    Args:
        in_channels: Channels of an input.
        out_channels: Channels of an output.
        kernel_size: Side of the kernel, odd.
        l2: λ of the penalty λ‖W‖² on the kernel, as in :class:`Dense`.
        bias: Whether to add a bias; it has no effect before a normalization, which has its own.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, l2: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.l2 = l2

    def reset_parameters(self) -> None:
        """Draw the kernel so that ReLU keeps the variance of its inputs, and set the bias to zero."""
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, l2={self.l2}"


class MLP(nn.Sequential):
    """Hidden layers, each followed by its activation and dropout, and a linear layer that returns the logits.

    Args:
        units: Width of each hidden layer.
        dropout: Share of a hidden layer's outputs dropped in training: one for each layer, or one for all.
        l2: λ of the penalty λ‖W‖² on a hidden layer's kernel: one for each layer, or one for all.
        activation: Name of a class in ``torch.nn``, for example ``ReLU``, ``GELU``, ``SiLU`` or ``Tanh``.
        in_features: Number of values in an image: pixels times channels.
        num_classes: Number of logits.
        normalization: ``batch`` (Ioffe and Szegedy 2015) or ``layer`` (Ba et al. 2016), before each activation.
        input_dropout: Share of an image's values dropped in training.

    Attributes:
        hparams: The arguments, by name.

    Raises:
        ValueError: If the length of ``dropout`` or ``l2`` differs from that of ``units``, or a value is invalid.
    """

    def __init__(
        self,
        units: Sequence[int] = (128, 64),
        dropout: Sequence[float] | float = 0.2,
        l2: Sequence[float] | float = 0.01,
        activation: str = "ReLU",
        in_features: int = 784,
        num_classes: int = 10,
        normalization: Literal["batch", "layer"] | None = None,
        input_dropout: float = 0.0,
    ) -> None:
        arguments = _arguments(locals())
        super().__init__()
        self.hparams = arguments
        if min(units, default=1) < 1:
            raise ValueError(f"units {list(units)}: a hidden layer needs at least one unit")
        make_activation = _activation(activation)
        layers = "hidden layers (units)"
        rates, factors = _per_layer("dropout", dropout, len(units), layers), _per_layer("l2", l2, len(units), layers)
        _check_l2(factors)
        _check_shares(dropout=rates, input_dropout=[input_dropout])
        self.add_module("flatten", nn.Flatten())
        if input_dropout:
            self.add_module("input_dropout", Dropout(input_dropout))
        for layer, (width, rate, factor) in enumerate(zip(units, rates, factors, strict=True), start=1):
            self.add_module(f"dense_{layer}", Dense(in_features, width, factor))
            if normalization is not None:
                norms: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
                self.add_module(f"normalization_{layer}", norms[normalization](width))
            self.add_module(f"activation_{layer}", make_activation())
            self.add_module(f"dropout_{layer}", Dropout(rate))
            in_features = width
        self.add_module("logits", Dense(in_features, num_classes))


class CNN(nn.Sequential):
    """Stages of convolutions with pooling between them, and a linear layer on the averages of the last stage.

    Each convolution keeps the size and is followed by a normalization and an activation. In a stage's last convolution,
    max-pooling comes before these two and halves the size, so they cost a quarter (as in Jordan 2024,
    arXiv:2404.00498). The last stage ends in global average pooling (Lin et al. 2014), so images may have any size.
    Channels are last in memory, which is faster. With ``--trainer.precision auto``, a processor that has bf16 takes
    0.4 to 0.7 of the time.

    Args:
        channels: Width of each stage: channels of its convolutions.
        convolutions: Number of convolutions in a stage: one for each stage, or one for all.
        kernel_size: Side of the kernels, odd: one for each stage, or one for all.
        dropout: Share of a stage's pooled outputs dropped in training: one for each stage, or one for all.
        l2: λ of the penalty λ‖W‖² on the convolutions' kernels: one for each stage, or one for all.
        activation: Name of a class in ``torch.nn``, for example ``ReLU``, ``GELU``, ``SiLU`` or ``Tanh``.
        normalization: ``batch`` (Ioffe and Szegedy 2015) or ``layer`` (over channels and pixels; Ba et al. 2016).
        in_channels: Channels of an image.
        num_classes: Number of logits.

    Attributes:
        hparams: The arguments, by name.

    Raises:
        ValueError: If the length of a list differs from that of ``channels``, or a value is invalid.
    """

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128),
        convolutions: Sequence[int] | int = 2,
        kernel_size: Sequence[int] | int = 3,
        dropout: Sequence[float] | float = 0.0,
        l2: Sequence[float] | float = 0.0,
        activation: str = "ReLU",
        normalization: Literal["batch", "layer"] | None = "batch",
        in_channels: int = 1,
        num_classes: int = 10,
    ) -> None:
        arguments = _arguments(locals())
        super().__init__()
        self.hparams = arguments
        given = {"convolutions": convolutions, "kernel_size": kernel_size, "dropout": dropout, "l2": l2}
        per_stage = {
            name: _per_layer(name, values, len(channels), "stages (channels)") for name, values in given.items()
        }
        if not channels or min(*channels, *per_stage["convolutions"]) < 1:
            raise ValueError(
                f"channels {list(channels)}, convolutions {per_stage['convolutions']}: there must be at least one "
                "stage, and each needs at least one channel and one convolution"
            )
        if min(per_stage["kernel_size"]) < 1 or not all(size % 2 for size in per_stage["kernel_size"]):
            raise ValueError(f"kernel_size {per_stage['kernel_size']}: only an odd size keeps the size of an image")
        _check_l2(per_stage["l2"])
        _check_shares(dropout=per_stage["dropout"])
        make_activation = _activation(activation)
        for stage, (width, count, size, rate, factor) in enumerate(zip(channels, *per_stage.values(), strict=True), 1):
            layers, is_last = nn.Sequential(), stage == len(channels)
            for layer in range(1, count + 1):
                convolution = Convolution(in_channels, width, size, factor, bias=normalization is None)
                layers.add_module(f"convolution_{layer}", convolution)
                if layer == count and not is_last:
                    # ceil_mode: even the smallest image keeps a pixel after any number of stages
                    layers.add_module("pool", nn.MaxPool2d(2, ceil_mode=True))
                if normalization is not None:
                    norms: dict[str, Callable[[int], nn.Module]] = {
                        "batch": nn.BatchNorm2d,
                        "layer": partial(nn.GroupNorm, 1),
                    }
                    layers.add_module(f"normalization_{layer}", norms[normalization](width))
                layers.add_module(f"activation_{layer}", make_activation())
                in_channels = width
            if is_last:
                layers.add_module("pool", nn.AdaptiveAvgPool2d(1))
            layers.add_module("dropout", Dropout(rate))
            self.add_module(f"stage_{stage}", layers)
        self.add_module("flatten", nn.Flatten())
        self.add_module("logits", Dense(in_channels, num_classes))
        self.to(memory_format=torch.channels_last)

    def forward(self, input: Tensor) -> Tensor:
        """Map images of shape (batch, channels, height, width) to logits of shape (batch, classes)."""
        logits: Tensor = super().forward(input.to(memory_format=torch.channels_last))
        return logits


class TorchvisionModel(nn.Module):
    """A classifier from ``torchvision.models``, adapted to the channels and classes of the data.

    Args:
        model: Name of the classifier, for example ``resnet18``, ``mobilenet_v3_small`` or ``vit_b_16``.
        weights: Name of pretrained weights, for example ``DEFAULT`` or ``IMAGENET1K_V1``, which torchvision downloads
            once; the first layer is adapted, and the last layer is replaced by a random one. By default all weights are
            random.
        image_size: Side to which images are resized: many models need 32 pixels, ``vit_b_16`` 224. By default images
            keep their size.
        in_channels: Channels of an image. If the model has another number, its first kernels are summed over their
            channels and the sum is divided evenly: the output for a gray image is that for a gray picture of three
            channels.
        num_classes: Number of logits.

    Attributes:
        hparams: The arguments, by name.

    Raises:
        ValueError: If the model or the weights do not exist, or the model does not begin with a convolution.
    """

    def __init__(
        self,
        model: str = "resnet18",
        weights: str | None = None,
        image_size: int | None = None,
        in_channels: int = 1,
        num_classes: int = 10,
    ) -> None:
        arguments = _arguments(locals())
        from torchvision import models  # takes a second, and only this class needs it

        super().__init__()
        self.hparams = arguments
        if model not in (names := models.list_models(module=models)):
            close = difflib.get_close_matches(model, names) or ["resnet18", "mobilenet_v3_small", "vit_b_16"]
            raise ValueError(f"model {model!r} is not a classifier in torchvision.models; try {', '.join(close)}")
        known = models.get_model_weights(model).__members__
        if weights is not None and weights not in known:
            raise ValueError(f"{model} has no weights {weights!r}; use {', '.join(known)}, or null for random weights")
        network = models.get_model(model, weights=weights)
        network.transform_input = False  # GoogLeNet and Inception scale their three channels
        layers = [(n, layer) for n, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        (_, first), (name, last) = layers[0], layers[-1]
        if not isinstance(first, nn.Conv2d):
            raise ValueError(f"model {model!r} does not begin with a convolution, so its channels cannot be adapted")
        if in_channels != first.in_channels:
            kernels = first.weight.detach().sum(dim=1, keepdim=True).expand(-1, in_channels, -1, -1)
            first.weight, first.in_channels = nn.Parameter(kernels / in_channels), in_channels
        if isinstance(last, nn.Linear):
            network.set_submodule(name, nn.Linear(last.in_features, num_classes))
        else:  # SqueezeNet
            network.set_submodule(name, nn.Conv2d(last.in_channels, num_classes, 1))
        self.image_size = image_size
        self.model = network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, channels, height, width) to logits of shape (batch, classes)."""
        if self.image_size is not None:
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        output = self.model(images.to(memory_format=torch.channels_last))
        logits: Tensor = output if isinstance(output, Tensor) else output[0]  # without the auxiliary heads
        return logits


class Ensemble(nn.ModuleList):
    """The average of several networks: the mean of their probabilities (Hansen and Salamon 1990).

    In training, each batch is split evenly between the members, and each member learns from its own part as it would
    alone. So an epoch takes as long as one of a single member, but shows each member only a part of the images: with
    three members, an ensemble trains for three times the epochs, in batches that are three times as large. A batch with
    fewer than two images for each member, such as the rest of an epoch, trains the mean of their logits instead.

    Args:
        members: Networks for the same images and classes.

    Attributes:
        hparams: The arguments, by name.

    Raises:
        ValueError: If there are no members.
    """

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__(members)
        self.hparams = {"members": members}
        if not members:
            raise ValueError("members: an ensemble needs at least one network")

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, channels, height, width) to logits of shape (batch, classes)."""
        count = len(self)
        if not self.training:
            shares = [member(images).log_softmax(dim=1) for member in self]
            # logsumexp, in operations that the page to draw on has
            total: Tensor = reduce(lambda total, share: total + F.softplus(share - total), shares)
            return total - math.log(count)
        if len(images) < 2 * count:  # batch normalization needs two images
            logits = torch.stack([member(images) for member in self]).mean(dim=0)
        else:
            parts = images.tensor_split(count)
            logits = torch.cat([member(part) for member, part in zip(self, parts, strict=True)])
        fixed = logits.detach()
        # a member's share of the batch's mean loss is 1 / count: its gradient is to be that of its own mean loss
        return fixed + count * (logits - fixed)


def count_parameters(network: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def _arguments(variables: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments among the local variables of a constructor."""
    return {name: value for name, value in variables.items() if name not in ("self", "__class__")}


def _per_layer(name: str, values: Any, count: int, what: str) -> Sequence[Any]:
    """Return one value for each layer, given as a list or as one value for all."""
    if not isinstance(values, Sequence):
        return [values] * count
    if len(values) != count:
        raise ValueError(
            f"the length of {name} is {len(values)}, but the number of {what} is {count}: give one value for each, or "
            "a single value for all"
        )
    return values


def _check_shares(**shares: Sequence[float]) -> None:
    for name, values in shares.items():
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"{name} {', '.join(map(str, values))}: a share must be between 0 and 1")


def _check_l2(factors: Sequence[float]) -> None:
    if min(factors, default=0) < 0:
        raise ValueError(f"l2 {list(factors)}: a penalty must not be negative")


def _activation(name: str) -> type[nn.Module]:
    if name not in nn.modules.activation.__all__:
        raise ValueError(f"activation {name!r} is not an activation in torch.nn; try ReLU, GELU, SiLU or Tanh")
    activation: type[nn.Module] = getattr(nn, name)
    return activation
