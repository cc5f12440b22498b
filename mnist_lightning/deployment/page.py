"""A page to draw on: the network's graph and weights as JSON, and the script that runs it."""

import base64
import copy
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from torch import Tensor, fx, nn
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind

from mnist_lightning.data import DOUBTFUL, ImageDataModule
from mnist_lightning.deployment import formats
from mnist_lightning.system.errors import UserError

LIMIT = 2 * 2**20
"""The most bytes of a page, which is still easy to mail."""
WEIGHT_ROOM = LIMIT - 60 * 2**10
"""Bytes of the page for the networks; the script takes 20,000."""
TOLERANCE = 9e-5
"""How far rounded weights may move a probability; the browser's own rounding keeps the total below 1e-4."""
PAD = 280
"""The width of the drawing in pixels."""


class PadModel(NamedTuple):
    """A network that classifies the drawing.

    Attributes:
        name: Name of the model.
        color: Color of its bars, in CSS.
        network: The network, in evaluation mode.
        data: The data module, set up for testing.
    """

    name: str
    color: str
    network: nn.Module
    data: ImageDataModule


def panel(
    models: Sequence[PadModel], classes: Sequence[str], room: int | None = None
) -> tuple[Markup, dict[str, str], dict[str, str]]:
    """Return a page fragment with a pad to draw on, a bar for each class and network, and the script.

    Weights are float32. If they do not fit, they become 16-bit integers times a number for each row, finer than float16
    for all but the smallest, provided that no test image changes its label. The page needs ``draw.css``.

    Args:
        models: Networks for the same images.
        classes: Names of the outputs.
        room: Bytes for the weights; those that fit only in 16 bits are rounded. By default all that the page has.

    Returns:
        The fragment, empty if the page can have none of the networks; by name, how the weights of each network on the
        page are rounded, or an empty text; and, by name, why each other network is not on the page.
    """
    parts = {suffix: Path(__file__).with_name(f"draw.{suffix}").read_text("utf-8") for suffix in ("js", "html")}
    supported = set(OPERATION.findall(parts["js"]))
    on_page: dict[str, str] = {}
    rounding: dict[str, str] = {}
    left_out: dict[str, str] = {}
    size = sum(value.numel() for model in models for value in model.network.parameters()) * 16 / 3  # float32 in base64
    for integers in (True, False) if room and room < size < 2 * room else (False, True):
        on_page, rounding, left_out = {}, {}, {}
        for model in models:
            try:
                on_page[model.name], rounding[model.name] = _network(model, len(classes), supported, integers)
            except UserError as error:
                left_out[model.name] = str(error)
        if sum(map(len, on_page.values())) < WEIGHT_ROOM and (not integers or len(on_page) == len(models)):
            break
    while sum(map(len, on_page.values())) >= WEIGHT_ROOM:
        largest = max(on_page, key=lambda name: len(on_page[name]))
        left_out[largest] = f"its weights do not fit into the page, which has {WEIGHT_ROOM / 2**20:.1f} MiB for all."
        del on_page[largest]
    if not on_page:
        return Markup(), rounding, left_out
    data = models[0].data
    assert data.test is not None
    _, height, width = data.image_shape
    content = {
        "shape": data.image_shape,
        "classes": classes,
        "placing": data.placing and data.placing._asdict() | {"stroke": data.strokes and data.strokes.median},
        "doubtful": DOUBTFUL,
        "inverted": data.test.scaled(range(min(1000, len(data.test)))).mean().item() > 0.5,
    }
    fragment = jinja2.Template(parts["html"], autoescape=True, undefined=jinja2.StrictUndefined).render(
        models=[model for model in models if model.name in on_page],
        classes=classes,
        shape=content["shape"],
        width=PAD,
        height=round(PAD * height / width),
        content=Markup(f'{htmlsafe_json_dumps(content)[:-1]}, "networks": [{", ".join(on_page.values())}]}}'),  # noqa: S704
        script=Markup(parts["js"]),  # noqa: S704
    )
    return Markup(fragment), rounding, left_out  # noqa: S704


def _network(model: PadModel, outputs: int, supported: set[str], integers: bool) -> tuple[str, str]:
    """Return a network as JSON, with three images for the page's self-test, and a remark on its weights."""
    network, data, said = model.network, model.data, ""
    assert data.test is not None
    channels = data.image_shape[0]
    if (count := sum(value.numel() for value in network.parameters())) > WEIGHT_ROOM * 3 / 8:  # in 16 bits and base64
        raise UserError(f"a page has room for {WEIGHT_ROOM * 3 // 8:,} weights, the network has {count:,}.")
    if channels != 1:
        raise UserError(f"the pad draws in gray, but the images of {data.source} have {channels} channels.")
    if integers:
        network = rounded(network)
        expected, found = (
            formats.predict(formats.ExportedNetwork(one, data.test.statistics), data)
            for one in (model.network, network)
        )
        what = "its weights do not fit in 32 bits, and in 16 bits the network"
        difference = formats.compare(expected, found, what, TOLERANCE)
        said = f"weights in 16 bits, which change the probabilities of the test images by at most {difference:.1e}."
    samples = data.test.scaled(range(min(3, len(data.test))))
    probabilities = formats.ExportedNetwork(model.network, data.test.statistics)(samples)
    if probabilities.shape[1] != outputs:
        raise UserError(f"it has {probabilities.shape[1]} outputs, but the page has {outputs} bars.")
    if not probabilities.isfinite().all():
        raise UserError("it has diverged.")
    content = graph(formats.exported(network, data, batch=1), supported, integers) | {
        "name": model.name,
        "samples": [
            {"image": encode(image), "probabilities": values.tolist()}
            for image, values in zip(samples, probabilities, strict=True)
        ],
    }
    return str(htmlsafe_json_dumps(content)), said


def write_page(network: nn.Module, data: ImageDataModule, probabilities: Tensor) -> tuple[str, str]:
    """Return a complete page for one network.

    Args:
        network: The network, in evaluation mode.
        data: The data module, set up for testing.
        probabilities: Probabilities of the test images, of shape (n, classes).

    Returns:
        The page, and a remark on the precision of its weights.

    Raises:
        UserError: If the images are in color, the script lacks an operation of the network, or the network has too
            many weights.
    """
    name, count = type(network).__name__, sum(value.numel() for value in network.parameters())
    classes = data.names(probabilities.shape[1])
    fragment, rounding, left_out = panel([PadModel(name, "var(--accent)", network, data)], classes)
    if not fragment:
        raise UserError(
            f"No page is written for this {name} of {count:,} weights: {left_out[name]} Use the MLP or CNN of the "
            "package, or export the network with --output network.onnx."
        )
    assert data.test is not None
    accuracy = (probabilities.argmax(dim=1) == data.test.labels).float().mean().item()
    template = jinja2.Template(
        Path(__file__).with_name("page.html").read_text("utf-8"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    text = (
        f"The network of {count:,} weights runs in this page; it gets {100 * accuracy:.2f} % of the "
        f"{len(data.test):,} test images of {type(data).__name__.removesuffix('DataModule')} right."
    )
    title = "Draw a digit" if classes == [str(digit) for digit in range(10)] else "Draw"
    style = Markup(Path(__file__).with_name("draw.css").read_text("utf-8"))  # noqa: S704
    return template.render(title=title, text=text, panel=fragment, style=style), rounding[name] or "weights in float32."


OPERATION = re.compile(r'^  "([\w.]+)":', re.MULTILINE)
"""The names of the script's operations."""


def rounded(network: nn.Module) -> nn.Module:
    """Return a copy whose kernels are 16-bit multiples of one number per row.

    Vectors (norms and biases) are not rounded: they take little room, and rounding them would cost the most.
    """
    network = copy.deepcopy(network)
    for values in network.state_dict().values():
        if values.dim() > 1:
            values.copy_((values / units(values)).round() * units(values))
    return network


def units(values: Tensor) -> Tensor:
    """Return the unit of each row, of shape (n, 1, ...): its values become up to 32,767 times the unit."""
    largest = values.flatten(1).abs().amax(dim=1)
    return (largest / 32767).clamp(min=1e-30).view(-1, *[1] * (values.dim() - 1))


def encode(values: Tensor, integers: bool = False) -> dict[str, Any]:
    """Encode a tensor for the script: as float32, or as 16-bit integers and their units."""
    has_units = integers and values.dim() > 1
    stored = (values / units(values)).round().numpy().astype("<i2") if has_units else values.numpy().astype("<f4")
    return {
        "shape": [*values.shape],
        "base64": base64.b64encode(stored.tobytes()).decode(),
        "units": units(values).flatten().tolist() if has_units else None,
    }


def graph(program: ExportedProgram, supported: set[str], integers: bool) -> dict[str, Any]:
    """Return the program that the script runs, for one image.

    Args:
        program: The graph of the network.
        supported: Names of the script's operations.
        integers: Whether kernels are stored in 16 bits.

    Returns:
        ``weights`` by name, ``nodes`` in order, and the names ``input`` and ``output``.

    Raises:
        UserError: If the script lacks an operation.
    """
    program = program.run_decompositions(default_decompositions())
    values = {**program.state_dict, **program.constants}
    weights, nodes, image = {}, [], ""
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            image = spec.arg.name
        elif (value := values[str(spec.target)]).is_floating_point():  # the others count training steps
            weights[spec.arg.name] = encode(value.detach(), integers)
    for node in program.graph.nodes:
        if node.op != "call_function" or not node.users:
            continue
        name = "getitem" if node.target is operator.getitem else str(node.target)
        if name not in supported or not _is_as_in_script(node):
            raise UserError(f"the page's script does not have the operation {name} in this form.")
        shape = [*_value(node).shape]
        nodes.append({"name": node.name, "operation": name, "shape": shape, "inputs": [*map(_plain, _inputs(node))]})
    (output,) = program.graph_signature.user_outputs
    return {"weights": weights, "nodes": nodes, "input": image, "output": output}


def _value(node: Any) -> Tensor:
    """Return the value of a node in the trace, the first if it has several."""
    value: Any = node.meta["val"]
    return value if isinstance(value, Tensor) else value[0]


def _inputs(node: fx.Node) -> list[Any]:
    """Return all arguments in order, with defaults."""
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return [*node.args]
    names = [(argument.name, argument.default_value) for argument in schema.arguments]
    return [*node.args, *(node.kwargs.get(name, default) for name, default in names[len(node.args) :])]


def _plain(argument: Any) -> Any:
    """Convert an argument for JSON; the script ignores all but numbers, names and lists, so the others become None."""
    if isinstance(argument, fx.Node):
        return {"node": argument.name}
    if isinstance(argument, list | tuple):
        return [*argument]
    return argument if isinstance(argument, bool | int | float | str) else None


def _is_as_in_script(node: fx.Node) -> bool:
    """Return whether the script implements an operation in the form in which the graph uses it."""
    inputs = _inputs(node)
    match str(node.target).removeprefix("aten.").partition(".")[0]:
        case "as_strided":  # does not change a vector
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
