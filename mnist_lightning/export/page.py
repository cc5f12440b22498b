"""A page to draw on: the network's graph as JSON with its weights, and the script that runs it."""

import base64
import copy
import operator
import re
from pathlib import Path
from typing import Any

import jinja2
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from markupsafe import Markup
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind

from mnist_lightning.data import ImageDataModule
from mnist_lightning.export import formats

LIMIT = 2 * 2**20
"""Bytes of a page that anyone can mail."""
TOLERANCE = 9e-5
"""How far rounded weights may move a probability; with the browser's own rounding it is below 1e-4."""
PAD = 280
"""Width of the picture that is drawn."""


def write_page(network: nn.Module, data: ImageDataModule, expected: Tensor) -> tuple[str, str]:
    """Make the page.

    Weights are float32. Where those are too many for the page, they are 16-bit integers times a number for each row,
    finer than float16 for all but the smallest, if the labels of the test images stay what they are.

    Args:
        network: In evaluation mode.
        data: Has been set up to test.
        expected: Probabilities of the test images, of shape (n, classes).

    Returns:
        The page, and how it has the weights.

    Raises:
        MisconfigurationException: The images are in colour, the script lacks an operation of the network, or it has too
            many weights.
    """
    assert data.test is not None
    channels, height, width = data.image_shape
    if channels != 1:
        raise MisconfigurationException(
            f"One draws in grey, but the images of {data.source} have {channels} channels: no page is written."
        )
    accuracy = (expected.argmax(dim=1) == data.test.labels).float().mean().item()
    classes = data.names(expected.shape[1])
    samples = data.test.scaled(torch.arange(min(3, len(expected))))  # the page computes them to check itself
    script, style, html = [Path(__file__).with_suffix(f".{name}").read_text("utf-8") for name in ("js", "css", "html")]
    content: dict[str, Any] = {
        "shape": data.image_shape,
        "classes": classes,
        "centred": (height, width) == (28, 28),
        "inverted": data.test.scaled(torch.arange(min(1000, len(expected)))).mean().item() > 0.5,
        "samples": [
            {"image": encode(image), "probabilities": probabilities.tolist()}
            for image, probabilities in zip(samples, expected, strict=False)
        ],
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(html)
    count = sum(value.numel() for value in network.parameters())
    for integers in (False, True):
        if integers:
            network = rounded(network)
        content |= graph(formats.exported(network, data, batch=1), set(OPERATION.findall(script)), integers)
        page = template.render(
            network=content,
            classes=classes,
            shape=data.image_shape,
            width=PAD,
            height=round(PAD * height / width),
            title="Draw a digit" if classes == [str(digit) for digit in range(10)] else "Draw",
            text=f"The network of {count:,} weights runs in this page; it gets {100 * accuracy:.2f} % of the "
            f"{len(expected):,} test images of {type(data).__name__.removesuffix('DataModule')} right.",
            style=Markup(style),  # noqa: S704
            script=Markup(script),  # noqa: S704
        )
        size = len(page.encode())
        if size < LIMIT:
            break
    else:
        raise MisconfigurationException(
            f"A page of {count:,} weights is {size / 2**20:.1f} MiB, and must be below {LIMIT / 2**20:.0f}: no page is "
            "written. Take a smaller network, or export it with --output network.onnx."
        )
    if not integers:
        return page, "weights in float32"
    found = formats.predict(formats.Deployed(network, data.test.statistics), data)
    difference = formats.compare(expected, found, "a page with weights in 16 bits", TOLERANCE)
    return page, f"weights in 16 bits, by which the probabilities of the test images change by at most {difference:.1e}"


OPERATION = re.compile(r'^  "([\w.]+)":', re.MULTILINE)
"""The names of the operations in the script."""


def rounded(network: nn.Module) -> nn.Module:
    """A copy whose kernels are whole multiples, of 16 bits, of a number for each row.

    Vectors, those of norms and biases, take little room, and to round them would cost most.
    """
    network = copy.deepcopy(network)
    for values in network.state_dict().values():
        if values.dim() > 1:
            values.copy_((values / units(values)).round() * units(values))
    return network


def units(values: Tensor) -> Tensor:
    """For each row, the number of which its values are to be multiples, up to the 32,767-fold: of shape (n, 1, ...)."""
    largest = values.flatten(1).abs().amax(dim=1)
    return (largest / 32767).clamp(min=1e-30).view(-1, *[1] * (values.dim() - 1))


def encode(values: Tensor, integers: bool = False) -> dict[str, Any]:
    """A tensor for the script: float32, or 16-bit integers and their units."""
    has_units = integers and values.dim() > 1
    stored = (values / units(values)).round().numpy().astype("<i2") if has_units else values.numpy().astype("<f4")
    return {
        "shape": [*values.shape],
        "base64": base64.b64encode(stored.tobytes()).decode(),
        "units": units(values).flatten().tolist() if has_units else None,
    }


def graph(program: ExportedProgram, supported: set[str], integers: bool) -> dict[str, Any]:
    """What the script runs, of a network for one image.

    Args:
        program: Its graph.
        supported: Names of the operations that the script has.
        integers: Whether large weights are stored in 16 bits.

    Returns:
        ``weights`` by name, ``nodes`` in their order, and the names ``input`` and ``output``.

    Raises:
        MisconfigurationException: The script lacks an operation.
    """
    program = program.run_decompositions(default_decompositions())
    values = {**program.state_dict, **program.constants}
    weights, nodes, image = {}, [], ""
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            image = spec.arg.name
        elif (value := values[str(spec.target)]).is_floating_point():  # others count the steps of a training
            weights[spec.arg.name] = encode(value.detach(), integers)
    for node in program.graph.nodes:
        if node.op != "call_function" or not node.users:
            continue
        name = "getitem" if node.target is operator.getitem else str(node.target)
        if name not in supported or not _is_as_in_script(node):
            raise MisconfigurationException(
                f"The page's script has no operation {name} as this network uses it: no page is written. Take the MLP "
                "or CNN of the package, or export the network with --output network.onnx."
            )
        shape = [*_value(node).shape]
        nodes.append({"name": node.name, "operation": name, "shape": shape, "inputs": [*map(_plain, _inputs(node))]})
    (output,) = program.graph_signature.user_outputs
    return {"weights": weights, "nodes": nodes, "input": image, "output": output}


def _value(node: Any) -> Tensor:
    """What a node gives in the trace, the first where it gives several."""
    value: Any = node.meta["val"]
    return value if isinstance(value, Tensor) else value[0]


def _inputs(node: fx.Node) -> list[Any]:
    """All arguments in their order, with defaults."""
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return [*node.args]
    names = [(argument.name, argument.default_value) for argument in schema.arguments]
    return [*node.args, *(node.kwargs.get(name, default) for name, default in names[len(node.args) :])]


def _plain(argument: Any) -> Any:
    """An argument for JSON; what is no number, name or list of numbers, as a type, has no meaning in the script."""
    if isinstance(argument, fx.Node):
        return {"node": argument.name}
    if isinstance(argument, list | tuple):
        return [*argument]
    return argument if isinstance(argument, bool | int | float | str) else None


def _is_as_in_script(node: fx.Node) -> bool:
    """Whether an operation is used in the way that the script has."""
    inputs = _inputs(node)
    match str(node.target).removeprefix("aten.").partition(".")[0]:
        case "as_strided":  # of a vector, it changes nothing
            value = _value(inputs[0])
            return value.shape == _value(node).shape and max(value.shape) == value.numel()
        case "avg_pool2d":
            return not any(inputs[3]) and inputs[6] is None
        case "convolution":
            return len(inputs[3]) == 2 and not inputs[6]
        case "_to_copy":
            return _value(node).is_floating_point()
        case "gelu":
            return inputs[1] in ("none", "tanh")
    return node.target is not operator.getitem or inputs[1] == 0
