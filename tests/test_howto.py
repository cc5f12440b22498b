"""The commands of docs/howto.md work, as far as this machine has what they need."""

import importlib.util
import io
import re
import shlex
import shutil
from contextlib import chdir, redirect_stdout

import pytest
import torch
from helpers.commands import ROOT, in_process
from PIL import Image

from mnist_lightning.__main__ import main

ANSWERS = re.findall(r"^### … (.+)\n\n((?:    .+\n)+)", (ROOT / "docs/howto.md").read_text("utf-8"), re.MULTILINE)
SHORT = ("--trainer.max_epochs=1", *(f"--trainer.limit_{part}_batches=1" for part in ("train", "val", "test")))
SINGLE = ("--n_trials=1", "--executions_per_trial=1", "--workers=1", "--refit=false")
NEEDED = {
    "--trainer.accelerator gpu": torch.cuda.device_count() > 1,
    "sbatch": False,
    "WandbLogger": importlib.util.find_spec("wandb"),
    "MLFlowLogger": importlib.util.find_spec("mlflow"),
    ".onnx": importlib.util.find_spec("onnxscript"),
}
"""Part of a command, and whether this machine has what it needs."""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("test_howto.py")]


@pytest.fixture(scope="module")
def template(data_dir, mnist, tmp_path_factory):
    """A folder with all that the commands take: configs, pictures and runs."""
    folder = tmp_path_factory.mktemp("howto")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for number, label in enumerate(mnist.test.labels[:40].tolist()):
        for path in (folder / f"photos/{label}/{number}.png", folder / f"scans/{number}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mnist.test.images[number, 0].numpy()).save(path)
    with chdir(folder), redirect_stdout(io.StringIO()):
        main(["fit", f"--data.data_dir={data_dir}", *SHORT])
    for name in ("wide", "cnn"):
        shutil.copytree(folder / "lightning_logs/baseline", folder / "lightning_logs" / name)
    return folder


@pytest.mark.parametrize(("question", "answer"), ANSWERS, ids=[question for question, _ in ANSWERS])
def test_an_answer_works(capfd, monkeypatch, template, data_dir, tmp_path, question, answer):
    for part, is_here in NEEDED.items():
        if part in answer and not is_here:
            pytest.skip(f"{part} needs what this machine lacks")
    command = answer.partition("python -m mnist_lightning ")[2].replace("\\\n", "").replace("$seed", "1")
    words = shlex.split(command.partition(";")[0])
    if words[0] in ("fit", "tune"):
        words += [*SHORT, *(SINGLE if words[0] == "tune" else ())]
    if words[0] not in ("report", "runs") and "ImageFolder" not in words:
        words.append(f"--data.data_dir={data_dir}")
    shutil.copytree(template, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    code, _, errors = in_process(capfd, *words)
    assert code == 0, errors
