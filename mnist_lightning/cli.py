"""``fit``, ``validate``, ``test`` and ``predict``: a LightningCLI whose defaults are the notebook's."""

import importlib
import json
import logging
import math
import re
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from jsonargparse.typing import restricted_number_type
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, Checkpoint, LearningRateFinder, ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO as LightningCheckpointIO
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_summary import summarize
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image

import mnist_lightning.augmentation  # noqa: F401 - so that a name is enough for its classes
import mnist_lightning.datasets  # noqa: F401
from mnist_lightning import figures
from mnist_lightning.callbacks import EpochProgressBar, Figures
from mnist_lightning.checkpoints import (
    INSTANTIATOR,
    CheckpointConnector,
    CheckpointIO,
    FitLoop,
    RunCheckpoint,
    check_finite,
    checkpoint_errors,
    load_checkpoint,
)
from mnist_lightning.classifier import SCHEDULE, Classifier
from mnist_lightning.data import ImageDataModule, Split
from mnist_lightning.fast import speed_up
from mnist_lightning.parsing import Parser, check_numbers, corrected, fill_nulls, shorten
from mnist_lightning.pictures import PictureError, find, read
from mnist_lightning.precision import Trainer, choose_precision, has_bf16
from mnist_lightning.runs import (
    LOGS,
    PROG,
    RUN_KEYS,
    atomic_write,
    command_line,
    explain,
    flatten,
    format_table,
    is_from_user_code,
    library_errors,
    new_version,
    newest_checkpoint,
    newest_result,
    note,
    user_errors,
    write_csv,
)
from mnist_lightning.saliency import integrated_gradients, smoothed
from mnist_lightning.signals import leave_as_usual
from mnist_lightning.slurm import SlurmJob

SHOWN = 500
"""Pictures on a contact sheet."""
EXECUTION = "execution"
"""The command of a RunCLI that is one training of a search."""

DEFAULTS: dict[str, Any] = {
    "name": "baseline",
    "trainer.max_epochs": 20,
    "trainer.devices": 1,  # the notebook's network is too small to share
    "trainer.num_sanity_val_steps": 0,
    "model.network": {"class_path": "mnist_lightning.networks.MLP"},
    "data": {"class_path": "mnist_lightning.data.MNISTDataModule"},
}
"""Where the commands differ from Lightning, and what has no default of its own."""


class RunCLI(LightningCLI):
    """Parses the options of a command and makes model, data and trainer of them; the command's function does the rest.

    Args:
        command: Its name.
        arguments: Command-line arguments, or a config.
        description: What it does, for its ``--help``.

    Attributes:
        checkpoint: Keeps the run of a ``fit`` on disk; None where nothing is kept.
        options: From a class that the config names to the option that does.
        keeps_run: Whether a ``fit`` leaves a run folder.
    """

    def __init__(self, command: str, arguments: Sequence[str] | dict[str, Any], description: str = "") -> None:
        self.command = command
        self.data_state: dict[str, Any] | None = None
        super().__init__(
            Classifier,
            ImageDataModule,
            trainer_class=Trainer,
            subclass_mode_data=True,
            seed_everything_default=42,
            parser_class=Parser,
            parser_kwargs={"prog": f"{PROG} {command}", "description": description},
            save_config_callback=None,  # it would save where the first logger is
            auto_configure_optimizers=False,
            run=False,
            args=arguments if isinstance(arguments, dict) else read_pipes(arguments),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that are neither the trainer's nor the model's nor the data's."""
        parser.add_argument("--name", type=str, help=f"Folder of the run, in {LOGS}.")
        parser.add_argument(
            "--num_threads",
            type=restricted_number_type("Threads", int, [(">", 0), ("<=", 1024)]),
            default=1,
            help="CPU threads of one process; more only pay for large networks.",
        )
        parser.add_argument(
            "--origin",
            type=dict[str, Any] | None,
            help="Study and trial that the config is of: written by tune, for report.",
        )
        if self.command in ("fit", "tune", EXECUTION):
            parser.add_argument(
                "--tensorboard", type=bool, default=True, help="Whether TensorBoard's events are written."
            )
            parser.add_argument(
                "--fast",
                type=bool,
                default=True,
                help="Whether steps go around hooks to which nothing listens.",
            )
        if self.command == "predict":
            parser.add_argument(
                "--output", type=str, default="predictions.csv", help="CSV file to write; must not exist yet."
            )
            parser.add_argument(
                "--images",
                type=str,
                nargs="+",
                help="Pictures to predict instead: files, folders, patterns.",
            )
            parser.add_argument("--sheet", action="store_true", help="Whether each has many digits, to be cut out.")
            parser.add_argument(
                "--explain",
                action="store_true",
                help="Whether to draw what speaks for class and runner-up.",
            )
        if hasattr(Trainer, self.command):
            skip = {"model", "datamodule", "weights_only", "return_predictions"}
            skip |= {f"{prefix}dataloaders" for prefix in ("", "train_", "val_")}
            self.method_options = parser.add_method_arguments(Trainer, self.command, as_group=False, skip=skip)
        parser.set_defaults(DEFAULTS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and take the network's hyper-parameters from the checkpoint."""
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)
        for group in ("trainer", "model", "data"):
            if not isinstance(self.config[group], Namespace):
                raise MisconfigurationException(
                    f"{group} must have keys of its own, and is not just {self.config[group]}."
                )
        for option in ("sheet", "explain"):
            if self.config.get(option) and not self.config.images:
                raise MisconfigurationException(f"--{option} is for the pictures of --images: name some.")
        if self.config.get("images"):  # whether a name was typed, or is in a config
            parser.set_defaults(name="")
            self.is_named = bool(parser.parse_args(args).name)
            parser.set_defaults(name=DEFAULTS["name"])
        data = self.config.data.init_args
        if data.data_dir is not None:  # config and checkpoint may be used in another folder
            data.data_dir = str(Path(data.data_dir).expanduser().absolute())
        if (
            self.config.seed_everything is None or self.config.seed_everything is False
        ):  # to Lightning, no seed: a run can be repeated all the same
            self.config.seed_everything = secrets.randbelow(2**32)
            note(f"Seed: --seed_everything {self.config.seed_everything}, drawn for this run")
        if not 0 <= self.config.seed_everything < 2**32:
            raise MisconfigurationException(f"seed_everything {self.config.seed_everything} is not from 0 to 2^32 - 1.")
        is_job = self.command == "fit" and isinstance(args, list) and SLURMEnvironment.detect()
        self.job = SlurmJob(args) if is_job else None  # an execution of a search has a config, no arguments
        self._settle(self.config)
        if "ckpt_path" in self.config:
            path = self._find_checkpoint()
            if path is not None:
                self._use_checkpoint(path, args)
        self._use_finders()
        if self.command != EXECUTION and not self.config.get("ckpt_path"):  # else the network is the checkpoint's
            for line in self.parser.remarks.values():  # type: ignore[attr-defined]
                note(line)
        trainer = self.config.trainer
        is_imitated = str(trainer.precision).startswith("bf16") and has_bf16(trainer.accelerator) is False
        if is_imitated and self.command != EXECUTION:
            note(
                f"Precision {trainer.precision} is imitated here, several times as slow as 32-true: the device has no "
                "instructions for bfloat16. --trainer.precision auto takes what the device is fast in."
            )

    @property
    def logs(self) -> Path:
        """Folder of all runs."""
        return Path(self.config.trainer.default_root_dir or ".", LOGS)

    def _find_checkpoint(self) -> Path | None:
        folder = self.logs / self.config.name
        if self.job is not None and (path := self.job.checkpoint(folder)):
            return path
        if self.config.get("images") and not (self.config.ckpt_path or self.is_named):
            return newest_result(self.logs)
        given = self.config.ckpt_path or ("last" if self.command != "fit" else None)
        if given in ("last", "best"):
            return newest_checkpoint(folder, given)
        return None if given is None else Path(given)

    def _use_checkpoint(self, path: Path, args: Sequence[str]) -> None:
        """Take what was not given from the checkpoint, and say where both differ.

        To continue a run is to take its whole config, to evaluate it is to take its data and precision.
        """
        if not path.is_file():
            raise MisconfigurationException(f"No checkpoint at {path}; `last` and `best` mean the newest run's.")
        with checkpoint_errors(path):
            checkpoint = load_checkpoint(path)
            checkpoint["state_dict"].keys()
            names = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
            saved = {group: {**checkpoint.get(name, {})} for group, name in names.items()}
            for parameters in saved.values():
                parameters.pop("_instantiator", None)
            class_path = saved["data"].pop("_class_path", DEFAULTS["data"]["class_path"])  # earlier versions had one
            saved["data"] = {"class_path": class_path, "init_args": saved["data"]}
            self.data_state = checkpoint.get(class_path.rpartition(".")[2])
            model = saved["model"]
            config = checkpoint["callbacks"].get(RunCheckpoint.__name__, {}).get("config")
            if config and self.command == "fit":
                saved = {**config, **saved}
            elif config:  # the numbers of `fit`, to the digit
                saved["trainer"] = {name: config["trainer"].get(name) for name in ("precision", "plugins")}
        self.parser.exit_on_error = False
        try:
            config = self.parser.parse_args([f"--config={json.dumps(saved)}", *args])
            self._check_paths(path, paths_in(self.plain_config(config)["trainer"], "trainer"))
            data = config.data.init_args
            data.data_dir = self.config.data.init_args.data_dir or data.data_dir
            self._settle(config)
            given = self.plain_config(config)
            if self.command == "fit":
                model |= {name: given["model"][name] for name in SCHEDULE}
            self.parser.is_shaped = False  # type: ignore[attr-defined]
            self.config = self.parser.parse_object({"model": model, "ckpt_path": str(path)}, config)
        except ArgumentError as error:
            raise MisconfigurationException(
                f"{path} cannot be used: its hyper-parameters are refused. {shorten(str(error))}"
            ) from error
        self.parser.exit_on_error = True
        for key, value in model.items():
            if given["model"].get(key, value) != value:
                note(f"The checkpoint's model.{key} is used, not the one given: {value}")
        if self.command != "fit":
            return
        if "trainer" not in saved:
            note(
                f"{path} is of an earlier version and does not hold the options of its trainer. To continue exactly, "
                f"add --config {path.absolute().parent.parent / 'config.yaml'}"
            )
        now = flatten(given)
        for key, value in flatten({**saved, "model": {}, "name": {}, "origin": {}}).items():
            if now.get(key, value) != value:
                note(f"Continuing with {key.replace('.init_args', '')} {now[key]}: the run had {value}")

    def _check_paths(self, checkpoint: Path, paths: dict[str, str]) -> None:
        """See that a checkpoint from elsewhere, which may be anybody's, lets nothing be written outside of the run.

        Raises:
            MisconfigurationException: If it does, and nobody has typed that.
        """
        typed = paths_in(self.plain_config()["trainer"]).values()
        foreign = {key: value for key, value in paths.items() if value not in typed}
        if foreign and not checkpoint.resolve().is_relative_to(self.logs.resolve()):
            key, value = next(iter(foreign.items()))
            raise MisconfigurationException(
                f"{checkpoint} is of no run in {self.logs}, and with its {key} {value} would write outside of the new "
                "run. Give the option yourself if that is meant."
            )

    def _use_finders(self) -> None:
        """Replace Lightning's BatchSizeFinder and LearningRateFinder by what they find, before the run begins.

        So the run is one with a plain batch size and learning rate, which its config says, and can be continued.

        Raises:
            MisconfigurationException: If there are several devices, on each of which they might find something else.
        """
        trainer = self.config.trainer
        given = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
        finders = [each for each in given if each and get_class(each.class_path) in FINDERS]
        if not finders:
            return
        trainer.callbacks = [each for each in given if each not in finders] or None
        if self.command not in ("fit", EXECUTION) or self.config.get("ckpt_path") or trainer.fast_dev_run:
            note(f"{get_class(finders[0].class_path).__name__} has nothing to do: no new training begins.")
            return
        if str(trainer.devices) != "1":
            raise MisconfigurationException(
                f"{get_class(finders[0].class_path).__name__} works on one device: find with --trainer.devices 1, then "
                "give what was found."
            )
        for finder in finders:
            kind, arguments = get_class(finder.class_path), {**vars(finder.init_args)}
            config = {key: value for key, value in self.plain_config().items() if key in ("name", *RUN_KEYS)}
            with tempfile.TemporaryDirectory() as folder:  # for the checkpoint to which they return
                config["trainer"] |= {"callbacks": None, "logger": False, "default_root_dir": folder}
                trial = RunCLI(EXECUTION, config)
                tuner: Any = Tuner(trial.trainer)
                if kind is LearningRateFinder:
                    key, arguments["num_training"] = "model.optimizer.init_args.lr", arguments.pop("num_training_steps")
                    arguments |= {"update_attr": False}
                    found = tuner.lr_find(trial.model, datamodule=trial.datamodule, **arguments).suggestion()
                else:
                    key = "data.init_args.batch_size"
                    found = tuner.scale_batch_size(trial.model, datamodule=trial.datamodule, **arguments)
            option = f"--{key.replace('.init_args', '')}"
            if found is None:
                note(f"{kind.__name__} found nothing in so few steps: {option} stays {self.config[key]}.")
            else:
                note(f"{kind.__name__} found {option} {found:.4g}, with which the run goes on.")
                self.config[key] = found

    def _settle(self, config: Namespace) -> None:
        """Let a config say what ``auto``, ``~`` and null mean here, so that whatever is made from it is alike.

        Raises:
            MisconfigurationException: If a value has no sense.
        """
        trainer = config.trainer
        for group, made in (("trainer", pl.Trainer), ("model", Classifier)):
            fill_nulls(config[group], made)
        fill_nulls(Namespace(data=config.data), ImageDataModule)
        for group in ("model", "data"):
            check_numbers(config[group], group)
        defaults = self.parser.get_defaults()
        for name in ("name", "num_threads", "tensorboard", "fast", "output"):
            if name in config and config[name] is None:
                config[name] = defaults[name]
        if "ckpt_path" in config and config.ckpt_path == "":
            config.ckpt_path = None
        for name in ("val_check_interval", "check_val_every_n_epoch", "accumulate_grad_batches"):
            if isinstance(value := trainer[name], int) and value < 1:
                raise MisconfigurationException(f"--trainer.{name} {value} must be at least 1.")
        for name in ("max_time", "val_check_interval"):
            if isinstance(trainer[name], str | dict):
                try:
                    Timer(trainer[name])
                except (MisconfigurationException, TypeError) as error:
                    raise MisconfigurationException(
                        f"--trainer.{name} {trainer[name]} must be days:hours:minutes:seconds, such as 00:00:10:00, or "
                        "a mapping such as {minutes: 10}."
                    ) from error
        trainer.precision = choose_precision(trainer.precision, trainer.accelerator)
        if trainer.default_root_dir is not None:
            if "://" in str(trainer.default_root_dir):
                raise MisconfigurationException(
                    f"--trainer.default_root_dir {trainer.default_root_dir} is a URL: runs are kept in a folder."
                )
            trainer.default_root_dir = str(Path(trainer.default_root_dir).expanduser())

    def plain_config(self, config: Namespace | None = None) -> dict[str, Any]:
        """A config, by default the command's own, complete and in types that YAML and JSON have."""
        plain: dict[str, Any] = json.loads(self.parser.dump(config or self.config, skip_none=False, format="json"))
        return plain

    def before_instantiate_classes(self) -> None:
        torch.set_num_threads(self.config.num_threads)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; a value that one of them refuses is the user's mistake."""
        self.options = chosen_classes(self.plain_config())
        try:
            super().instantiate_classes()
            if self.data_state is not None:  # which Lightning gives to data of the same class only
                self.datamodule.load_state_dict(self.data_state)
            self.model.check_images(self.datamodule.image_shape, len(self.datamodule.classes))
            if self.command in ("fit", EXECUTION):
                self._check_augmentation()
            optimizers = self.model.configure_optimizers()  # only to see now whether it can be done
            self._check_monitors(optimizers)
        except Exception as error:
            if isinstance(error, MisconfigurationException | ModuleNotFoundError | OSError):
                raise
            if not isinstance(error, TypeError | ValueError) and is_from_user_code(error):
                raise
            reason = explain(error, self.options)
            if str(error).startswith("Does not validate"):
                reason = shorten(str(error))
            path = self.config.get("ckpt_path")
            raise MisconfigurationException(f"{path} cannot be used: {reason}" if path else reason) from error
        # only a model made from a config has hyper-parameters that can be stored as plain types
        self.model.save_hyperparameters({**self.plain_config()["model"], "_instantiator": INSTANTIATOR})

    def _check_augmentation(self) -> None:
        """See that augmented images are of the size of the others.

        Raises:
            MisconfigurationException: If they are not.
        """
        shape = self.datamodule.image_shape
        images, labels = torch.zeros(2, *shape), torch.zeros(2, dtype=torch.long)
        with isolate_rng():  # the training must not draw other numbers
            for augment in self.datamodule.augmentation:
                images, labels = augment(images, labels)
                if images.shape != (2, *shape):
                    raise MisconfigurationException(
                        f"--data.augmentation {type(augment).__name__} makes images of shape {tuple(images.shape)} "
                        f"(batch, channels, height, width) of a batch of shape {(2, *shape)}."
                    )

    def _check_monitors(self, optimizers: Any) -> None:
        """See that what callbacks and the schedule follow will be logged, as far as nobody else can log.

        Raises:
            MisconfigurationException: If a metric will not be there.
        """
        followers: list[Any] = [*self.trainer.callbacks]  # type: ignore[attr-defined]
        if any(type(callback).__module__.partition(".")[0] not in ("lightning", __package__) for callback in followers):
            return
        logits = torch.zeros(1, len(self.datamodule.classes))  # to ask the network would draw its dropout
        values = self.model.metrics(logits, torch.zeros(1, dtype=torch.long), torch.zeros(()))
        known = ["lr", *(f"{stage}/{name}" for stage in ("train", "val") for name in values)]
        monitored = [(type(follower).__name__, getattr(follower, "monitor", None)) for follower in followers]
        if isinstance(optimizers, dict):
            monitored.append(("lr_scheduler", optimizers["lr_scheduler"]["monitor"]))
        for name, monitor in monitored:
            if monitor is not None and monitor not in known:
                raise MisconfigurationException(
                    f"{name} monitors {monitor}, which is not logged. These are: {', '.join(known)}."
                )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; that of a ``fit`` also gets all that a run folder holds."""
        options = self.config_init.trainer
        callbacks: list[Any] = []
        if self.command == EXECUTION:
            kwargs["enable_progress_bar"] = False
        elif options.barebones:
            if self.command in ("validate", "test"):
                raise MisconfigurationException(
                    f"--trainer.barebones logs nothing, and so {self.command} has no result."
                )
            note("With barebones nothing is logged, shown or kept.")
        elif options.enable_progress_bar is not False and not _has(options.callbacks, ProgressBar):
            callbacks.append(EpochProgressBar())
        kwargs["enable_model_summary"] = False  # Lightning's own shows no layers
        self.checkpoint: RunCheckpoint | None = None
        is_bare = options.logger is False or options.fast_dev_run or options.barebones
        self.keeps_run = self.command == "fit" and not is_bare
        if isinstance(options.logger, bool | None) or self.command not in ("fit", EXECUTION):
            kwargs["logger"] = False  # TensorBoard's is made where its folder is known
        if not self.keeps_run:
            kwargs["enable_checkpointing"] = False
        elif options.enable_checkpointing is not False:
            config = self.plain_config()
            self.checkpoint = RunCheckpoint({key: config[key] for key in ("name", "origin", *RUN_KEYS)})
            callbacks += [self.checkpoint, Figures(self.checkpoint)]
        given = options.plugins if isinstance(options.plugins, list) else [options.plugins] if options.plugins else []
        for plugin in given:
            if isinstance(plugin, LightningCheckpointIO):
                raise MisconfigurationException(
                    f"--trainer.plugins {type(plugin).__name__}: checkpoints are written by this package, whole or not "
                    "at all, and read without running code. Leave it out."
                )
        kwargs["plugins"] = [*given, CheckpointIO()]
        self.trainer_defaults["callbacks"] = callbacks
        trainer: Any = super().instantiate_trainer(**kwargs)
        if any(word in str(options.strategy) for word in ("spawn", "fork", "notebook")):
            raise MisconfigurationException(
                f"--trainer.strategy {options.strategy} starts processes that would have to copy the parser, which "
                "cannot be copied. --trainer.strategy ddp starts the command once for each device."
            )
        # Lightning checks it for several devices only: two processes of one device each would both be the first
        environment = trainer._accelerator_connector.cluster_environment
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)
        if self.command == "predict" and trainer.world_size > 1:
            raise MisconfigurationException("predict writes one file and runs on one device: --trainer.devices 1")
        if self.checkpoint is not None:  # before the user's own, whose files then hold the epoch's metrics too
            listeners: list[Callback] = trainer.callbacks
            listeners.remove(self.checkpoint)
            others = [isinstance(callback, Checkpoint) for callback in listeners]
            listeners.insert(others.index(True) if any(others) else len(others), self.checkpoint)
        trainer._checkpoint_connector = CheckpointConnector(trainer)
        trainer.fit_loop = FitLoop(trainer)
        if self.config_init.get("fast"):
            speed_up(trainer)
        return trainer  # type: ignore[no-any-return]


def read_pipes(words: Sequence[str]) -> list[str]:
    """Return arguments whose configs from pipes, as by ``--config <(...)``, are read: that can be done only once."""
    read = []
    for index, word in enumerate(words):
        option, sign, value = word.rpartition("=")
        if (option or words[index - 1]) in ("--config", "-c") and Path(value).is_fifo():
            text = Path(value).read_text(encoding="utf-8")
            try:
                word = f"{option}{sign}{json.dumps(yaml.safe_load(text))}"
            except (yaml.YAMLError, TypeError) as error:
                raise MisconfigurationException(f"{value} is not a config: {error}") from error
        read.append(word)
    return read


def paths_in(config: Any, key: str = "") -> dict[str, str]:
    """Return the values of a config that name a place where something is written, by their keys."""
    if isinstance(config, list):
        config = dict(enumerate(config))
    if isinstance(config, dict):
        return {name: path for part in config for name, path in paths_in(config[part], f"{key}.{part}").items()}
    is_path = re.search(r"(dir|path|file|filename|folder|uri|url|location)$", key) and not key.endswith("class_path")
    return {key.lstrip(".").replace(".init_args", ""): config} if is_path and isinstance(config, str) else {}


def chosen_classes(config: Any, option: str = "") -> dict[type, str]:
    """Return the classes that a config names, each with the option that does."""
    found: dict[type, str] = {}
    if isinstance(config, list):
        for each in config:
            found |= chosen_classes(each, option)
    elif isinstance(config, dict):
        with suppress(ImportError, AttributeError, KeyError, ValueError):
            found[get_class(config["class_path"])] = option
        for key, value in config.items():
            found |= chosen_classes(value, option if key == "init_args" else f"{option}.{key}".lstrip("."))
    return found


FINDERS = (BatchSizeFinder, LearningRateFinder)


def get_class(path: str) -> type:
    """Return the class that a path names."""
    module, _, name = path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _has(callbacks: Any, kind: type) -> bool:
    """Whether the user's callbacks, one or a list, have one of a kind."""
    given = callbacks if isinstance(callbacks, list) else [callbacks]
    return any(isinstance(callback, kind) for callback in given)


def fit(run: RunCLI) -> None:
    """Train, then evaluate on the test images: the weights of the last epoch and those of the best."""
    trainer, model, data, config = run.trainer, run.model, run.datamodule, run.config
    for stage in ("fit", "test"):  # all data is checked before anything is trained
        data.setup(stage)
    if trainer.is_global_zero:
        print(_describe(data))
        for name in ("train", "val", "test"):
            split = getattr(data, name)
            shapes = [tuple(tensor.shape) for tensor in (split.images, split.labels)]
            dtypes = [tensor.dtype for tensor in (split.scaled([0]), split.labels)]  # a batch would be augmented: draw
            print(f"  {name:5}  images {shapes[0]} {dtypes[0]}, labels {shapes[1]} {dtypes[1]}")
        if config.trainer.enable_model_summary is not False and not trainer.barebones:
            print(summarize(model, max_depth=2))
    run_dir = None
    if run.keeps_run:
        version = new_version(run.logs / config.name)
        run_dir = run.logs / config.name / f"version_{version}"
        if trainer.is_global_zero:
            (run_dir / "config.yaml").write_text(run.parser.dump(config, skip_none=False), encoding="utf-8")
        if config.tensorboard:
            own_logger = TensorBoardLogger(run.logs, config.name, version, default_hp_metric=False)
            trainer.loggers = [own_logger, *trainer.loggers]
        if run.checkpoint is not None:
            run.checkpoint.dirpath = str(run_dir / "checkpoints")
            if run.job is not None:
                run.job.watch(trainer, run_dir)
    try:
        with library_errors(run_dir, run.options):
            with isolate_rng():  # MLflow draws the name of a run
                _start_loggers(trainer.loggers)
            trainer.fit(model, datamodule=data, ckpt_path=config.ckpt_path)
    except MisconfigurationException:
        is_refused = run_dir is not None and not (run_dir / "checkpoints/last.ckpt").is_file()
        if trainer.is_global_zero and run_dir and is_refused:  # there is no run
            for logger in trainer.loggers:
                logger.finalize("failed")
            shutil.rmtree(run_dir)
            with suppress(OSError):  # others are there
                run_dir.parent.rmdir()
                run.logs.rmdir()
        raise
    except (SystemExit, OSError):  # Ctrl-C, a full disk
        if trainer.is_global_zero and run.checkpoint and Path(run.checkpoint.last_model_path).is_file():
            print(f"Continue: {command_line('fit', '--ckpt_path', run.checkpoint.last_model_path)}")
        raise
    if trainer.limit_test_batches != 0 and not trainer.barebones:
        _test(run, run_dir)
    if run_dir is not None and trainer.is_global_zero:
        print(f"\nRun: {run_dir}    Look at it: tensorboard --logdir {run.logs}")


def _start_loggers(loggers: Sequence[Any]) -> None:
    """See that what loggers need is there, such as an account or a server, before anything is trained."""
    for logger in loggers:
        try:
            logger.experiment  # noqa: B018
        except Exception as error:  # each has its own
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise MisconfigurationException(
                f"{type(logger).__name__} cannot be used: {reason}. Mend that, give it other arguments "
                "(--trainer.logger.…), or leave it."
            ) from error


def _describe(data: ImageDataModule) -> str:
    """The data in a line, once it is loaded."""
    parts = [f"Data: {data.source}", "standardised" if data.standardize else "scaled to [0, 1]"]
    if data.val is not None:
        of = "each class's training images" if data.is_split_by_class else "the training images"
        held_out = f"{data.val_split:.4g} of {of} held out"
        parts.append(f"{'its own images' if data.has_own_val else held_out} for validation")
    augmentation = ", ".join(type(each).__name__ for each in data.augmentation)
    if data.train is not None and augmentation:
        parts.append(f"augmented in training by {augmentation}, so that metrics of train are of augmented images")
    return ", ".join(parts)


def _test(run: RunCLI, run_dir: Path | None) -> None:
    """Evaluate what was trained, in the run's folder and as a table."""
    checkpoint, trainer = run.checkpoint, run.trainer
    epochs = checkpoint.history[-1]["epoch"] + 1 if checkpoint and checkpoint.history else trainer.current_epoch
    loggers, trainer.loggers = trainer.loggers, []
    trainer.profiler = PassThroughProfiler()  # type: ignore[attr-defined] # PyTorch's is used up by the training
    (results,) = trainer.test(run.model, datamodule=run.datamodule, verbose=False)
    for logger in loggers:
        logger.log_metrics(dict(results), step=trainer.global_step)
    rows: dict[str, dict[str, float]] = {f"last epoch ({epochs})": dict(results)}
    if checkpoint is not None and checkpoint.best_model_path:
        best = load_checkpoint(checkpoint.best_model_path)
        run.model.load_state_dict(best["state_dict"])
        (results,) = trainer.test(run.model, datamodule=run.datamodule, verbose=False)
        rows[f"best val/accuracy (epoch {best['epoch'] + 1})"] = dict(results)
    if not trainer.is_global_zero:
        return
    if run_dir is not None:
        write_csv(run_dir / "test.csv", [{"weights": name, **metrics} for name, metrics in rows.items()])
    if not all(math.isfinite(value) for metrics in rows.values() for value in metrics.values()):
        note("The training has diverged: some of its weights are no numbers. A smaller learning rate may help.")
    titles = ["weights after the", *(name.replace("/", " ").replace("_", " ") for name in results)]
    cells = [[weights, *(f"{value:.4f}" for value in metrics.values())] for weights, metrics in rows.items()]
    print(f"\n{format_table([titles, *cells])}")


def predict(run: RunCLI) -> None:
    """Write true label, predicted label and the probabilities of each test image."""
    output = Path(run.config.output)
    if output.exists():
        raise MisconfigurationException(f"{output} exists and is not overwritten: choose another --output.")
    output.parent.mkdir(parents=True, exist_ok=True)
    import pandas as pd  # takes a while, and only this command needs it

    run.datamodule.setup("predict")
    note(_describe(run.datamodule))
    if run.trainer.limit_predict_batches == 0:
        raise MisconfigurationException("--trainer.limit_predict_batches 0 leaves nothing to predict.")
    batches: Any = run.trainer.predict(run.model, datamodule=run.datamodule, ckpt_path=run.config.ckpt_path)
    check_finite(torch.cat(batches), run.config.ckpt_path)
    probabilities = torch.cat(batches).numpy()
    names = np.array(run.datamodule.names(probabilities.shape[1]))
    table = pd.DataFrame(probabilities, columns=names).add_prefix("probability_")
    table.insert(0, "label", names[run.datamodule.test.labels[: len(table)]])
    table.insert(1, "predicted", names[probabilities.argmax(axis=1)])
    with atomic_write(output, overwrite=False) as partial:
        table.to_csv(partial, index_label="index", encoding="utf-8")
    print(f"{len(table)} predictions of {run.config.ckpt_path} in {output}")


def predict_pictures(run: RunCLI) -> None:
    """Write and print class, probability and runner-up of each picture, and draw what the network sees of it."""
    output, data, checkpoint = Path(run.config.output), run.datamodule, run.config.ckpt_path
    if not output.name or output.suffix == ".png":
        raise MisconfigurationException("--output names the CSV file; the pictures are drawn beside it, as .png.")
    sheet = output.with_suffix(".png")
    for path in (output, sheet):
        if path.exists():
            raise MisconfigurationException(f"{path} exists and is not overwritten: choose another --output.")
    output.parent.mkdir(parents=True, exist_ok=True)
    note(f"Network: {checkpoint}, of {data.source}")
    places, images, skipped = [], [], 0
    for path, problem in find(run.config.images):
        try:
            if problem:
                raise PictureError(problem)
            picture, remark = read(path)
            found = data.from_picture(picture, run.config.sheet)
        except PictureError as error:
            print(f"{path} is left out: {error}", file=sys.stderr)
            skipped += 1
            continue
        if remark:
            print(f"{path}: {remark}", file=sys.stderr)
        file = str(path).encode(errors="backslashreplace").decode()  # a name may be no UTF-8
        places += [(file, number + 1) for number in range(len(found))]
        images.append(found)
    if not images:
        raise MisconfigurationException("There is nothing to predict: none of --images can be used.")
    if data.standardize or run.config.explain:  # by the training images
        data.setup("fit")
    statistics = data.train.statistics if data.train else None
    stacked = torch.from_numpy(np.concatenate(images))
    data.test = Split(stacked, torch.zeros(len(stacked), dtype=torch.long), statistics=statistics)
    batches: Any = run.trainer.predict(run.model, datamodule=data, ckpt_path=checkpoint)
    probabilities = torch.cat(batches).float()
    check_finite(probabilities, checkpoint)
    names = data.names(probabilities.shape[1])
    best = probabilities.topk(2)
    rows = []
    for (file, number), values, indices in zip(places, best.values.tolist(), best.indices.tolist(), strict=False):
        rows.append({"file": file} | ({"number": number} if run.config.sheet else {}))
        rows[-1] |= {"class": names[indices[0]], "probability": values[0]}
        rows[-1] |= {"runner_up": names[indices[1]], "runner_up_probability": values[1]}
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    print(format_table([[title.replace("_", " ") for title in rows[0]], *cells]))
    shown = range(min(SHOWN, len(rows)))
    titles = [f"{Path(places[i][0]).name[-14:]}\n{rows[i]['class']}  {rows[i]['probability']:.1%}" for i in shown]
    drawn = figures.pictures(data.test.scaled(shown))
    if run.config.explain:  # each picture beside the image
        assert data.train is not None
        pairs = best.indices[: len(shown)].T
        attributions = integrated_gradients(run.model.network, data.test.scaled(shown), data.train, *pairs)
        explained = figures.colored(drawn, smoothed(attributions))
        drawn = np.stack([figures.colored(drawn), explained], axis=1).reshape(-1, *explained.shape[1:])
        reasons = [f"orange: {rows[i]['class']}\nblue: {rows[i]['runner_up']}" for i in shown]
        titles = [title for pair in zip(titles, reasons, strict=True) for title in pair]
    grid = figures.image_grid(drawn, titles, columns=min(10, len(titles)))
    pixels = figures.render(grid)  # before anything is written
    write_csv(output, rows, overwrite=False)
    with atomic_write(sheet, overwrite=False) as partial:
        Image.fromarray(pixels).save(partial, "PNG")
    limit = f" (the first {SHOWN})" if len(rows) > SHOWN else ""
    left_out = f", {skipped} left out" if skipped else ""
    print(f"{len(rows)} predictions of {checkpoint} in {output}{left_out}; what the network sees{limit}: {sheet}")


def main(command: str, description: str, arguments: Sequence[str]) -> None:
    """Run a command."""
    quieten_lightning()
    with user_errors(), corrected():
        run = RunCLI(command, arguments, description)
        leave_as_usual()
        if command == "fit":
            fit(run)
        elif command == "predict":
            (predict_pictures if run.config.images else predict)(run)
        else:
            run.datamodule.setup(command)
            note(_describe(run.datamodule))
            options = {name: run.config[name] for name in run.method_options}
            getattr(run.trainer, command)(run.model, datamodule=run.datamodule, **options)


def quieten_lightning() -> None:
    """Leave out Lightning's tips, and its warnings of what is meant."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    for message in (
        ".*does not have many workers",  # the data is in memory
        ".*smaller than the logging interval",  # metrics are logged once an epoch
        ".*torch.jit.trace",  # TensorBoard's graph is made with it
        ".*callbacks used to create the checkpoint",  # RunCheckpoint, which only `fit` needs
        ".*LeafSpec",  # Lightning's own
        ".*GrpcStorageProxy is experimental",
    ):
        warnings.filterwarnings("ignore", message)
