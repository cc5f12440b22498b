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
"""How far a probability may be from the checkpoint's: more than rounding makes of it, less than anyone reads."""
DYNAMIC = ({0: Dim("batch")},)
"""Of the images' dimensions, that which may be any."""

Predict = Callable[[Tensor], Tensor]
"""Images in [0, 1], of shape (batch, channels, height, width), to probabilities, of shape (batch, classes)."""


class ExportedNetwork(nn.Module):
    """A network with what the data module and the classifier do around it.

    Args:
        network: Maps images to logits.
        statistics: Mean and standard deviation of each channel, of shape (channels, 1, 1), to standardise with.
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
        """Images in [0, 1], of shape (batch, channels, height, width), to probabilities, of shape (batch, classes)."""
        if self.is_standardized:
            images = (images - self.mean) / self.std
        probabilities: Tensor = self.network(images).softmax(dim=1)
        return probabilities


def exported(network: nn.Module, data: ImageDataModule, batch: int | None = None) -> ExportedProgram:
    """The graph of a network in evaluation mode, from images in [0, 1] to probabilities.

    Args:
        network: Maps images to logits.
        data: Has been set up to test.
        batch: Images in a batch; any number by default.

    Raises:
        UserError: If ``torch.export`` cannot follow the network.
    """
    assert data.test is not None
    module = copy.deepcopy(ExportedNetwork(network, data.test.statistics)).eval()
    for name, layer in [*module.named_modules()]:
        if isinstance(layer, nn.RReLU):  # outside of training it is this, for which every format has a name
            module.set_submodule(name, nn.LeakyReLU((layer.lower + layer.upper) / 2))
    example = torch.zeros(batch or 2, *data.image_shape)  # of one image, torch would take the 1 for fixed
    symbolic_shapes = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    symbolic_shapes.setLevel(logging.ERROR)  # what it warns of, and torch prints, comes as an error
    try:
        with redirect_stderr(io.StringIO()):
            return torch.export.export(module, (example,), dynamic_shapes=None if batch else DYNAMIC)
    except Exception as error:  # a network may be anybody's
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{type(network).__name__} cannot be exported: torch.export says {reason}") from error


def metadata(data: ImageDataModule, probabilities: Tensor, checkpoint: str) -> dict[str, str]:
    """What one must know to use an exported network."""
    assert data.test is not None
    preprocessing = "float32, bytes divided by 255; channels before height and width"
    if data.test.statistics is not None:
        preprocessing += "; each channel's mean and standard deviation are taken out inside the graph"
    return {
        "class_names": json.dumps(data.names(probabilities.shape[1])),
        "image_shape": json.dumps(data.image_shape),
        "preprocessing": preprocessing,
        "data": data.source,
        "checkpoint": checkpoint,
    }


def predict(function: Predict, data: ImageDataModule) -> Tensor:
    """Return the probabilities of all test images, of shape (n, classes), by a function from images in [0, 1]."""
    assert data.test is not None
    images = Split(data.test.images, data.test.labels)  # the function standardises them itself
    first, others = torch.arange(len(images)).split([1, len(images) - 1])
    # the first alone: a batch of any size will do
    return outputs(function, images, [first, *others.split(data.eval_batch_size)] if len(others) else [first])


def compare(expected: Tensor, found: Tensor, what: str, tolerance: float = TOLERANCE) -> float:
    """The largest difference between probabilities of shape (n, classes), which must not change a label.

    Args:
        expected: The checkpoint's.
        found: Those of what is checked.
        what: What that is, for the error.
        tolerance: The largest difference that is taken for rounding.

    Raises:
        UserError: If a label differs, or a probability by more than that.
    """
    difference = (expected - found).abs().max().item()
    labels = int((expected.argmax(dim=1) != found.argmax(dim=1)).sum())
    if labels or not difference <= tolerance:  # nor if it is no number
        raise UserError(
            f"Nothing is written: {what} gives {labels} of {len(expected)} test images another label than the "
            f"checkpoint, and probabilities that differ by up to {difference:.1e}; {tolerance:.0e} would be rounding."
        )
    return difference


def write_onnx(program: ExportedProgram, metadata: dict[str, str], path: Path) -> None:
    """Write ONNX, with the metadata in ``metadata_props``."""
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probabilities"]}
    try:
        onnx = torch.onnx.export(program, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False, **names)
    except Exception as error:  # of torch's private classes; the first cause names the operation
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().partition("\n")[0]
        raise UserError(f"ONNX cannot have this network: {reason} Take .pt2.") from error
    assert onnx is not None
    onnx.model.metadata_props.update(metadata)
    onnx.save(path, external_data=False)  # one file


def read_onnx(path: Path) -> Predict:
    """The network in a file, run by ONNX Runtime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_pt2(program: ExportedProgram, metadata: dict[str, str], path: Path) -> None:
    """Write torch's format, with the metadata as an extra file ``metadata.json``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # of views that are saved as they are
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata, indent=2)})


def read_pt2(path: Path) -> Predict:
    """The network in a file, run by torch."""
    module: Predict = torch.export.load(path).module()
    return module


@dataclass
class Format:
    """How a kind of file is written, and read again to check it.

    Attributes:
        checker: What runs the file in the check.
        packages: What has to be installed beside torch.
    """

    checker: str
    write: Callable[[ExportedProgram, dict[str, str], Path], None]
    read: Callable[[Path], Predict]
    packages: Sequence[str] = ()


FORMATS = {
    ".onnx": Format("ONNX Runtime", write_onnx, read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    ".pt2": Format("torch.export.load", write_pt2, read_pt2),
}
"""By the ends of the files' names."""


def format_of(path: Path) -> Format:
    """The format that a file's name ends in.

    Raises:
        UserError: If there is no such format, or a package that it needs is missing.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"{path} must end in {' or '.join(FORMATS)}, which says the format.")
    if missing := [name for name in FORMATS[path.suffix].packages if find_spec(name) is None]:
        raise UserError(
            f"{path.suffix} needs {' and '.join(missing)}: pip install 'mnist_lightning[export]'. A file that ends in "
            ".pt2 needs nothing but torch."
        )
    return FORMATS[path.suffix]
