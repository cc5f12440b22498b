"""Tries what the libraries have, as a user would: does the package work with X?

    python tests/conformance.py                  # everything, about ten minutes
    python tests/conformance.py EarlyStopping LR # rows whose name contains one of these
    python tests/conformance.py --table          # the expectations, as in docs/conformance.md

The rows are read from the libraries, so a new callback of Lightning is tried automatically. A row works if

- ``fit`` ends with exit code 0, with finite numbers, and leaves nothing outside ``lightning_logs``;
- ``fit --config`` with the run's ``config.yaml`` repeats the run, to the digit;
- a run that is killed after its first epoch and continued equals the undisturbed run;
- ``validate`` and ``test`` with ``last.ckpt`` print the numbers of ``metrics.csv`` and ``test.csv``;
- logs, figures and tables do not change the random state before the first step.

A sampler or pruner works if ``tune`` with it ends without a failed trial.

Otherwise the row must be refused, in one or two lines.
"""

import bz2
import contextlib
import csv
import gc
import hashlib
import importlib
import inspect
import io
import math
import os
import pickle
import random
import re
import shlex
import shutil
import struct
import sys
import tempfile
import typing
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import optuna
import torch
import torchvision.datasets.cifar
from helpers.commands import ROOT, write_idx
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.pytorch import callbacks, loggers, plugins, profilers
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from PIL import Image
from torch.optim import lr_scheduler
from torchvision.transforms import v2

import mnist_lightning.augmentation
import mnist_lightning.datasets
import mnist_lightning.optimizers
from mnist_lightning.__main__ import main as command
from mnist_lightning.classifier import Classifier
from mnist_lightning.data import ImageDataModule, MNISTDataModule
from mnist_lightning.search.worker import start_server
from mnist_lightning.system import errors
from mnist_lightning.training.callbacks import Figures
from mnist_lightning.training.checkpoints import RunCheckpoint
from mnist_lightning.training.saved_run import SavedRun

EPOCHS = 3
SMALL = (f"--trainer.max_epochs={EPOCHS}", "--data.batch_size=16", "--data.eval_batch_size=8")
"""64 training images in four batches, 16 validation and 30 test images."""


@dataclass(frozen=True)
class Row:
    """A feature to try, and the expected result.

    Attributes:
        kind: The list with this row.
        name: Name in the list, with the value if there is one.
        options: Options of ``fit``.
        refusal: Part of the message that refuses the row; empty if the row works.
        without: Checks that do not apply.
        remark: The reason why they do not apply.
    """

    kind: str
    name: str
    options: tuple[str, ...]
    refusal: str = ""
    without: frozenset[str] = frozenset()
    remark: str = ""


# --- the rows -----------------------------------------------------------------------------------------------


def public(module: Any, base: type) -> list[type]:
    """Return the public subclasses of a base class in a module, sorted by name."""
    found = [getattr(module, name) for name in getattr(module, "__all__", dir(module))]
    classes = {each for each in found if inspect.isclass(each) and issubclass(each, base)}
    return sorted(classes, key=lambda each: each.__name__)


def option(key: str, cls: type, arguments: dict[str, Any], plus: str = "") -> tuple[str, ...]:
    """Return the options that set a key to an object of a class."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    return (f"--{key}{plus}={path}", *(f"--{key}.{name}={value}" for name, value in arguments.items()))


ARGUMENTS: dict[str, dict[str, Any]] = {
    # callbacks
    "EarlyStopping": {"monitor": "val/loss", "patience": 1},
    "GradientAccumulationScheduler": {"scheduling": "{1: 2}"},
    "ModelCheckpoint": {"monitor": "val/loss", "save_top_k": 2},
    "ModelPruning": {"pruning_fn": "l1_unstructured", "amount": 0.3},
    "OnExceptionCheckpoint": {"dirpath": "lightning_logs/exceptions"},
    "StochasticWeightAveraging": {"swa_lrs": 0.001, "swa_epoch_start": 1},
    "Timer": {"duration": "00:01:00:00"},
    # loggers
    "CSVLogger": {"save_dir": "lightning_logs/csv"},
    "TensorBoardLogger": {"save_dir": "lightning_logs/events"},
    "WandbLogger": {"save_dir": "lightning_logs/wandb", "offline": "true"},
    # schedules
    "ExponentialLR": {"gamma": 0.5},
    "MultiStepLR": {"milestones": "[1,2]"},
    "StepLR": {"step_size": 1},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.01, "cycle_momentum": "false"},
    "OneCycleLR": {"max_lr": 0.01, "cycle_momentum": "false"},
    "ReduceLROnPlateau": {"monitor": "val/loss", "patience": 0},
    # augmentation
    "CenterCrop": {"size": 28},
    "GaussianBlur": {"kernel_size": 3},
    "Pad": {"padding": 0},
    "RandomAdjustSharpness": {"sharpness_factor": 2},
    "RandomAffine": {"degrees": 10},
    "RandomCrop": {"size": 28, "padding": 2},
    "RandomResizedCrop": {"size": "[28,28]"},
    "RandomRotation": {"degrees": 10},
    "RandomSolarize": {"threshold": 0.5},
    "Resize": {"size": "[28,28]"},
    "Normalize": {"mean": "[0.5]", "std": "[0.5]"},
    "ConvertBoundingBoxFormat": {"format": "XYXY"},
    "FiveCrop": {"size": 28},
    "JPEG": {"quality": 50},
    "RandomPosterize": {"bits": 4},
    "RandomResize": {"min_size": 20, "max_size": 24},
    "RandomShortestSize": {"min_size": 20},
    "ScaleJitter": {"target_size": "[20,20]"},
    "TenCrop": {"size": 28},
    "ToDtype": {"dtype": "torch.float32"},
    "UniformTemporalSubsample": {"num_samples": 1},
    "MixUp": {"num_classes": 10},
    "CutMix": {"num_classes": 10},
    # samplers and pruners
    "GridSampler": {"search_space": '{"model.network.init_args.units.0":[4,8],"model.optimizer.init_args.lr":[0.01]}'},
    "PartialFixedSampler": {"fixed_params": '{"model.optimizer.init_args.lr":0.01}', "base_sampler": "TPESampler"},
    "HyperbandPruner": {"max_resource": 2},
    "PatientPruner": {"patience": 0, "wrapped_pruner": "MedianPruner"},
    "PercentilePruner": {"percentile": 50, "n_startup_trials": 1},
    "ThresholdPruner": {"lower": 0.0},
}
"""Arguments that the classes require, or need to have an effect here."""

VALUES: dict[str, list[str]] = {
    "devices": ["1", "auto"],
    "num_nodes": ["1"],
    "logger": ["true", "false"],
    "fast_dev_run": ["true", "2"],
    "max_epochs": ["0", "1", "2"],
    "min_epochs": ["2"],
    "max_steps": ["6", "8", "0"],
    "min_steps": ["5"],
    "max_time": ["00:01:00:00"],
    "limit_train_batches": ["1", "2", "0.5", "1.0", "0"],
    "limit_val_batches": ["1", "0.5", "0"],
    "limit_test_batches": ["1", "0.5", "0"],
    "limit_predict_batches": ["1"],
    "overfit_batches": ["2", "0.5"],
    "val_check_interval": ["1", "2", "3", "0.25", "0.5", "1.0", "00:00:00:30"],
    "check_val_every_n_epoch": ["2", "3"],
    "num_sanity_val_steps": ["2", "-1"],
    "log_every_n_steps": ["1"],
    "accumulate_grad_batches": ["2", "3"],
    "gradient_clip_val": ["0.5"],
    "gradient_clip_algorithm": ["value", "norm"],
    "deterministic": ["true", "warn"],
    "profiler": ["simple", "advanced", "pytorch"],
    "reload_dataloaders_every_n_epochs": ["1"],
    "default_root_dir": ["elsewhere"],
    "model_registry": ["digits"],
}
"""Values of the Trainer's arguments that are neither flags nor separate lists."""

WITH: dict[str, tuple[str, ...]] = {
    "max_epochs=0": ("--trainer.max_epochs=0",),
    "check_val_every_n_epoch=2": ("--trainer.num_sanity_val_steps=2",),
    "gradient_clip_algorithm=value": ("--trainer.gradient_clip_val=0.5",),
    "gradient_clip_algorithm=norm": ("--trainer.gradient_clip_val=0.5",),
    "model_registry=digits": (),
    "SparseAdam": (),
}
"""Further options that a row needs."""

SEARCHES = ("samplers", "pruners")
"""Kinds that are tried with ``tune``."""

SEARCH = (
    *("--n_trials=2", "--executions_per_trial=1", "--workers=1", "--refit=false"),
    '--search_space={"units.0":{"class_path":"IntDistribution","init_args":{"low":4,"high":8}},'
    '"lr":{"class_path":"FloatDistribution","init_args":{"low":0.01,"high":0.05,"step":0.01}}}',
)
"""Options of a short search."""

KILLED = "continued/lightning_logs/killed/version_0/checkpoints"
"""A checkpoint is only trusted in the folder of the runs."""

PLAIN = ("optimizers", "schedules", "profilers", "plugins")
"""Kinds that can influence neither figures nor the random state before the first step."""

DRAWING = ("on_train_start", "on_validation_end", "on_train_end", "on_test_end")
"""Hooks of ``Figures``, in the order of their calls."""

NOT_HERE = "if it is not here"
"""The end of a refusal that depends on the machine: its hardware, or optional packages."""

REFUSED: dict[str, str] = {
    # Trainer
    **dict.fromkeys(("accelerator=cuda", "accelerator=mps"), f"can not run on your system {NOT_HERE}"),
    **dict.fromkeys(("accelerator=tpu", "strategy=xla", "strategy=xla_debug"), f"torch_xla {NOT_HERE}"),
    **dict.fromkeys(("strategy=single_xla", "strategy=single_tpu"), f"argument: 'device' {NOT_HERE}"),
    **dict.fromkeys(("strategy=fsdp", "strategy=fsdp_cpu_offload"), "requires a GPU accelerator"),
    # base classes
    "BaseFinetuning": "NotImplementedError",
    "CheckpointIO": "is abstract",
    "LayerSync": "is abstract",
    "Logger": "is abstract",
    "LRScheduler": "NotImplementedError",
    "Optimizer": "arguments are required: defaults",
    "Profiler": "can only be one of",
    "Transform": "NotImplementedError",
    # callbacks
    "BackboneFinetuning": "no attribute 'backbone'",
    "RichModelSummary": f"requires `rich` {NOT_HERE}",
    "RichProgressBar": f"requires `rich` {NOT_HERE}",
    "ThroughputMonitor": "arguments are required: batch_size_fn",
    # loggers
    "CometLogger": f"comet-ml {NOT_HERE}",
    "LitLogger": f"subclass of Logger {NOT_HERE}",
    "MLFlowLogger": f"mlflow {NOT_HERE}",
    "WandbLogger": f"wandb {NOT_HERE}",
    # profilers and plugins
    "XLAProfiler": f"torch_xla {NOT_HERE}",
    "XLACheckpointIO": f"torch_xla {NOT_HERE}",
    "XLAPrecision": f"torch_xla {NOT_HERE}",
    "AsyncCheckpointIO": "checkpoints are written by this package",
    "TorchCheckpointIO": "checkpoints are written by this package",
    "BitsandbytesPrecision": "arguments are required: mode",
    "DeepSpeedPrecision": "arguments are required: precision",
    "FSDPPrecision": "arguments are required: precision",
    "MixedPrecision": "arguments are required: precision, device",
    "TransformerEnginePrecision": "arguments are required: weights_dtype",
    # optimizers and schedules
    "Muon": "only supports 2D parameters",
    "SparseAdam": "does not support dense gradients",
    "ChainedScheduler": r"has no len\(\)",
    "LambdaLR": "arguments are required: lr_lambda",
    "MultiplicativeLR": "arguments are required: lr_lambda",
    "SequentialLR": "arguments are required: schedulers, milestones",
    # augmentation
    **dict.fromkeys(("Compose", "RandomApply", "RandomChoice", "RandomOrder"), "arguments are required: transforms"),
    "RGB": "makes images of shape",
    "RandomResize": "makes images of shape",
    "RandomShortestSize": "makes images of shape",
    "ScaleJitter": "makes images of shape",
    "RandomZoomOut": "images of shape|shapes cannot be multiplied",
    "FiveCrop": "has no attribute 'shape'",
    "TenCrop": "has no attribute 'shape'",
    "UniformTemporalSubsample": "makes images of shape",
    "JPEG": "dtype should be uint8",
    "Lambda": "arguments are required: lambd",
    "LinearTransformation": "arguments are required: transformation_matrix, mean_vector",
    "RandomIoUCrop": "requires input sample to contain",
    "SanitizeBoundingBoxes": "No bounding boxes",
    "SanitizeKeyPoints": "No keypoints",
    "ToPILImage": "pic should be 2/3 dimensional",
    "CmaEsSampler": f"needs the package cmaes {NOT_HERE}",
    "BaseGASampler": "is abstract",
    "BaseSampler": "is abstract",
    "BasePruner": "is abstract",
}
"""Rows that are deliberately unsupported, and part of the message that refuses them."""

FAMILIES = {
    **dict.fromkeys(("_spawn", "_fork", "_notebook"), "starts processes that would have to copy"),
    "deepspeed": f"must have DeepSpeed installed {NOT_HERE}",
    "transformer-engine": f"transformer_engine {NOT_HERE}",
}
"""Refusals of Trainer values whose name contains a word."""

WITHOUT: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("logger=false", "fast_dev_run=true", "fast_dev_run=2", "barebones=true"), ("", "nothing is saved")
    ),
    **dict.fromkeys(
        (
            "limit_val_batches=1",
            "limit_val_batches=0.5",
            "limit_test_batches=1",
            "limit_test_batches=0.5",
            "overfit_batches=0.5",
        ),
        ("evaluated", "`test` and `validate` take all images"),
    ),
    **dict.fromkeys(
        ("Checkpoint", "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "OnExceptionCheckpoint"),
        ("looking", "works only in a saved run"),
    ),
    "ModelPruning": ("continued", "Lightning does not store masks: a continued run prunes again"),
    "SpikeDetection": ("continued", "Lightning cannot read its state: continuing is refused"),
}
"""Rows to which some checks do not apply, and the reasons."""


def make_row(kind: str, name: str, options: tuple[str, ...]) -> Row:
    checks, remark = WITHOUT.get(name, ("", ""))
    families = [reason for word, reason in FAMILIES.items() if word in name and kind == "Trainer"]
    refusal = REFUSED.get(name, "".join(families[:1]))
    return Row(kind, name, (*options, *WITH.get(name, ())), refusal, frozenset(checks.split()), remark)


def trainer_rows() -> Iterator[Row]:
    """Yield a row for each argument of the Trainer and each of its values."""
    lists = {
        "accelerator": ["auto", *sorted(AcceleratorRegistry.available_accelerators())],
        "strategy": ["auto", *StrategyRegistry.available_strategies()],
        "precision": sorted({str(v) for union in typing.get_args(_PRECISION_INPUT) for v in typing.get_args(union)}),
    }
    for name, parameter in [*inspect.signature(pl.Trainer).parameters.items()]:
        if name in ("callbacks", "plugins"):  # separate kinds
            continue
        is_flag = "bool" in str(parameter.annotation) and name not in VALUES
        flags = [value for value in ("true", "false") if is_flag and value != str(parameter.default).lower()]
        for value in lists.get(name) or VALUES.get(name) or flags:
            yield make_row("Trainer", f"{name}={value}", (f"--trainer.{name}={value}",))
        if not (lists.get(name) or VALUES.get(name) or is_flag):
            yield Row("Trainer", name, (), "VALUES must have a value of it")


def rows() -> list[Row]:
    """Return all rows."""
    found = [*trainer_rows()]
    kinds: list[tuple[str, str, str, list[type]]] = [
        ("callbacks", "trainer.callbacks", "+", public(callbacks, pl.Callback)),
        ("loggers", "trainer.logger", "+", public(loggers, object)),
        ("profilers", "trainer.profiler", "", public(profilers, profilers.Profiler)),
        ("plugins", "trainer.plugins", "+", public(plugins, object)),
        ("optimizers", "model.optimizer", "", public(torch.optim, torch.optim.Optimizer)),
        ("optimizers", "model.optimizer", "", own(mnist_lightning.optimizers, torch.optim.Optimizer)),
        ("schedules", "model.lr_scheduler", "", schedules()),
        ("augmentation", "data.augmentation", "+", own(mnist_lightning.augmentation, torch.nn.Module)),
        ("augmentation", "data.augmentation", "+", public(v2, v2.Transform)),
        ("samplers", "sampler", "", public(optuna.samplers, optuna.samplers.BaseSampler)),
        ("pruners", "pruner", "", public(optuna.pruners, optuna.pruners.BasePruner)),
    ]
    for kind, key, plus, classes in kinds:
        for cls in classes:
            found.append(make_row(kind, cls.__name__, option(key, cls, ARGUMENTS.get(cls.__name__, {}), plus)))
    for cls in own(mnist_lightning.datasets, ImageDataModule):
        if cls.__name__ not in ("MNISTLike", "TorchvisionDataModule"):
            found.append(
                make_row(
                    "data sets",
                    cls.__name__,
                    (f"--data={cls.__name__}", f"--data.data_dir={{data}}/{cls.__name__}", *SMALL),
                )
            )
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if "search_space" not in path.read_text(encoding="utf-8"):
            data = "FashionMNIST" if "FashionMNIST" in path.read_text(encoding="utf-8") else "MNISTDataModule"
            few = ("--trainer.max_epochs=2", "--trainer.limit_train_batches=1", "--data.batch_size=16")
            options = (f"--config={path}", f"--data.data_dir={{data}}/{data}", "--data.val_split=0.2")
            options += (*few, "--num_threads=1")
            found.append(make_row("configs", path.name, options))
    return found


def own(module: Any, base: type) -> list[type]:
    """Return the public classes that a module of this package defines."""
    return [
        each
        for each in public(module, base)
        if each.__module__ == module.__name__ and not each.__name__.startswith("_")
    ]


def schedules() -> list[type]:
    """Return torch's schedulers, with Lightning's class for the scheduler that needs a metric."""
    found = {cls.__name__: cls for cls in public(lr_scheduler, lr_scheduler.LRScheduler)}
    found["ReduceLROnPlateau"] = importlib.import_module("lightning.pytorch.cli").ReduceLROnPlateau
    return [*found.values()]


# --- the data -----------------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Write a few real digits in the format of each data set: 80 for training, 30 for testing."""
    mnist = MNISTDataModule()
    mnist.setup("fit")
    mnist.setup("test")
    assert mnist.train is not None
    assert mnist.test is not None
    for part, split, count in (("train", mnist.train, 80), ("test", mnist.test, 30)):
        images, labels = split.images[:count, 0].numpy(), split.labels[:count].numpy()
        for name in ("MNISTDataModule", "FashionMNIST", "KMNIST", "EMNIST"):
            prefix = f"emnist-balanced-{part}" if name == "EMNIST" else {"train": "train", "test": "t10k"}[part]
            write_idx(folder / name / f"{prefix}-images-idx3-ubyte", images)
            write_idx(folder / name / f"{prefix}-labels-idx1-ubyte", labels)
        write_idx(folder / f"QMNIST/QMNIST/raw/qmnist-{part}-images-idx3-ubyte", images)
        numbers = np.zeros((count, 8), ">i4")
        numbers[:, 0] = labels
        path = folder / f"QMNIST/QMNIST/raw/qmnist-{part}-labels-idx2-int"
        path.write_bytes(struct.pack(">3I", 0xC02, count, 8) + numbers.tobytes())
        lines = [
            f"{label + 1} " + " ".join(f"{i + 1}:{v / 127.5 - 1:.4f}" for i, v in enumerate(image[6:22, 6:22].flat))
            for image, label in zip(images, labels, strict=True)
        ]
        (folder / "USPS").mkdir(exist_ok=True)
        (folder / f"USPS/usps{'.t' if part == 'test' else ''}.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / f"ImageFolder/{part}/{label}/{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        photos = np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None].repeat(3, axis=1).reshape(count, -1)
        for name in [f"data_batch_{n}" for n in range(1, 6)] if part == "train" else ["test_batch"]:
            path = folder / "CIFAR10/cifar-10-batches-py" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps({"data": photos[:16], "labels": labels[:16].tolist()}))
    names = {"label_names": mnist_lightning.datasets.CIFAR10.class_names}
    (folder / "CIFAR10/cifar-10-batches-py/batches.meta").write_bytes(pickle.dumps(names))


# --- the checks ---------------------------------------------------------------------------------------------


class FailedError(AssertionError):
    """A row neither works nor is refused."""


class FirstStepError(BaseException):  # libraries must not catch it
    """Ends a training before its first step."""


@dataclass
class Result:
    """The outcome of a command."""

    code: int
    text: str
    """The output, errors last."""
    error: str
    draws: str = ""
    """Digest of the random state before the first step."""


@contextlib.contextmanager
def observed(result: list[str], killed: Path | None, stop: bool, drawn: Sequence[str]) -> Iterator[None]:
    """Record the random state before the first step, and keep the checkpoints that a kill after an epoch leaves.

    Figures take half of the time of such a short training, so only the hooks ``drawn`` draw them.
    """
    step, save = Classifier.training_step, RunCheckpoint.on_train_epoch_end

    def training_step(self: Classifier, batch: Any) -> Any:
        if not result:
            states = (random.getstate(), np.random.get_state(), torch.get_rng_state().numpy().tobytes())
            result.append(hashlib.md5(repr(states).encode(), usedforsecurity=False).hexdigest())
        if stop:
            raise FirstStepError
        return step(self, batch)

    def on_train_epoch_end(self: RunCheckpoint, trainer: Any, module: Any) -> None:
        save(self, trainer, module)
        if killed is not None and not killed.exists() and Path(str(self.dirpath)).is_dir():
            shutil.copytree(str(self.dirpath), killed)

    patches: list[tuple[Any, str, Any]] = [
        (Classifier, "training_step", training_step),
        (RunCheckpoint, "on_train_epoch_end", on_train_epoch_end),
        (torchvision.datasets.cifar, "check_integrity", lambda *_: True),  # the few images here are not CIFAR's
        (errors, "LIBRARIES", [*errors.LIBRARIES, ROOT / "tests"]),  # the functions here are not a user's
        (sys, "unraisablehook", lambda _: None),  # errors of profilers that could not be created
    ]
    patches += [(Figures, name, getattr(pl.Callback, name)) for name in DRAWING if name not in drawn]
    with contextlib.ExitStack() as stack:
        for place, name, value in patches:
            stack.enter_context(mock.patch.object(place, name, value))
        yield


def run(
    folder: Path, *arguments: str, killed: Path | None = None, stop: bool = False, drawn: Sequence[str] = ()
) -> Result:
    """Run a command in this process, in a folder.

    Raises:
        FailedError: If the command ends in a traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if "profiler" in "".join(arguments):
        gc.collect()  # when the profiler of a killed run is collected, it would end the profiler of this run
    output, error_output, draws = io.StringIO(), io.StringIO(), []
    code: Any = 0
    environment = dict(os.environ)
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(error_output),
        warnings.catch_warnings(),
        observed(draws, killed, stop, drawn),
    ):
        try:
            command(arguments)
        except SystemExit as exit:
            code = exit.code or 0
        except FirstStepError:
            pass
        except BaseException as error:
            raise FailedError(f"{shown(folder, arguments)}\n  ended in {type(error).__name__}: {error}") from error
        finally:
            torch.use_deterministic_algorithms(False)
            torch.autograd.set_detect_anomaly(False)
            os.environ.clear()
            os.environ.update(environment)
    error = error_output.getvalue()
    if isinstance(code, str):
        code, error = 1, f"{error}{code}\n"
    return Result(code, output.getvalue() + error, error, *draws)


def shown(folder: Path, arguments: tuple[str, ...]) -> str:
    """Return a command that can be pasted into a shell."""
    return f"cd {folder} && python -m mnist_lightning {shlex.join(arguments)}"


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, or an empty list if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def run_folder(result: Result, folder: Path) -> Path | None:
    """Return the run folder that ``fit`` printed."""
    found = re.search(r"^Run: (.*)", result.text, re.MULTILINE)
    return folder / found[1] if found else None


def printed(result: Result) -> dict[str, float]:
    """Return the numbers in the table that ``test`` and ``validate`` print."""
    return {name: float(value) for name, value in re.findall(r"((?:test|val)/\w+) +│? *([-\w.+]+)", result.text)}


def weights(path: Path) -> dict[str, Any]:
    """Return the weights in a checkpoint."""
    return SavedRun.read(path).weights


def differences(one: Path, other: Path) -> str:
    """Return how two runs differ, or an empty text."""
    for name in ("metrics.csv", "test.csv"):
        pairs = read(one / name), read(other / name)
        if len(pairs[0]) != len(pairs[1]):
            return f"{name} has {len(pairs[0])} and {len(pairs[1])} rows"
        for number, (first, second) in enumerate(zip(*pairs, strict=True)):
            for key in first.keys() | second.keys():
                is_ours = key in ("epoch", "step", "lr", "weights") or key.startswith(("train/", "val/", "test/"))
                if is_ours and first.get(key) != second.get(key):
                    return f"{name}, row {number}: {key} is {first.get(key)} and {second.get(key)}"
    for name in ("last.ckpt", "best.ckpt"):
        files = [run / "checkpoints" / name for run in (one, other)]
        if files[0].is_file() != files[1].is_file():
            return f"only one has {name}"
        if files[0].is_file():
            states = [weights(path) for path in files]
            for key, value in states[0].items():
                if not torch.equal(value, states[1].get(key, torch.zeros(0))):
                    return f"{name}: {key} differs"
    return ""


def same(one: float, other: float) -> bool:
    """Return whether two printed numbers can be from the same computation."""
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-6)


def check(row: Row, folder: Path, data: Path) -> str:
    """Try a row.

    Returns:
        ``works``, or the message that refuses the row.

    Raises:
        FailedError: If the row neither works nor is refused in one line.
    """
    defaults = (
        f"--data.data_dir={data}/MNISTDataModule",
        *SMALL,
        "--model.network.units=[16,8]",
        "--trainer.accelerator=cpu",
    )
    if row.kind in ("data sets", "configs"):
        defaults = ("--trainer.accelerator=cpu",)
    options = (*defaults, *(each.replace("{data}", str(data)) for each in row.options))
    # what is drawn before the first step, or between epochs, could change them; what is drawn later depends on the data
    count = {**dict.fromkeys(PLAIN, 0), "augmentation": 1, "Trainer": 2, "callbacks": 2}.get(row.kind, len(DRAWING))
    drawn = DRAWING[:count]
    tried = ("tune", *SEARCH, *options) if row.kind in SEARCHES else ("fit", *options)
    if row.kind in SEARCHES:
        start_server()  # in a folder that stays: it may still import when the row's is deleted
    first = run(folder / "first", *tried, killed=folder / KILLED, drawn=drawn)

    def fail(reason: str, *arguments: str, where: str = "first") -> typing.NoReturn:
        raise FailedError(f"{shown(folder / where, arguments or tried)}\n  {reason}")

    if first.code:
        lines = [line for line in first.error.splitlines() if "error: " in line]
        if len(lines) != 1 or "Traceback" in first.text:
            fail(f"is refused in {len(lines)} lines: {first.error[-1500:]}")
        return lines[0].partition("error: ")[2]
    left = sorted({path.name for path in (folder / "first").iterdir()} - {"lightning_logs", "elsewhere"})
    if left:
        fail(f"leaves files: {', '.join(left)}")
    if row.kind in SEARCHES:
        found = re.search(r"(\d) complete, (\d) pruned, 0 failed", first.text)
        if found is None or sum(map(int, found.groups())) != 2:
            fail("does not end two trials")
        return "works"
    where = run_folder(first, folder / "first")
    if where is None:
        if "nothing is saved" not in row.remark:
            fail("does not leave a run")
        return "works"
    for name in ("metrics.csv", "test.csv"):
        for line in read(where / name):
            for key, value in line.items():
                if value and key != "weights" and not math.isfinite(float(value)):
                    fail(f"{name}: {key} is {value}")

    config = where / "config.yaml"
    if "again" not in row.without:
        again = run(folder / "again", "fit", f"--config={config}")
        if again.code:
            fail(f"is refused: {again.error}", "fit", f"--config={config}", where="again")
        second = run_folder(again, folder / "again")
        if second is None or (difference := differences(where, second)):
            fail(f"differs: {difference}", "fit", f"--config={config}", where="again")
    last = where / "checkpoints/last.ckpt"
    if "evaluated" not in row.without and last.is_file():
        tables = {"test": ("test.csv", 0), "validate": ("metrics.csv", -1)}
        for name, (path, index) in tables.items():
            if name == "validate" and row.kind != "callbacks":  # only callbacks change what is validated
                continue
            table = read(where / path)
            expected = (
                {k: float(v) for k, v in table[index].items() if v and k.startswith(("test/", "val/"))} if table else {}
            )
            if not expected:
                continue
            arguments = (name, f"--ckpt_path={last}", "--trainer.accelerator=cpu")
            evaluated = run(folder / name, *arguments)
            if evaluated.code:
                fail(f"is refused: {evaluated.error}", *arguments, where=name)
            found = printed(evaluated)
            for key, value in expected.items():
                if key not in found or not same(found[key], value):
                    fail(f"{key} is {found.get(key)}, in {path} {value}", *arguments, where=name)
    killed = folder / KILLED / "last.ckpt"
    if "continued" not in row.without and killed.is_file() and len(read(where / "metrics.csv")) > 1:
        continued = run(folder / "continued", "fit", f"--ckpt_path={killed}")
        if continued.code:
            fail(f"is refused: {continued.error}", "fit", f"--ckpt_path={killed}", where="continued")
        third = run_folder(continued, folder / "continued")
        if third is None or (difference := differences(where, third)):
            fail(
                f"differs from the undisturbed run: {difference}",
                "fit",
                f"--ckpt_path={killed}",
                where="continued",
            )
    if "looking" not in row.without and row.kind not in PLAIN:
        blind = (
            "--trainer.logger=false",
            "--trainer.enable_model_summary=false",
            "--trainer.enable_progress_bar=false",
        )
        looks = any(each.startswith("--trainer.callbacks") for each in row.options)  # the row's own bar or summary
        bare = run(folder / "blind", "fit", *options, *(blind[:2] if looks else blind), stop=True)
        if bare.draws != first.draws:
            fail(f"draws before the first step: {bare.error}", "fit", *options, *blind, where="blind")
    return "works"


def is_expected(row: Row, verdict: str) -> bool:
    """Return whether the verdict on a row is expected."""
    if verdict == "works":
        return not row.refusal or row.refusal.endswith(NOT_HERE)
    return bool(row.refusal) and re.search(row.refusal.removesuffix(NOT_HERE).strip(), verdict) is not None


# --- the table ----------------------------------------------------------------------------------------------


def table() -> str:
    """Return the expectations of all rows, as Markdown."""
    lines = ["| | works | is refused, with a message that contains |", "|---|---|---|"]
    found = rows()
    for kind in dict.fromkeys(row.kind for row in found):
        works, refused = [], []
        for row in found:
            if row.kind == kind and row.refusal:
                refusal = row.refusal.replace("\\", "").replace("|", " or ")
                where = " if not available" if refusal.endswith(NOT_HERE) else ""
                refused.append(f"`{row.name}`{where}: {refusal.removesuffix(NOT_HERE).strip()}")
            elif row.kind == kind:
                works.append(f"`{row.name}`{f' ({row.remark})' if row.remark else ''}")
        lines.append(f"| {kind} | {', '.join(works)} | {'<br>'.join(refused)} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Try the rows whose name contains one of the words, and print the verdicts."""
    if words == ["--table"]:
        print(table())
        return 0
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        data = Path(name, "data")
        write_data(data)
        for number, row in enumerate(rows()):
            label = f"{row.kind}: {row.name}"
            if words and not any(word.lower() in label.lower() for word in words):
                continue
            torch.manual_seed(0)
            try:
                verdict = check(row, Path(name, str(number)), data)
                if not is_expected(row, verdict):
                    verdict += f"  (EXPECTED {row.refusal or 'works'})"
                    failures += 1
            except FailedError as error:
                verdict = f"FAILS {error}"
                failures += 1
            print(f"{label:50} {verdict}{f' ({row.remark})' if row.remark else ''}", flush=True)
            shutil.rmtree(Path(name, str(number)), ignore_errors=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
