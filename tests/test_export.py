"""Exported networks against what ``predict`` writes; what is refused, and what it leaves."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from conftest import ROOT, in_process
from torch import nn

from mnist_lightning.export import formats

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
        "--model.network.normalization=batch", "--model.network.activation=SELU",
    ],
    "CNN": [
        "--model.network=CNN", "--model.network.channels=[4,4,4,4,4]", "--model.network.convolutions=1",
        "--model.network.normalization=layer", "--model.network.kernel_size=5", "--model.network.activation=GELU",
    ],
    "resnet18": ["--model.network=TorchvisionModel", "--trainer.limit_train_batches=1"],
}  # fmt: skip


class Branching(nn.Module):
    """Looks at its images to decide what to do: no graph can be made of it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, images):
        flat = images.flatten(1)
        return self.layer(flat if flat.sum() > 0 else -flat)


@pytest.fixture
def run(fitted, tmp_path, monkeypatch, capfd):
    """Runs ``export`` in this process beside a copy of a run; gives exit code, output and error."""
    shutil.copytree(fitted[0].parents[1], tmp_path / "lightning_logs")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: in_process(capfd, "export", *arguments)


def files():
    return sorted(path.name for path in Path().iterdir())


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_both_formats_give_what_predict_writes(quick, mnist, tmp_path, options):
    quick(tmp_path, "fit", *SHORT, *options)
    quick(tmp_path, "predict", data=False)
    expected = pd.read_csv("predictions.csv").filter(like="probability_").to_numpy()
    images = mnist.test.images[:300].numpy()
    for name in ("digit.onnx", "digit.pt2"):
        output = quick(tmp_path, "export", f"--output={name}", data=False).stdout
        assert re.search(
            rf"{name}: [\d,]+ KiB\. [\w. ]+ gives 300 test images the labels that the checkpoint gives", output
        )
    session = onnxruntime.InferenceSession("digit.onnx")
    (graph_input,) = session.get_inputs()
    assert graph_input.shape == ["batch", 1, 28, 28]
    extra = {"metadata.json": ""}
    program = torch.export.load("digit.pt2", extra_files=extra).module()
    for batch in (1, 7, 300):
        given = images[:batch].astype(np.float32) / 255
        for found in (session.run(None, {"images": given})[0], program(torch.from_numpy(given)).detach().numpy()):
            assert np.abs(found - expected[:batch]).max() < 1e-5
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == [str(digit) for digit in range(10)]
    assert json.loads(metadata["image_shape"]) == [1, 28, 28]
    assert ("inside the graph" in metadata["preprocessing"]) == ("--data.standardize=true" in options)
    assert metadata["checkpoint"] == "lightning_logs/baseline/version_0/checkpoints/last.ckpt"
    assert json.loads(extra["metadata.json"]) == metadata


def taken(run, *arguments):
    """The checkpoint that the command says it takes."""
    code, output, errors = run(*arguments, f"--output={len(files())}.pt2")
    assert code == 0, errors
    return re.search("Exporting (.*?):", output)[1]


def test_the_newest_complete_tuned_run_is_taken_before_a_baseline(run):
    baseline, tuned = Path("lightning_logs/baseline/version_0"), Path("lightning_logs/tuned/version_0")
    shutil.copytree(baseline, tuned)
    (tuned / "test.csv").unlink()  # as of one that was stopped
    named = f"--ckpt_path={tuned}/checkpoints/last.ckpt"
    takes = partial(taken, run)
    assert takes() == takes("--name=baseline") == str(baseline / "checkpoints/last.ckpt")
    assert takes(named) == str(tuned / "checkpoints/last.ckpt")
    shutil.copy(baseline / "test.csv", tuned)
    assert takes() == str(tuned / "checkpoints/last.ckpt")
    assert takes("--ckpt_path=best") == str(tuned / "checkpoints/best.ckpt")
    assert takes("--name=baseline") == str(baseline / "checkpoints/last.ckpt")


def test_what_cannot_be_done_is_said_and_nothing_is_left(run, monkeypatch):
    Path("mine.onnx").write_text("mine")
    before = files()
    for output, message in (
        ("mine.onnx", "mine.onnx exists and is not overwritten: choose another --output."),
        ("digit.h5", "digit.h5 must end in .onnx or .pt2, which says the format."),
    ):
        assert run(f"--output={output}")[::2] == (1, f"error: {message}\n")
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxscript" else name)
    code, _, errors = run()
    assert code == 1
    assert errors.startswith("error: .onnx needs onnxscript: pip install 'mnist_lightning[export]'")
    assert Path("mine.onnx").read_text() == "mine"
    assert files() == before


@pytest.mark.parametrize("change", [lambda p: p + 2e-5, lambda p: p.flip(1), lambda p: p * float("nan")])
def test_a_file_that_fails_its_check_is_not_left(run, monkeypatch, change):
    before = files()
    read = formats.FORMATS[".pt2"].read
    monkeypatch.setattr(formats.FORMATS[".pt2"], "read", lambda path: lambda images: change(read(path)(images)))
    code, _, errors = run("--output=digit.pt2")
    assert code == 1
    assert re.match(r"error: Nothing is written: torch.export.load on the exported network gives \d+ of 300", errors)
    assert files() == before


def test_a_network_without_a_graph_is_refused(run, quick, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    quick(tmp_path, "fit", *SHORT, "--name=branching", "--model.network=test_export.Branching")
    code, _, errors = run("--name=branching", "--output=digit.pt2")
    assert code == 1
    assert errors.startswith("error: Branching cannot be exported: torch.export says ")
    assert len(errors.splitlines()) <= 2
    assert not Path("digit.pt2").exists()
