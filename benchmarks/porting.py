"""What it costs to port the Keras notebook the usual way: each trap of docs/porting.md, trained beside the right port.

Run by hand, in a folder where the runs can stay: python benchmarks/porting.py

All rows are the notebook's training, with one thing changed. Finished trainings are not repeated: repeat the command
after a stop. All numbers are appended to porting.csv next to this file. --check only prints the tables from it.
"""

import argparse
import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from scipy.stats import ttest_ind
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mnist_lightning import MLP, Classifier, MNISTDataModule, Run, fit
from mnist_lightning.data import Batch
from mnist_lightning.optimizers import KerasAdam, KerasRMSprop, KerasSGD

TABLE = Path(__file__).resolve().with_suffix(".csv")
SEEDS = (42, 1, 2)
METRICS = ("test/accuracy", "test/loss", "val/accuracy", "train/loss")
SIGNIFICANT = 0.01
"""A value is bold if Welch's test over the seeds gives a smaller p for its difference from the right one."""


class TorchInitialized(MLP):
    """The network with the initial weights of ``nn.Linear``."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.Linear.reset_parameters(layer)


class SoftmaxTwice(Classifier):
    """A network that ends in a softmax, under ``CrossEntropyLoss``, which has its own."""

    def objective(self, logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        return F.cross_entropy(logits.softmax(dim=1), labels)


class ClippedFirst(Classifier):
    """Gradients that are clipped before weight decay adds the penalty's."""

    def configure_optimizers(self) -> Any:
        kernels = [{"params": [kernel], "weight_decay": 2 * factor} for kernel, factor in self.kernels.items()]
        others = [parameter for parameter in self.parameters() if parameter not in self.kernels]
        return self.optimizer([{"params": others}, *kernels])


class Unshuffled(MNISTDataModule):
    """Training images in their order, the default of a ``DataLoader``."""

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self._on_device(self.train), batch_size=self.batch_size, collate_fn=lambda batch: batch)


class Variant(NamedTuple):
    """A training of the notebook with one thing changed.

    Attributes:
        label: What is different, as a row of the table.
        right: Name of the variant that it is compared with; empty if it is right itself.
        options: Arguments of ``fit`` that differ from the defaults.
    """

    label: str
    right: str
    options: dict[str, Any]


UNPENALIZED = MLP(l2=0.0)
ADAM_DECAY, ADAMW_DECAY = partial(KerasAdam, weight_decay=0.02), partial(torch.optim.AdamW, weight_decay=0.01)
KERAS_DEFAULTS = partial(torch.optim.RMSprop, lr=1e-3, alpha=0.9, eps=1e-7)
CLIPPED = {"gradient_clip_val": 0.5}
VARIANTS = {
    "right": Variant("the right port", "", {}),
    "weight_decay": Variant("`weight_decay` is λ, not 2λ", "right", {"network": MLP(l2=0.005)}),
    "adamw": Variant("`AdamW(weight_decay=λ)`", "right", {"network": UNPENALIZED, "optimizer": ADAMW_DECAY}),
    "all_parameters": Variant("2λ on all parameters", "right", {"network": UNPENALIZED, "optimizer": ADAM_DECAY}),
    "torch_initial": Variant("`nn.Linear`'s initial weights", "right", {"network": TorchInitialized()}),
    "torch_adam": Variant("`torch.optim.Adam`", "right", {"optimizer": torch.optim.Adam}),
    "softmax_twice": Variant("softmax before `CrossEntropyLoss`", "right", {"model": SoftmaxTwice}),
    "shuffled_split": Variant("a shuffled split", "right", {"data": MNISTDataModule(split_seed=0)}),
    "unshuffled": Variant("no shuffling", "right", {"data": Unshuffled}),
    "batch_32": Variant("batches of 32", "right", {"data": MNISTDataModule(batch_size=32)}),
    "clipped": Variant("the right port, clipped", "", CLIPPED),
    "clipped_first": Variant("clipped before the penalty", "clipped", CLIPPED | {"model": ClippedFirst}),
    "rmsprop": Variant("the right port with RMSprop", "", {"optimizer": KerasRMSprop}),
    "rmsprop_epsilon": Variant("epsilon outside the root", "rmsprop", {"optimizer": KERAS_DEFAULTS}),
    "rmsprop_rho": Variant("rho 0.99", "rmsprop", {"optimizer": partial(KerasRMSprop, alpha=0.99)}),
    "rmsprop_torch": Variant("`torch.optim.RMSprop`", "rmsprop", {"optimizer": torch.optim.RMSprop}),
    "sgd": Variant("the right port with SGD", "", {"optimizer": KerasSGD}),
    "sgd_torch": Variant("`torch.optim.SGD`", "sgd", {"optimizer": torch.optim.SGD}),
}
EVALUATIONS = {
    "the best epoch's weights": ("best test/accuracy", "best test/loss"),
    "the loss with the penalty": ("test/accuracy", "test/penalized_loss"),
    "without the last batch": ("whole batches test/accuracy", "whole batches test/loss"),
}
"""Other evaluations of the right port's trainings, and their columns."""


def train(name: str, seed: int) -> dict[str, Any]:
    """Train a variant with a seed, or find its run; return a row of the file."""
    folder = f"porting_{name}_{seed}"
    done = next(Path("lightning_logs").glob(f"{folder}/version_*/test.csv"), None)
    options = VARIANTS[name].options | {"name": folder, "seed_everything": seed, "tensorboard": False}
    run = Run(done.parent) if done else fit(**options)
    row = {key: run.history[key].iloc[-1] for key in ("train/loss", "train/accuracy", "val/loss", "val/accuracy")}
    for prefix, (_, values) in zip(("", "best "), run.test.iterrows(), strict=True):
        row |= {f"{prefix}{key}": value for key, value in values.items()}
    row |= {f"whole batches {key}": value for key, value in evaluate_whole_batches(run).items()}
    return {"variant": name, "seed": seed} | {key: round(value, 6) for key, value in row.items()}


@torch.no_grad()
def evaluate_whole_batches(run: Run) -> dict[str, float]:
    """Return the test metrics of a run without the last batch, which is smaller."""
    data = MNISTDataModule()
    data.setup("test")
    assert data.test is not None
    whole = range(len(data.test) // data.batch_size * data.batch_size)
    images, labels = data.test.__getitems__(whole)
    logits = run.classifier(images)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return {"test/accuracy": accuracy.item(), "test/loss": F.cross_entropy(logits, labels).item()}


def table(rows: pd.DataFrame) -> Iterator[str]:
    """Yield the lines of the table in Markdown: each variant below the one that it is compared with."""
    yield "| | test accuracy | test loss | validation accuracy | training loss |"
    yield "|---|---|---|---|---|"
    own = dict(iter(rows.groupby("variant")))
    for name, (label, right, _) in VARIANTS.items():
        cells = [cell(own[name][metric], own[right or name][metric]) for metric in METRICS]
        yield f"| {label if right else f'*{label}*'} | {' | '.join(cells)} |"
        for evaluation, columns in EVALUATIONS.items() if name == "right" else ():
            cells = [cell(own[name][column], own[name][METRICS[i]]) for i, column in enumerate(columns)]
            yield f"| {evaluation} | {' | '.join(cells)} | | |"


def cell(values: Any, right: Any) -> str:
    """Return mean and standard deviation, bold if they differ from the right ones."""
    factor, digits = (100, 2) if "accuracy" in values.name else (1, 3)
    text = f"{factor * values.mean():.{digits}f}\u00a0±\u00a0{factor * values.std():.{digits}f}"  # on one line
    is_different = not values.equals(right) and ttest_ind(values, right, equal_var=False).pvalue < SIGNIFICANT
    return f"**{text}**" if is_different else text


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="train nothing")
    is_check = parser.parse_args().check
    rows: list[Any] = pd.read_csv(TABLE).to_dict("records") if TABLE.exists() else []
    for seed in () if is_check else SEEDS:
        for name in VARIANTS:
            if not any(row["variant"] == name and row["seed"] == seed for row in rows):
                rows.append(train(name, seed))
                with TABLE.open("a", newline="", encoding="utf-8") as target:
                    writer = csv.DictWriter(target, rows[-1], lineterminator="\n")
                    if target.tell() == 0:
                        writer.writeheader()
                    writer.writerow(rows[-1])
    print("\n".join(table(pd.DataFrame(rows))))


if __name__ == "__main__":
    main()
