"""The commands and their options: a LightningCLI whose defaults are the notebook's."""

import importlib
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ArgumentError, Namespace, _typehints, set_parsing_settings
from jsonargparse.typing import restricted_number_type
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_summary import summarize
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mnist_lightning.callbacks import EpochProgressBar, Figures
from mnist_lightning.checkpoints import (
    INSTANTIATOR,
    CheckpointConnector,
    CheckpointIO,
    RunCheckpoint,
    checkpoint_errors,
)
from mnist_lightning.classifier import Classifier
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.loops import FitLoop, NoProfiler
from mnist_lightning.runs import (
    LOGS,
    PROG,
    atomic_write,
    format_table,
    new_version,
    newest_checkpoint,
    newest_file,
    user_errors,
    write_csv,
)


class Parser(LightningArgumentParser):
    """Says what is wrong in one line instead of a page of usage."""

    def parse_path(self, cfg_path: Any, **kwargs: Any) -> Namespace:
        """Parse a config file, once it is known to be one that can be parsed."""
        try:
            nodes = [yaml.safe_load(Path(cfg_path).read_text(encoding="utf-8"))]
            for count, node in enumerate(nodes):  # grows; aliases may stand for billions of nodes, or for themselves
                nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
                if count > 10_000:
                    raise ValueError("it has too many values")
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self.error(f"{cfg_path} is no config: {error}", error)
        config: Namespace = super().parse_path(cfg_path, **kwargs)
        return config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and end with exit code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        print(f"error: {' '.join(message.split())}\nAll options: add --help", file=sys.stderr)
        self.exit(2)


def _discard_defaults(original: Callable[..., None]) -> Callable[..., None]:
    """Make a class that is exchanged for another take its defaults along.

    jsonargparse hands every argument that both classes have to the new one, even one that nobody gave: SGD would train
    with Adam's default learning rate. Here only values other than the old class's defaults are handed on.
    """

    def discard(parser: Any, previous: Any, value: Any) -> None:
        if isinstance(previous, Namespace) and "init_args" in previous and previous.class_path != value["class_path"]:
            module, _, name = previous.class_path.rpartition(".")
            parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
            for key, given in list(previous.init_args.items(branches=True, nested=False)):
                default = parameters[key].default if key in parameters else None
                if given == (list(default) if isinstance(given, list) and isinstance(default, tuple) else default):
                    previous.init_args.pop(key)
        original(parser, previous, value)

    return discard


def _require_class(original: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Refuse a function as the class path of a callable: jsonargparse would call any, with arguments of the config."""

    def adapt(callable_type: Any, spec: Any) -> tuple[Any, Any]:
        spec, skipped = original(callable_type, spec)
        if not inspect.isclass(_typehints.import_object(spec["class_path"])):
            raise ImportError(f"{spec['class_path']} is no class")
        return spec, skipped

    return adapt


_typehints.discard_init_args_on_class_path_change = _discard_defaults(_typehints.discard_init_args_on_class_path_change)
_typehints.adapt_partial_callable_class = _require_class(_typehints.adapt_partial_callable_class)
# a config or checkpoint may be anybody's: only classes of the type that a key wants are made, none of os or subprocess
set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=[])


class RunCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict``, of which only the chosen command's options are built.

    Args:
        command: The chosen command.
        description: What it does, for its ``--help``.
        args: Command-line arguments including the command, by default those of the process.
    """

    run_trainer: type[Trainer] = Trainer
    run_epochs = 20
    run_name = "baseline"

    def __init__(self, command: str, description: str, args: ArgsType = None) -> None:
        self.command = command
        super().__init__(
            Classifier,
            MNISTDataModule,
            trainer_class=self.run_trainer,
            # the notebook's network is too small to share: one device, unless asked for more
            trainer_defaults={"max_epochs": self.run_epochs, "devices": 1, "num_sanity_val_steps": 0},
            seed_everything_default=42,
            parser_class=Parser,
            parser_kwargs={"prog": PROG, command: {"description": description}},
            auto_configure_optimizers=False,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The chosen command, with the arguments of its Trainer method that are no options."""
        skip = super().subcommands().get(self.command, {"model", "datamodule"})
        return {self.command: {*skip, "weights_only", "return_predictions"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that are neither the trainer's nor the model's nor the data's."""
        parser.add_argument("--name", type=str, default=self.run_name, help=f"Folder of the run, in {LOGS}.")
        parser.add_argument(
            "--num_threads",
            type=restricted_number_type("Threads", int, [(">", 0), ("<=", 1024)]),
            default=1,
            help="CPU threads of one process; more only pay for large networks.",
        )
        parser.set_defaults({"model.network": {"class_path": "mnist_lightning.networks.MLP"}})
        if self.command == "predict":
            parser.add_argument(
                "--output", type=str, default="predictions.csv", help="CSV file to write; must not exist yet."
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and find and check the checkpoint."""
        self.config = parser.parse_object(args) if isinstance(args, dict | Namespace) else parser.parse_args(args)
        options = self.config[self.command]
        for group in ("trainer", "model", "data"):
            if not isinstance(options[group], Namespace):
                raise MisconfigurationException(f"{group} must have keys of its own, and is not just {options[group]}.")
        if not 0 <= options.seed_everything < 2**32:
            raise MisconfigurationException(f"seed_everything {options.seed_everything} is not from 0 to 2^32 - 1.")
        self.logs = Path(options.trainer.default_root_dir or ".", LOGS)
        if "ckpt_path" not in options:
            return
        if self.command == "fit" and SLURMEnvironment.detect():
            array = [os.environ[key] for key in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID") if key in os.environ]
            self.job = "_".join(array or [os.environ["SLURM_JOB_ID"]])
            # a job may run several commands; when it is requeued, each goes on from its own last epoch
            self.mark = f"slurm_{self.job}_{zlib.crc32(' '.join(map(str, args or ())).encode()):08x}"
            runs = [path.parent for path in (self.logs / options.name).glob(f"version_*/{self.mark}")]
            last = newest_file(path for run in runs if (path := run / "checkpoints/last.ckpt").is_file())
            if last is not None and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
                options.ckpt_path = str(last)
        if options.ckpt_path is None and self.command != "fit":
            options.ckpt_path = "last"
        if options.ckpt_path in ("last", "best"):
            options.ckpt_path = str(newest_checkpoint(self.logs / options.name, options.ckpt_path))
        if options.ckpt_path is not None:
            self._check_checkpoint(options.ckpt_path)

    def _check_checkpoint(self, path: str) -> None:
        """Refuse what is no checkpoint, and say what it will override."""
        if not Path(path).is_file():
            raise MisconfigurationException(f"No checkpoint at {path}; `last` and `best` mean the newest run's.")
        with checkpoint_errors(path):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            names = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
            saved = {group: {**checkpoint.get(name, {})} for group, name in names.items()}
            checkpoint["state_dict"].keys()
        parser = self._parser(self.command)
        given, default = (
            json.loads(parser.dump(config, skip_none=False, format="json"))
            for config in (self.config[self.command], parser.get_defaults())
        )
        for group in ("model", "data") if self.command == "fit" else ("model",):
            for key, value in given[group].items():
                if value == saved[group].get(key, value):
                    continue
                if group == "data":
                    rank_zero_warn(
                        f"Continuing with data.{key} {value}, but {path} was trained with {saved[group][key]}. "
                        f"To continue exactly, add --config {Path(path).absolute().parent.parent / 'config.yaml'}"
                    )
                elif value != default[group][key]:
                    rank_zero_warn(f"The checkpoint's model.{key} is used, not the one given: {saved[group][key]}")

    def _parse_ckpt_path(self) -> None:
        self.parser.exit_on_error = False
        try:
            super()._parse_ckpt_path()
        except ArgumentError as error:
            raise MisconfigurationException(
                f"{self.config[self.command].ckpt_path} cannot be used: its hyper-parameters are refused. "
                f"{' '.join(str(error).split())}"
            ) from error
        self.parser.exit_on_error = True

    def before_instantiate_classes(self) -> None:
        """Set up this process."""
        torch.set_num_threads(self.config[self.command].num_threads)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; a value that one of them refuses is the user's mistake."""
        try:
            super().instantiate_classes()
            self.model.configure_optimizers()  # only to see now whether it can be done
        except (TypeError, ValueError, RuntimeError) as error:
            path = self.config[self.command].get("ckpt_path")
            raise MisconfigurationException(f"{path} cannot be used: {error}" if path else str(error)) from error
        # only a model made from a config has hyper-parameters that can be stored as plain types
        config = json.loads(self._parser(self.command).dump(self.config[self.command], skip_none=False, format="json"))
        self.model.save_hyperparameters({**config["model"], "_instantiator": INSTANTIATOR})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; a ``fit`` with a logger also gets all that a run folder holds."""
        options = self.config_init[self.command].trainer
        callbacks: list[Any] = []
        if options.enable_progress_bar is not False:
            callbacks.append(EpochProgressBar())
        kwargs["enable_model_summary"] = False  # Lightning's own shows no layers
        if options.profiler is None:
            kwargs["profiler"] = NoProfiler()
        self.checkpoint: RunCheckpoint | None = None
        self.keeps_run = self.command == "fit" and options.logger is not False and not options.fast_dev_run
        if not self.keeps_run:
            self.save_config_callback = None
            kwargs.update(logger=False, enable_checkpointing=False)
        elif options.enable_checkpointing is not False:
            self.checkpoint = RunCheckpoint()
            callbacks += [self.checkpoint, Figures(self.checkpoint)]
        kwargs["plugins"] = [*(options.plugins or []), CheckpointIO()]
        self.trainer_defaults["callbacks"] = callbacks
        trainer = super().instantiate_trainer(**kwargs)
        # Lightning checks it for several devices only: two processes of one device each would both be the first
        environment = trainer._accelerator_connector.cluster_environment
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)
        if self.command == "predict" and trainer.world_size > 1:
            raise MisconfigurationException("predict writes one file and runs on one device: --trainer.devices 1")
        trainer._checkpoint_connector = CheckpointConnector(trainer)
        trainer.fit_loop = FitLoop(trainer)
        return trainer

    def fit(self, model: LightningModule, datamodule: MNISTDataModule, ckpt_path: str | None) -> None:
        """Train, then evaluate on the test images: the weights of the last epoch and those of the best."""
        for stage in ("fit", "test"):  # all data is checked before anything is trained
            datamodule.setup(stage)
        if self.trainer.is_global_zero:
            source = datamodule.data_dir or "the package's own MNIST"
            print(f"Data: {source}, scaled to [0, 1]")
            for name in ("train", "val", "test"):
                split = getattr(datamodule, name)
                shapes = [tuple(tensor.shape) for tensor in (split.images, split.labels)]
                dtypes = [tensor.dtype for tensor in split.__getitems__([0])]
                print(f"  {name:5}  images {shapes[0]} {dtypes[0]}, labels {shapes[1]} {dtypes[1]}")
            if self.config[self.command].trainer.enable_model_summary is not False:
                print(summarize(model, max_depth=2))
        if self.keeps_run and self.config[self.command].trainer.logger is None:
            name = self.config[self.command].name
            version = new_version(self.logs / name)
            self.trainer.loggers = [TensorBoardLogger(self.logs, name, version, default_hp_metric=False)]
            environment = self.trainer._accelerator_connector.cluster_environment
            if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and self.checkpoint:
                # Lightning's own handler saves in the middle of a step, where processes may block each other for ever,
                # and every other job in the folder would continue from that file
                signal.signal(environment.requeue_signal or signal.SIGUSR1, self._requeue)
                if self.trainer.is_global_zero:
                    (self.logs / name / f"version_{version}" / self.mark).touch()
        try:
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        except (SystemExit, OSError):  # Ctrl-C, a full disk
            if self.trainer.is_global_zero and self.checkpoint and Path(self.checkpoint.last_model_path).is_file():
                config = self.checkpoint.run_dir / "config.yaml"
                print(f"Continue: {PROG} fit --config {config} --ckpt_path {self.checkpoint.last_model_path}")
            raise
        self._evaluate(model, datamodule)

    def _requeue(self, *_: Any) -> None:
        if self.trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", self.job], check=False)  # noqa: S607

    def _evaluate(self, model: LightningModule, datamodule: MNISTDataModule) -> None:
        loggers, self.trainer.loggers = self.trainer.loggers, []
        (results,) = self.trainer.test(model, datamodule=datamodule, verbose=False)
        for logger in loggers:
            logger.log_metrics(dict(results), step=self.trainer.global_step)
        rows: dict[str, dict[str, float]] = {f"last epoch ({self.trainer.current_epoch})": dict(results)}
        if self.checkpoint is not None and self.checkpoint.best_model_path:
            best = max(self.checkpoint.history, key=lambda row: row.get("val/accuracy", 0.0))
            weights = torch.load(self.checkpoint.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
            model.load_state_dict(weights)
            (results,) = self.trainer.test(model, datamodule=datamodule, verbose=False)
            rows[f"best val/accuracy (epoch {best['epoch'] + 1})"] = dict(results)
        if not self.trainer.is_global_zero:
            return
        if self.checkpoint is not None:
            write_csv(
                self.checkpoint.run_dir / "test.csv", [{"weights": name, **metrics} for name, metrics in rows.items()]
            )
        names = list(results)
        cells = [[weights, *(f"{metrics[name]:.4f}" for name in names)] for weights, metrics in rows.items()]
        print(
            "\n"
            + format_table(
                [["weights after the", *(name.replace("/", " ").replace("_", " ") for name in names)], *cells]
            )
        )
        if loggers:
            print(f"\nRun: {loggers[0].log_dir}    Look at it: tensorboard --logdir {self.logs}")

    def predict(self, model: LightningModule, datamodule: MNISTDataModule, ckpt_path: str) -> None:
        """Write true label, predicted label and the ten probabilities of each test image."""
        output = Path(self.config[self.command].output)
        if output.exists():
            raise MisconfigurationException(f"{output} exists and is not overwritten: choose another --output.")
        import pandas as pd  # takes a while, and only this command needs it

        batches: Any = self.trainer.predict(model, datamodule=datamodule, ckpt_path=ckpt_path)
        probabilities = torch.cat(batches).numpy()
        table = pd.DataFrame(probabilities).add_prefix("probability_")
        assert datamodule.test is not None
        table.insert(0, "label", datamodule.test.labels[: len(table)].numpy())
        table.insert(1, "predicted", probabilities.argmax(axis=1))
        with atomic_write(output) as partial:
            table.to_csv(partial, index_label="index")
        print(f"{len(table)} predictions of {ckpt_path} in {output}")


def main(command: str, description: str, arguments: list[str]) -> None:
    """Run a command that has a trainer."""
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
    with user_errors():
        if command == "tune":
            from mnist_lightning.tuning import TuneCLI  # takes a while, and only this command needs it

            TuneCLI(command, description, [command, *arguments])
        else:
            RunCLI(command, description, [command, *arguments])
