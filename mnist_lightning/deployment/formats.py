"""ONNX and ``torch.export``: write a file and compare it with the checkpoint."""

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mnist_lightning.data import ImageDataModule, Split
from mnist_lightning.system.errors import UserError
from mnist_lightning.training.saved_run import outputs

TOLERANCE = 1e-5
"""Allowed difference of a probability from the checkpoint's: above rounding errors, below any digit that matters."""
DYNAMIC = ({0: Dim("batch")},)
"""The dynamic dimension of the images."""

Predict = Callable[[Tensor], Tensor]
"""A function from images in [0, 1], of shape (batch, channels, height, width), to probabilities (batch, classes)."""


class ExportedNetwork(nn.Module):
    """A network together with the preprocessing of the data module and the softmax of the classifier.

    Args:
        network: Maps images to logits.
        statistics: Mean and standard deviation of each channel, of shape (channels, 1, 1), to standardize with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, statistics: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.network = network
        self.is_standardized = statistics is not None
        for name, values in zip(("mean", "std"), statistics or (None, None), strict=True):
            self.register_buffer(name, values)

    def forward(self, images: Tensor) -> Tensor:
        """Map images in [0, 1], of shape (batch, channels, height, width), to probabilities (batch, classes)."""
        if self.is_standardized:
            images = (images - self.mean) / self.std
        probabilities: Tensor = self.network(images).softmax(dim=1)
        return probabilities


def exported(network: nn.Module, data: ImageDataModule, batch: int | None = None) -> ExportedProgram:
    """Return the graph of a network in evaluation mode, from images in [0, 1] to probabilities.

    Args:
        network: Maps images to logits.
        data: The data module, set up for testing.
        batch: Number of images in a batch; any number by default.

    Raises:
        UserError: If ``torch.export`` cannot follow the network.
    """
    assert data.test is not None
    module = copy.deepcopy(ExportedNetwork(network, data.test.statistics)).eval()
    for name, layer in [*module.named_modules()]:
        if isinstance(layer, nn.RReLU):  # in evaluation RReLU equals this, which every format supports
            module.set_submodule(name, nn.LeakyReLU((layer.lower + layer.upper) / 2))
    example = torch.zeros(batch or 2, *data.image_shape)  # with one image, torch would make the batch size constant
    symbolic_shapes = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    symbolic_shapes.setLevel(logging.ERROR)  # the warnings, like torch's output, are repeated in the error
    try:
        with redirect_stderr(io.StringIO()):
            return torch.export.export(module, (example,), dynamic_shapes=None if batch else DYNAMIC)
    except Exception as error:  # a user's network may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{type(network).__name__} cannot be exported: torch.export says {reason}") from error


def metadata(data: ImageDataModule, probabilities: Tensor, checkpoint: str) -> dict[str, str]:
    """Return the information that a user of the exported network needs."""
    assert data.test is not None
    preprocessing = "float32, bytes divided by 255; channels before height and width"
    if data.test.statistics is not None:
        preprocessing += "; each channel is standardized by its mean and deviation inside the graph"
    return {
        "class_names": json.dumps(data.names(probabilities.shape[1])),
        "image_shape": json.dumps(data.image_shape),
        "preprocessing": preprocessing,
        "data": data.source,
        "checkpoint": checkpoint,
    }


def predict(function: Predict, data: ImageDataModule) -> Tensor:
    """Return the probabilities of all test images, of shape (n, classes), as a function computes them."""
    assert data.test is not None
    images = Split(data.test.images, data.test.labels)  # the function standardizes the images itself
    first, others = torch.arange(len(images)).split([1, len(images) - 1])
    # the first image alone, to test that the batch size is free
    return outputs(function, images, [first, *others.split(data.eval_batch_size)] if len(others) else [first])


def compare(expected: Tensor, found: Tensor, what: str, tolerance: float = TOLERANCE) -> float:
    """Return the largest difference between probabilities of shape (n, classes); refuse changed labels.

    Args:
        expected: Probabilities of the checkpoint.
        found: Probabilities to check.
        what: The checked program, with which the error starts.
        tolerance: The largest difference that counts as rounding.

    Raises:
        UserError: If a label differs, or a probability differs by more than the tolerance.
    """
    difference = (expected - found).abs().max().item()
    labels = int((expected.argmax(dim=1) != found.argmax(dim=1)).sum())
    if labels or not difference <= tolerance:  # also refuses NaN
        raise UserError(
            f"{what} gives {labels} of {len(expected)} test images a different label from the "
            f"checkpoint, and probabilities differ by up to {difference:.1e}, more than rounding ({tolerance:.0e})."
        )
    return difference


def write_onnx(program: ExportedProgram, metadata: dict[str, str], path: Path) -> None:
    """Write an ONNX file, with the metadata in ``metadata_props``."""
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probabilities"]}
    try:
        onnx = torch.onnx.export(program, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False, **names)
    except Exception as error:  # its class is private to torch; the first cause names the operation
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().partition("\n")[0]
        raise UserError(f"ONNX does not support this network: {reason.rstrip('.')}. Use a .pt2 file.") from error
    assert onnx is not None
    onnx.model.metadata_props.update(metadata)
    onnx.save(path, external_data=False)  # weights inside the file


def read_onnx(path: Path) -> Predict:
    """Load a network to run with ONNX Runtime on the CPU, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_pt2(program: ExportedProgram, metadata: dict[str, str], path: Path) -> None:
    """Write a ``torch.export`` file, with the metadata as the extra file ``metadata.json``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # about views, which are saved correctly
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata, indent=2)})


def read_pt2(path: Path) -> Predict:
    """Load a network to run with torch."""
    module: Predict = torch.export.load(path).module()
    return module


@dataclass
class Format:
    """The functions that write a file format, and read the file back to check it.

    Attributes:
        checker: Name of the program that runs the file in the check.
        packages: Packages that are needed in addition to torch.
    """

    checker: str
    write: Callable[[ExportedProgram, dict[str, str], Path], None]
    read: Callable[[Path], Predict]
    packages: Sequence[str] = ()


FORMATS = {
    ".onnx": Format("ONNX Runtime", write_onnx, read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    ".pt2": Format("torch.export.load", write_pt2, read_pt2),
}
"""The formats by file suffix."""


def format_of(path: Path) -> Format:
    """Return the format of a file by its suffix.

    Raises:
        UserError: If the format is unknown, or a package that it needs is missing.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"{path} must end in {' or '.join(FORMATS)}: the suffix selects the format.")
    if missing := [name for name in FORMATS[path.suffix].packages if find_spec(name) is None]:
        raise UserError(
            f"{path.suffix} needs {' and '.join(missing)}: pip install 'mnist_lightning[export]'. A .pt2 file "
            "needs only torch."
        )
    return FORMATS[path.suffix]
