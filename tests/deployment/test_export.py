"""Exported networks against what ``predict`` writes; what is refused, and what it leaves."""

import itertools
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from helpers.browser import DARK, as_bytes, audit, in_browser
from helpers.commands import ROOT, ROUNDING, in_process
from PIL import Image, ImageDraw
from torch import nn

from mnist_lightning.__main__ import main
from mnist_lightning.classifier import Classifier
from mnist_lightning.data import ImageDataModule
from mnist_lightning.deployment import formats
from mnist_lightning.deployment import page as page_module
from mnist_lightning.system.errors import UserError

SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=3")
NETWORKS = {
    **{path.stem: [f"--config={path}"] for path in sorted((ROOT / "tests/conf").glob("*.yaml"))},
    "MLP": [
        "--model.network=MLP", "--model.network.units=[8]", "--model.network.dropout=0.1", "--model.network.l2=0",
        "--model.network.normalization=layer", "--model.network.activation=Mish", "--model.network.input_dropout=0.1",
        "--data.standardize=true",
    ],
    "batch": [
        "--model.network=MLP", "--model.network.units=[8]", "--model.network.dropout=0.1", "--model.network.l2=0",
        "--model.network.normalization=batch", "--model.network.activation=RReLU",
    ],
    "CNN": [
        "--model.network=CNN", "--model.network.channels=[4,4,4,4,4]", "--model.network.convolutions=1",
        "--model.network.normalization=layer", "--model.network.kernel_size=5", "--model.network.activation=GELU",
    ],
    "resnet18": ["--model.network=TorchvisionModel", "--trainer.limit_train_batches=1"],
}  # fmt: skip


CLASSIFY = """
    const images = Float32Array.from(bytes, (value) => value / 255);
    found.probabilities = [];
    for (let i = 0; i < images.length; i += 784)
        found.probabilities.push([...(await networks[0].classify(images.slice(i, i + 784)))]);
    found.wrong = !document.getElementById("wrong").hidden;
"""


class Branching(nn.Module):
    """A network that branches on its images, so it does not have a graph."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, images):
        flat = images.flatten(1)
        return self.layer(flat if flat.sum() > 0 else -flat)


@pytest.fixture
def run(fitted, tmp_path, monkeypatch, capfd):
    """Run ``export`` in this process next to a copy of a run; return exit code, output and error."""
    shutil.copytree(fitted[0].parents[1], tmp_path / "lightning_logs")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: in_process(capfd, "export", *arguments)


def files():
    return sorted(path.name for path in Path().iterdir())


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_both_formats_give_what_predict_writes(quick, mnist, tmp_path, options):
    quick(tmp_path, "fit", *SHORT, *options)
    quick(tmp_path, "predict", data=False)
    expected = pd.read_csv("predictions.csv").filter(like="probability_").to_numpy()
    images = mnist.test.images[:300].numpy()
    for name in ("digit.onnx", "digit.pt2"):
        output = quick(tmp_path, "export", f"--output={name}", data=False).stdout
        assert re.search(rf"{name}: [\d,]+ KiB\. [\w. ]+ gives all 300 test images the checkpoint's labels", output)
    session = onnxruntime.InferenceSession("digit.onnx")
    (graph_input,) = session.get_inputs()
    assert graph_input.shape == ["batch", 1, 28, 28]
    extra = {"metadata.json": ""}
    program = torch.export.load("digit.pt2", extra_files=extra).module()
    for batch in (1, 7, 300):
        given = images[:batch].astype(np.float32) / 255
        for found in (session.run(None, {"images": given})[0], program(torch.from_numpy(given)).detach().numpy()):
            assert np.abs(found - expected[:batch]).max() < ROUNDING
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata["image_shape"]) == [1, 28, 28]
    assert ("inside the graph" in metadata["preprocessing"]) == ("--data.standardize=true" in options)
    assert metadata["checkpoint"] == "lightning_logs/baseline/version_0/checkpoints/last.ckpt"
    assert json.loads(extra["metadata.json"]) == metadata
    if options != NETWORKS["resnet18"]:
        output = quick(tmp_path, "export", "--page=digit.html", data=False).stdout
        assert re.search(r"digit.html: \d+ KiB, weights in float32", output)
        page = Path("digit.html").read_text(encoding="utf-8")
        assert len(page) < 2**21
        found = in_browser(page, as_bytes(images[:200]) + CLASSIFY)
        assert np.abs(np.array(found["probabilities"]) - expected[:200]).max() < 1e-4
        assert np.argmax(found["probabilities"], axis=1).tolist() == expected[:200].argmax(axis=1).tolist()
        assert not found["wrong"]


def taken(run, *arguments):
    """Return the checkpoint that the command says it exports."""
    code, output, errors = run(*arguments, f"--output={len(files())}.pt2")
    assert code == 0, errors
    return re.search("Exporting (.*?):", output)[1]


@pytest.mark.slow
def test_the_newest_complete_tuned_run_is_taken_before_a_baseline(run):
    baseline, tuned = Path("lightning_logs/baseline/version_0"), Path("lightning_logs/tuned/version_0")
    shutil.copytree(baseline, tuned)
    (tuned / "test.csv").unlink()  # like a run that was stopped
    named = f"--ckpt_path={tuned}/checkpoints/last.ckpt"
    takes = partial(taken, run)
    assert takes() == takes("--name=baseline") == str(baseline / "checkpoints/last.ckpt")
    assert takes(named) == str(tuned / "checkpoints/last.ckpt")
    shutil.copy(baseline / "test.csv", tuned)
    assert takes() == str(tuned / "checkpoints/last.ckpt")
    assert takes("--ckpt_path=best") == str(tuned / "checkpoints/best.ckpt")
    assert takes("--name=baseline") == str(baseline / "checkpoints/last.ckpt")


def test_what_cannot_be_done_is_said_and_nothing_is_left(run, monkeypatch):
    Path("mine.onnx").write_text("mine", encoding="utf-8")
    before = files()
    for output, message in (
        ("mine.onnx", "mine.onnx exists and is not overwritten: choose another --output."),
        ("digit.h5", "digit.h5 must end in .onnx or .pt2: the suffix selects the format."),
    ):
        assert run(f"--output={output}")[::2] == (1, f"error: {message}\n")
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxscript" else name)
    code, _, errors = run()
    assert code == 1
    assert errors.startswith("error: .onnx needs onnxscript: pip install 'mnist_lightning[export]'")
    assert Path("mine.onnx").read_text(encoding="utf-8") == "mine"
    assert files() == before


def test_what_onnx_cannot_have_is_named(run, monkeypatch):
    before = files()

    def fail(*_, **__):
        raise RuntimeError("page of text") from ValueError("No ONNX function found for aten.x.\nSee the stack trace")

    monkeypatch.setattr(torch.onnx, "export", fail)
    code, _, errors = run("--output=digit.onnx")
    message = "error: ONNX does not support this network: No ONNX function found for aten.x. Use a .pt2 file.\n"
    assert (code, errors.endswith(message)) == (1, True)
    assert files() == before


@pytest.mark.parametrize("change", [lambda p: p + 2e-5, lambda p: p.flip(1), lambda p: p * float("nan")])
def test_a_file_that_fails_its_check_is_not_left(run, monkeypatch, change):
    before = files()
    read = formats.FORMATS[".pt2"].read
    monkeypatch.setattr(formats.FORMATS[".pt2"], "read", lambda path: lambda images: change(read(path)(images)))
    code, _, errors = run("--output=digit.pt2")
    assert code == 1
    assert re.match(r"error: Nothing is written: torch.export.load gives \d+ of 300", errors)
    assert files() == before


def test_a_network_without_a_graph_is_refused(run, quick, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    quick(tmp_path, "fit", *SHORT, "--name=branching", "--model.network=test_export.Branching")
    code, _, errors = run("--name=branching", "--output=digit.pt2")
    assert code == 1
    assert errors.startswith("error: Branching cannot be exported: torch.export says ")
    assert len(errors.splitlines()) <= 2
    assert not Path("digit.pt2").exists()


# --- the page to draw on ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(fitted, tmp_path_factory):
    """The page of an MLP."""
    path = tmp_path_factory.mktemp("page") / "digit.html"
    main(["export", f"--ckpt_path={fitted[0]}/checkpoints/last.ckpt", f"--page={path}"])
    assert [file.name for file in path.parent.iterdir()] == ["digit.html"]  # but no network.onnx
    return path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "flags"), [(390, []), (390, [DARK]), (1280, []), (1280, [DARK])])
def test_a_stroke_changes_the_bars(page, width, flags):
    found = in_browser(
        page,
        audit()
        + """
        const state = () => ({ said: document.getElementById("said").textContent.trim(),
            bars: all_("#bars output").map((output) => parseFloat(output.textContent)),
            widths: all_("#bars i").map((bar) => parseFloat(bar.style.width)) });
        const box = pad.getBoundingClientRect();
        const touch = (target, name, x, y) => target.dispatchEvent(new PointerEvent(`pointer${name}`, { bubbles: true,
            pointerId: 5, pointerType: "touch",
            clientX: box.left + x * box.width, clientY: box.top + y * box.height }));
        const stroke = (points) => {
            touch(pad, "down", ...points[0]);
            for (const point of points) touch(window, "move", ...point);
            touch(window, "up", ...points.at(-1));
        };
        found.blank = state();
        touch(window, "move", 0.1, 0.1);
        stroke([[0.55, 0.15], [0.5, 0.5], [0.45, 0.85]]);
        await wait();
        found.one = state();
        found.ink = [...seen.getContext("2d").getImageData(0, 0, 28, 28).data].filter((_, i) => i % 4 === 0);
        stroke([[0.2, 0.15], [0.55, 0.15]]);
        await wait();
        found.seven = state();
        document.getElementById("undo").click();
        await wait();
        found.undone = state();
        stroke([[0.8, 0.2], [0.75, 0.8]]);
        await wait();
        found.eleven = state();
        document.getElementById("clear").click();
        await wait();
        found.cleared = state();
        found.wrong = !document.getElementById("wrong").hidden;
        found.wide = document.documentElement.scrollWidth > innerWidth;
        pad.focus();
        for (const key of [" ", "ArrowDown", "ArrowDown", " ", "ArrowUp"])
            pad.dispatchEvent(new KeyboardEvent("keydown", { key }));
        await wait();
        found.keys = strokes;
        found.problems = await audit();
        """,
        width,
        *flags,
    )
    assert found["problems"] == []
    assert found["keys"] == [[[140, 56], [140, 66], [140, 76]]]
    assert found["blank"] == found["cleared"]
    assert found["blank"] == {"said": "nothing drawn yet", "bars": [None] * 10, "widths": [0] * 10}
    assert found["one"] == found["undone"]
    for state in (found["one"], found["seven"]):
        assert sum(state["widths"]) == pytest.approx(100, abs=0.01)
        assert state["bars"] == pytest.approx(state["widths"], abs=0.051)
        best = np.argmax(state["widths"])
        doubt = ", unsure" if state["widths"][best] < 80 else ""
        assert state["said"] == f"{best}, {state['bars'][best]:.1f} %{doubt}"
    assert found["one"]["said"].startswith("1,")
    assert found["eleven"]["said"].endswith("%, but these seem to be 2 characters")
    assert max(abs(a - b) for a, b in zip(found["one"]["bars"], found["seven"]["bars"], strict=True)) > 1
    ink = np.array(found["ink"]).reshape(28, 28)
    assert len(np.flatnonzero(ink.any(axis=1))) == 20
    for axis in (0, 1):
        assert 13.9 < (ink.sum(axis=1 - axis) * (np.arange(28) + 0.5)).sum() / ink.sum() < 15.1


@pytest.mark.slow
def test_a_drawing_becomes_what_mnist_would_have_made_of_it(page, mnist):
    """Check that enlarged MNIST digits anywhere on the pad are cropped, scaled and centered to the original images."""
    images = mnist.test.images[:1000, 0].numpy()
    drawn = np.zeros((1000, 75, 80), np.uint8)
    for image, target in zip(images, drawn, strict=True):
        rows, columns = (np.flatnonzero(image.any(axis=axis)) for axis in (1, 0))
        large = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].repeat(3, axis=0).repeat(3, axis=1)
        target[: len(large), 10 : 10 + large.shape[1]] = large
    found = in_browser(
        page,
        as_bytes(drawn)
        + """
        const size = 75 * 80, grey = Float32Array.from(bytes, (value) => value / 255);
        found.images = Array.from({ length: 1000 }, (_, i) =>
            [...prepare({ width: 80, height: 75, grey: grey.slice(size * i, size * (i + 1)) })]);
        found.empty = prepare({ width: 80, height: 75, grey: new Float32Array(size) });
        """,
    )
    assert found["empty"] is None
    differences = np.abs(np.array(found["images"]) - images.reshape(1000, -1) / 255).max(axis=1)
    assert (differences < 1e-6).mean() > 0.9  # in a few MNIST images, the longer side is not 20 pixels


@pytest.mark.slow
def test_a_drawing_of_any_size_becomes_the_same_image_as_a_picture_of_it_with_any_pen(page, mnist):
    """Check drawings of 20 to 240 pixels on the pad, and pictures of them with lines from 1/100 to 1/12 as wide."""
    generator = np.random.default_rng(0)
    drawings, pictures = [], []
    for _ in range(100):
        # up to three curves, each through four random points, which Bernstein polynomials join
        t = np.linspace(0, 1, 40)[:, None]
        curves = [
            sum(math.comb(3, k) * t**k * (1 - t) ** (3 - k) * generator.uniform(0, 1, 2) for k in range(4))
            for _ in range(generator.integers(1, 4))
        ]
        low, high = np.concatenate(curves).min(axis=0), np.concatenate(curves).max(axis=0)
        side = generator.uniform(20, 240)  # of the pad's 280 pixels
        curves = [(curve - low) / (high - low).max() for curve in curves]
        drawings.append([(20 + side * curve).tolist() for curve in curves])
        picture, pen = Image.new("L", (240, 240), 255), generator.uniform(2, 16)
        draw = ImageDraw.Draw(picture)
        for curve in curves:
            points = [tuple(point) for point in (20 + 200 * curve).tolist()]
            draw.line(points, fill=0, width=round(pen), joint="curve")
            for x, y in points:
                draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=0)
        pictures.append(mnist.from_picture(picture)[0, 0])
    found = in_browser(
        page,
        f"found.images = {json.dumps(drawings)}.map((strokes) => [...prepare(character(strokes))]);",
    )
    alike = [
        max(  # rounding the center of mass may shift an image by a pixel
            np.corrcoef(np.roll(theirs, shift, (0, 1)).ravel(), ours)[0, 1]
            for shift in itertools.product((-1, 0, 1), repeat=2)
        )
        for ours, theirs in zip(found["images"], pictures, strict=True)
    ]
    # the pad's pen has the median width, but thinner and wider pens of pictures get the nearest usual width
    assert min(alike) > 0.8
    assert np.median(alike) > 0.94


@pytest.mark.slow
def test_a_browser_that_computes_something_else_says_so(page):
    other = page.replace('"aten.relu.default": each((x) => Math.max(x, 0))', '"aten.relu.default": each(Math.abs)')
    assert other != page
    assert in_browser(other, "found.hidden = document.getElementById('wrong').hidden;") == {"hidden": False}


@pytest.mark.slow
def test_a_large_network_has_weights_in_16_bits_or_no_page(run, monkeypatch, mnist):
    assert run("--page=large.html")[0] == 0
    size = Path("large.html").stat().st_size
    monkeypatch.setattr(page_module, "WEIGHT_ROOM", size - 100_000)
    code, output, errors = run("--page=small.html")
    assert code == 0, errors
    assert re.search(r"weights in 16 bits, which change the probabilities of the test images by at most \d", output)
    text = Path("small.html").read_text(encoding="utf-8")
    assert len(text) < 0.6 * size
    found = in_browser(text, as_bytes(mnist.test.images[:200].numpy()) + CLASSIFY)
    checkpoint = "lightning_logs/baseline/version_0/checkpoints/last.ckpt"
    with torch.no_grad():
        classifier = Classifier.load_from_checkpoint(checkpoint, weights_only=True).eval()
        expected = classifier(mnist.test.scaled(torch.arange(200))).softmax(dim=1).numpy()
    assert np.abs(np.array(found["probabilities"]) - expected).max() < 1e-4
    assert not found["wrong"]
    monkeypatch.setattr(page_module, "WEIGHT_ROOM", 100_000)
    code, _, errors = run("--page=none.html")
    assert code == 1
    assert errors.startswith("error: No page is written for this MLP of 109,386 weights: a page has room for 37,500 w")
    assert not Path("none.html").exists()


class Activations(nn.Module):
    """A layer with each of torch's activations that the MLP can have, in parallel."""

    def __init__(self):
        super().__init__()
        without = {"GLU", "MultiheadAttention", "Softmax2d", "Threshold"}
        names = sorted({*nn.modules.activation.__all__} - without)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(784, 4), getattr(nn, name)()) for name in names)
        self.gelu = nn.GELU("tanh")
        self.scales = nn.ModuleList(nn.Linear(4, 10) for _ in names)

    def forward(self, images):
        values = sum(
            scale(branch(2 * images.flatten(1))) for scale, branch in zip(self.scales, self.branches, strict=True)
        )
        return self.gelu(values) + values


@pytest.mark.slow
def test_the_page_has_every_activation(mnist):
    torch.manual_seed(0)
    network = Activations().eval()
    expected = formats.predict(formats.ExportedNetwork(network, None), mnist)
    text, _ = page_module.write_page(network, mnist, expected)
    found = in_browser(text, as_bytes(mnist.test.images[:200].numpy()) + CLASSIFY)
    assert expected[:200].std(dim=0).max() > 0.05
    assert np.abs(np.array(found["probabilities"]) - expected[:200].numpy()).max() < ROUNDING
    assert not found["wrong"]


class Cosine(nn.Module):
    """An operation that the page does not have, and few networks have."""

    def forward(self, values):
        return values.cos()


class Squares(ImageDataModule):
    """Dark images on a light background."""

    def __init__(self, channels=1):
        super().__init__()
        self.channels = channels

    def load(self, split):
        generator = torch.Generator().manual_seed(1)
        return 1 - torch.rand(40, self.channels, 12, 13, generator=generator) / 3, torch.arange(40) % 10


@pytest.mark.parametrize(
    ("channels", "activation", "message"),
    [(3, nn.ReLU(), "the images of Squares have 3 channels"), (1, Cosine(), "does not have the operation aten.cos")],
)
def test_a_page_that_cannot_be_made_is_refused(channels, activation, message):
    data = Squares(channels)
    data.setup("test")
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * 12 * 13, 10), activation).eval()
    with pytest.raises(UserError, match=message):
        page_module.write_page(network, data, torch.zeros(40, 10))


@pytest.mark.slow
def test_networks_that_cannot_be_on_a_page_are_named_and_names_are_not_code():
    data = Squares()
    data.setup("test")
    classes = ["</script><script>throw 1</script>", *"bcdefghij"]

    def network(outputs, *others):
        return nn.Sequential(nn.Flatten(), nn.Linear(156, outputs), *others).eval()

    candidates = {"good": network(10), "wide": network(12), "cosine": network(10, Cosine())}
    fragment, rounding, left_out = page_module.panel(
        [page_module.PadModel(name, "red", one, data) for name, one in candidates.items()], classes
    )
    assert rounding == {"good": ""}
    assert left_out == {
        "wide": "it has 12 outputs, but the page has 10 bars.",
        "cosine": "the page's script does not have the operation aten.cos.default in this form.",
    }
    script = "found.name = classes[0]; found.networks = networks.map(({ name }) => name);"
    found = in_browser(f"<html><head></head><body>{fragment}</body></html>", script)
    assert found == {"name": classes[0], "networks": ["good"]}


@pytest.mark.slow
def test_a_page_for_images_of_another_size_scales_the_drawing():
    data = Squares()
    data.setup("test")
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=(2, 1), padding=(2, 1), dilation=(2, 1)), nn.AvgPool2d(2), nn.PReLU(4),
        nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip
    expected = formats.predict(formats.ExportedNetwork(network.eval(), None), data)
    text, _ = page_module.write_page(network, data, expected)
    found = in_browser(
        text,
        """
        found.placing = placing; found.inverted = inverted;
        found.pad = [pad.width, pad.height];
        const grey = new Float32Array(280 * 258);
        grey[0] = 1;
        const image = prepare({ width: 280, height: 258, grey });
        found.at = image.findIndex((value) => value > 0); found.sum = image.reduce((a, b) => a + b);
        found.wrong = !document.getElementById("wrong").hidden;
        """,
    )
    assert found.pop("sum") == pytest.approx(12 * 13 / 280 / 258)
    assert found == {"placing": None, "inverted": True, "pad": [280, 258], "at": 0, "wrong": False}
