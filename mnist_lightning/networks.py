"""Networks: plain ``nn.Module`` classes that map images to logits. Any other class does as well, by its class path."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Dense(nn.Linear):
    """A linear layer as Keras makes it: Glorot-uniform kernel, zero bias and, if wanted, an L2 penalty on the kernel.

    Args:
        in_features: Size of an input.
        out_features: Size of an output.
        l2: λ of the penalty λ‖W‖² on the kernel. The layer only carries the number: the
            :class:`~mnist_lightning.classifier.Classifier` finds it in any module that has an attribute ``l2`` and a
            ``weight``.
    """

    def __init__(self, in_features: int, out_features: int, l2: float = 0.0) -> None:
        super().__init__(in_features, out_features)
        self.l2 = l2

    def reset_parameters(self) -> None:
        """Draw the kernel from Glorot and Bengio's uniform distribution, set the bias to zero."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, l2={self.l2}"


class Dropout(nn.Dropout):
    """``nn.Dropout`` with a mask that takes a third of the time on a CPU, where torch draws its own one by one."""

    def forward(self, input: Tensor) -> Tensor:
        """Zero each value with probability ``p`` and divide the others by ``1 - p``; in evaluation, do nothing."""
        if self.training and self.p < 1 and input.dtype == torch.float32 and input.device.type == "cpu":
            return input * torch.rand_like(input).ge_(self.p).div_(1 - self.p)
        return super().forward(input)


class MLP(nn.Sequential):
    """Hidden layers, each followed by its activation and dropout, and a linear layer that gives the logits.

    Args:
        units: Width of each hidden layer.
        dropout: Share of a hidden layer's outputs dropped in training, for each layer or one for all.
        l2: λ of the penalty λ‖W‖² on a hidden layer's kernel, for each layer or one for all.
        activation: Name of a class in ``torch.nn``, for example ``ReLU``, ``GELU``, ``SiLU`` or ``Tanh``.
        in_features: Pixels of an image.
        num_classes: Number of logits.

    Raises:
        ValueError: ``dropout`` or ``l2`` has another length than ``units``, or a value has no sense.
    """

    def __init__(
        self,
        units: Sequence[int] = (128, 64),
        dropout: Sequence[float] | float = (0.2, 0.2),
        l2: Sequence[float] | float = (0.01, 0.01),
        activation: str = "ReLU",
        in_features: int = 784,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if activation not in nn.modules.activation.__all__:
            raise ValueError(f"activation {activation!r} is no activation of torch.nn; try ReLU, GELU, SiLU or Tanh")
        if min(units, default=1) < 1:
            raise ValueError(f"units {list(units)}: a hidden layer needs at least one unit")
        per_layer = [values if isinstance(values, Sequence) else [values] * len(units) for values in (dropout, l2)]
        for name, values in zip(("dropout", "l2"), per_layer, strict=True):
            if len(values) != len(units):
                raise ValueError(
                    f"{name} has {len(values)} values for {len(units)} hidden layers (units): "
                    f"give one value for each layer, or a single number for all"
                )
        if min(per_layer[1], default=0) < 0:
            raise ValueError(f"l2 {per_layer[1]}: a penalty is not negative")
        self.add_module("flatten", nn.Flatten())
        for layer, (width, rate, factor) in enumerate(zip(units, *per_layer, strict=True), start=1):
            self.add_module(f"dense_{layer}", Dense(in_features, width, factor))
            self.add_module(f"activation_{layer}", getattr(nn, activation)())
            self.add_module(f"dropout_{layer}", Dropout(rate))
            in_features = width
        self.add_module("logits", Dense(in_features, num_classes))
