"""How long an epoch of the notebook's training takes: bare PyTorch, `fit`, the usual Lightning port, and Keras.

Run by hand, with nothing else running: python benchmarks/fit.py

(a) bare    a PyTorch loop that does the same work: batches, loss, penalty, accuracy, torch's fused Adam, validation
(b) fit     python -m mnist_lightning fit, unchanged, with logs, figures and checkpoints
(c) usual   the usual Lightning port: torchvision item by item, torchmetrics, log_dict at every step
(d) keras   the notebook's model and training, if Keras and TensorFlow are installed (--keras names their Python)

Each variant runs in its own process, in turn, several times. CPU seconds of an epoch are those of the process, from the
start of one epoch to the start of the next, without the first epoch; `whole` is the wall time of the process.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = {"a": "bare PyTorch loop", "b": "fit", "c": "usual Lightning port", "d": "Keras notebook"}


def timed() -> tuple[list[float], Callable[..., None]]:
    """Return a list, and a function that appends the CPU time to it."""
    marks: list[float] = []
    return marks, lambda *_: marks.append(time.process_time())


def bare(epochs: int) -> list[float]:
    """Train in a plain loop."""
    import torch
    from torch.nn import functional as F

    from mnist_lightning.classifier import Classifier
    from mnist_lightning.data import MNISTDataModule
    from mnist_lightning.networks import MLP

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = MNISTDataModule()
    data.setup("fit")
    assert data.train is not None
    assert data.val is not None
    train_images, train_labels = data.train.images, data.train.labels
    val_images, val_labels = data.val.images, data.val.labels
    classifier = Classifier(MLP())
    network, kernels = classifier.network, [*classifier.kernels.items()]
    decayed = [kernel for kernel, _ in kernels]
    others = [parameter for parameter in network.parameters() if all(parameter is not kernel for kernel in decayed)]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.02}, {"params": others}]
    optimizer = torch.optim.Adam(groups, lr=1e-3, eps=1e-7, fused=True)
    marks, mark = timed()
    for _ in range(epochs):
        mark()
        network.train()
        totals = torch.zeros(3)
        for index in torch.randperm(len(train_labels)).split(64):
            images, labels = train_images.index_select(0, index) / 255, train_labels.index_select(0, index)
            logits = network(images)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            with torch.no_grad():
                totals[0] += loss * len(labels)
                totals[1] += sum(l2 * kernel.flatten().dot(kernel.flatten()) for kernel, l2 in kernels) * len(labels)
                totals[2] += (logits.argmax(1) == labels).sum()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            for batch in range(0, len(val_labels), 250):
                logits, labels = network(val_images[batch : batch + 250] / 255), val_labels[batch : batch + 250]
                totals[0] += F.cross_entropy(logits, labels)
                totals[2] += (logits.argmax(1) == labels).sum()
    mark()
    return marks


def fit(epochs: int) -> list[float]:
    """Run the command, and take the time when its progress bar moves to the next epoch."""
    from mnist_lightning.__main__ import main
    from mnist_lightning.training import progress

    marks, mark = timed()
    original = progress.EpochProgressBar._print_line

    def print_line(*arguments: Any) -> None:
        original(*arguments)
        mark()

    progress.EpochProgressBar._print_line = print_line  # type: ignore[assignment, method-assign]
    main(["fit", f"--trainer.max_epochs={epochs}"])
    return marks


def usual(epochs: int) -> list[float]:
    """Train like most Lightning examples."""
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, Subset
    from torchmetrics.classification import MulticlassAccuracy
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    from mnist_lightning.data import MD5, embedded
    from mnist_lightning.networks import MLP

    torch.set_num_threads(1)

    class Usual(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = MLP()
            self.accuracy: Any = torch.nn.ModuleDict({stage: MulticlassAccuracy(10) for stage in ("fit", "val")})

        def step(self, batch: Any, stage: str) -> Any:
            images, labels = batch
            logits = self.network(images)
            loss = F.cross_entropy(logits, labels)
            layers: list[Any] = [self.network.dense_1, self.network.dense_2]
            penalty = sum(0.01 * layer.weight.square().sum() for layer in layers)
            self.accuracy[stage](logits, labels)
            metrics = {f"{stage}/loss": loss + penalty, f"{stage}/accuracy": self.accuracy[stage]}
            self.log_dict(metrics, on_step=stage == "fit", on_epoch=True, prog_bar=True)
            return loss + penalty

        def training_step(self, batch: Any) -> Any:
            return self.step(batch, "fit")

        def validation_step(self, batch: Any) -> None:
            self.step(batch, "val")

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3, eps=1e-7)

    raw = Path(tempfile.mkdtemp(), "MNIST", "raw")
    raw.mkdir(parents=True)
    for name in MD5:
        (raw / name).write_bytes(embedded(name))
    dataset = MNIST(str(raw.parents[1]), train=True, transform=ToTensor())
    train: Any = DataLoader(Subset(dataset, range(48_000)), batch_size=64, shuffle=True)
    val: Any = DataLoader(Subset(dataset, range(48_000, 60_000)), batch_size=64)
    marks, mark = timed()

    class Marks(Callback):
        on_train_epoch_start = on_train_end = mark

    Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[Marks()]).fit(Usual(), train, val)
    return marks


def mnist(prefix: str) -> tuple[Any, Any]:
    """Return images and labels in the notebook's format, without torch."""
    import gzip

    import numpy as np

    def read(name: str, offset: int) -> Any:
        content = (
            Path(__file__).parents[1] / "mnist_lightning" / "data" / "mnist" / f"{prefix}-{name}.gz"
        ).read_bytes()
        return np.frombuffer(gzip.decompress(content), np.uint8, offset=offset)

    images = read("images-idx3-ubyte", 16).reshape(-1, 28, 28).astype("float32") / 255
    return images, read("labels-idx1-ubyte", 8)


def keras(epochs: int) -> list[float]:
    """Train the notebook's baseline without this package, which the Python of Keras may not have."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras as k

    images, labels = mnist("train")
    test_images, test_labels = mnist("t10k")
    k.utils.set_random_seed(42)
    layers: list[Any] = [k.Input((28, 28)), k.layers.Flatten()]
    for units in (128, 64):
        layers += [
            k.layers.Dense(units, activation="relu", kernel_regularizer=k.regularizers.l2(0.01)),
            k.layers.Dropout(0.2),
        ]
    model = k.Sequential([*layers, k.layers.Dense(10, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    marks, mark = timed()
    callback = k.callbacks.LambdaCallback(on_epoch_begin=mark, on_train_end=mark)
    model.fit(images, labels, epochs=epochs, batch_size=64, validation_split=0.2, callbacks=[callback])
    model.evaluate(test_images, test_labels)
    model.predict(test_images[:10])
    return marks


def measure(letter: str, epochs: int, python: str) -> tuple[list[float], float, float]:
    """Run a variant in a process; return CPU seconds of its epochs, wall seconds of the process, and peak MiB."""
    with tempfile.TemporaryDirectory() as folder:
        root = str(Path(__file__).resolve().parents[1])
        start = time.perf_counter()
        process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--only", letter, "--epochs", str(epochs)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        assert process.stdout is not None
        last = process.stdout.read().splitlines()[-1]
        _, _, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    marks = json.loads(last)
    return [end - begin for begin, end in itertools.pairwise(marks[1:])], wall, usage.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="epochs of a run (20)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant (3)")
    parser.add_argument("--which", default="abcd", help="variants to run (abcd)")
    parser.add_argument("--keras", default=sys.executable, help="a Python that has Keras and TensorFlow (this one)")
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        marks = {"a": bare, "b": fit, "c": usual, "d": keras}[options.only](options.epochs)
        print(f"\n{json.dumps(marks)}", flush=True)
        os._exit(0)  # as `fit` exits, for a fair comparison
    which = list(options.which)
    if (
        "d" in which
        and subprocess.run([options.keras, "-c", "import keras, tensorflow"], capture_output=True).returncode
    ):
        which.remove("d")
        print("(d) skipped: this Python does not have Keras with TensorFlow; name another Python with --keras")
    runs: dict[str, list[tuple[list[float], float, float]]] = {letter: [] for letter in which}
    for _ in range(options.repeats):
        for letter in which:
            python = options.keras if letter == "d" else sys.executable
            runs[letter].append(measure(letter, options.epochs, python))
    columns = ("CPU s/epoch", "to (a)", "last/first", "whole, wall s", "to (b)", "peak MiB")
    print(f"{'median of ' + str(options.repeats):26}" + "".join(f"{column:>15}" for column in columns))
    median = statistics.median
    for letter, results in runs.items():

        def ratio(other: str, value: Callable[[Any], float], results: list[Any] = results) -> str:
            if other not in runs:
                return "-"
            return f"{median(value(x) / value(y) for x, y in zip(results, runs[other], strict=True)):.2f}"

        half = options.epochs // 2
        cells = (
            f"{median(median(epochs) for epochs, _, _ in results):.2f}",
            ratio("a", lambda result: median(result[0])),
            f"{median(median(epochs[half:]) / median(epochs[:half]) for epochs, _, _ in results):.2f}",
            f"{median(wall for _, wall, _ in results):.1f}",
            ratio("b", lambda result: result[1]),
            f"{median(peak for _, _, peak in results):.0f}",
        )
        print(f"({letter}) {NAMES[letter]:22}" + "".join(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
