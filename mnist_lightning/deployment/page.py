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

from mnist_lightning.data import ImageDataModule
from mnist_lightning.deployment import formats
from mnist_lightning.system.errors import UserError

LIMIT = 2 * 2**20
"""Bytes of a page that anyone can mail."""
WEIGHT_ROOM = LIMIT - 60 * 2**10
"""Bytes of it for the networks; the script takes 20,000."""
TOLERANCE = 9e-5
"""How far rounded weights may move a probability; with the browser's own rounding it is below 1e-4."""
PAD = 280
"""Width of the picture that is drawn."""


class PadModel(NamedTuple):
    """A network that says what is drawn.

    Attributes:
        name: Of the model.
        color: Of its bars, in CSS.
        network: In evaluation mode.
        data: Has been set up to test.
    """

    name: str
    color: str
    network: nn.Module
    data: ImageDataModule


def panel(models: Sequence[PadModel], classes: Sequence[str]) -> tuple[Markup, dict[str, str]]:
    """A pad to draw on, with a bar for each class and network: a fragment of a page, with its script and style.

    Weights are float32. Where those are too many for the page, they are 16-bit integers times a number for each row,
    finer than float16 for all but the smallest, if the labels of the test images stay what they are.

    Args:
        models: Networks for the same images.
        classes: Names of their outputs.

    Returns:
        The fragment, empty if no network can be on it; and what is to be said of each network, by its name: nothing,
        how its weights are rounded, or why it is not on the page.
    """
    parts = {suffix: Path(__file__).with_name(f"draw.{suffix}").read_text("utf-8") for suffix in ("js", "css", "html")}
    supported, on_page, said = set(OPERATION.findall(parts["js"])), {}, {}
    for integers in (False, True):
        for model in models:
            try:
                on_page[model.name], said[model.name] = _network(model, len(classes), supported, integers)
            except UserError as error:
                on_page.pop(model.name, None)
                said[model.name] = str(error)
        if sum(map(len, on_page.values())) < WEIGHT_ROOM:
            break
    while sum(map(len, on_page.values())) >= WEIGHT_ROOM:
        largest = max(on_page, key=lambda name: len(on_page[name]))
        said[largest] = f"its weights do not fit into the page, which has {WEIGHT_ROOM / 2**20:.1f} MiB for all."
        del on_page[largest]
    if not on_page:
        return Markup(), said
    data = models[0].data
    assert data.test is not None
    _, height, width = data.image_shape
    content = {
        "shape": data.image_shape,
        "classes": classes,
        "placing": data.placing and data.placing._asdict(),
        "inverted": data.test.scaled(range(min(1000, len(data.test)))).mean().item() > 0.5,
    }
    fragment = jinja2.Template(parts["html"], autoescape=True, undefined=jinja2.StrictUndefined).render(
        models=[model for model in models if model.name in on_page],
        classes=classes,
        shape=content["shape"],
        width=PAD,
        height=round(PAD * height / width),
        content=Markup(f'{htmlsafe_json_dumps(content)[:-1]}, "networks": [{", ".join(on_page.values())}]}}'),  # noqa: S704
        style=Markup(parts["css"]),  # noqa: S704
        script=Markup(parts["js"]),  # noqa: S704
    )
    return Markup(fragment), said  # noqa: S704


def _network(model: PadModel, outputs: int, supported: set[str], integers: bool) -> tuple[str, str]:
    """A network as JSON, with three images that the page computes to check itself, and how it has the weights."""
    network, data, said = model.network, model.data, ""
    assert data.test is not None
    channels = data.image_shape[0]
    if (count := sum(value.numel() for value in network.parameters())) > WEIGHT_ROOM * 3 / 8:  # in 16 bits and base64
        raise UserError(f"a page has room for {WEIGHT_ROOM * 3 // 8:,} weights, and it has {count:,}.")
    if channels != 1:
        raise UserError(f"one draws in grey, but the images of {data.source} have {channels} channels.")
    if integers:
        network = rounded(network)
        expected, found = (
            formats.predict(formats.ExportedNetwork(one, data.test.statistics), data)
            for one in (model.network, network)
        )
        difference = formats.compare(expected, found, "a page with weights in 16 bits", TOLERANCE)
        said = f"weights in 16 bits, by which the probabilities of the test images change by at most {difference:.1e}."
    samples = data.test.scaled(range(min(3, len(data.test))))
    probabilities = formats.ExportedNetwork(model.network, data.test.statistics)(samples)
    if probabilities.shape[1] != outputs:
        raise UserError(f"it has {probabilities.shape[1]} outputs, and the page {outputs} bars.")
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
    """Make a page of its own.

    Args:
        network: In evaluation mode.
        data: Has been set up to test.
        probabilities: Of the test images, of shape (n, classes).

    Returns:
        The page, and how it has the weights.

    Raises:
        UserError: If the images are in colour, the script lacks an operation of the network, or it has too
            many weights.
    """
    name, count = type(network).__name__, sum(value.numel() for value in network.parameters())
    classes = data.names(probabilities.shape[1])
    fragment, said = panel([PadModel(name, "var(--accent)", network, data)], classes)
    if not fragment:
        raise UserError(
            f"No page is written for this {name} of {count:,} weights: {said[name]} Take the MLP or CNN of the "
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
    return template.render(title=title, text=text, panel=fragment), said[name] or "weights in float32."


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
        UserError: If the script lacks an operation.
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
            raise UserError(f"the page's script has no operation {name} as it is used there.")
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
