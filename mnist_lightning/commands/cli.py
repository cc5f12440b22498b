"""Base of the commands: a LightningCLI whose defaults are the notebook's."""

import json
import logging
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, Checkpoint, LearningRateFinder, ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO as LightningCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import mnist_lightning.augmentation  # noqa: F401 - jsonargparse finds its classes by their short names
import mnist_lightning.datasets  # noqa: F401
from mnist_lightning.classifier import Classifier
from mnist_lightning.commands.model import named_class
from mnist_lightning.commands.parsing import (
    SIZE_ARGUMENTS,
    UNKNOWN_SIZE,
    Parser,
    check_numbers,
    fill_nulls,
    fill_sizes,
    patched_jsonargparse,
    shorten,
)
from mnist_lightning.data import ImageDataModule
from mnist_lightning.system.console import PROG, rank_zero_print
from mnist_lightning.system.errors import UserError, explain, is_for_users, is_from_user_code, user_errors
from mnist_lightning.system.nested import as_list
from mnist_lightning.system.signals import leave_as_usual
from mnist_lightning.training.checkpoints import INSTANTIATOR, CheckpointConnector, CheckpointIO, FitLoop
from mnist_lightning.training.fast import speed_up
from mnist_lightning.training.precision import Trainer, choose_precision, has_bf16
from mnist_lightning.training.progress import CellProgressBar, EpochProgressBar, is_in_cell
from mnist_lightning.training.runs import LOGS, newest_checkpoint
from mnist_lightning.training.saved_run import SavedRun

DEFAULTS: dict[str, Any] = {
    "name": "baseline",
    "trainer.max_epochs": 20,
    "trainer.devices": 1,  # the notebook's network is too small to share
    "trainer.num_sanity_val_steps": 0,
    "model.network": {"class_path": "mnist_lightning.networks.MLP"},
    "data": {"class_path": "mnist_lightning.data.MNISTDataModule"},
}
"""Defaults that differ from Lightning's, and values for options without a default."""

TRAINING_OPTIONS = (
    *("trainer.max_epochs", "trainer.accelerator", "trainer.devices", "trainer.precision", "trainer.callbacks"),
    *("data", "data.data_dir", "data.batch_size", "data.val_split", "data.augmentation"),
    *("model.network", "model.optimizer", "model.lr_scheduler"),
)
"""The training options that users change most often."""

FINDERS = (BatchSizeFinder, LearningRateFinder)


class RunCLI(LightningCLI):
    """Parse the options of a command and build data module, model and trainer from them.

    A command is a subclass with its own options and a :meth:`run` method.

    Args:
        command: Name of the command.
        arguments: Command-line arguments, or a config.
        description: What the command does, for its ``--help``.
        objects: Arguments of the trainer that are objects, such as callbacks; the config cannot hold them.

    Attributes:
        trains: Whether the command trains; only then are the user's loggers used.
        default_checkpoint: The checkpoint to use if none is given: ``last``, or None for no checkpoint.
        common_options: Options of trainer, model and data that the command's short help lists.
        given_over_saved: Arguments of the model for which the given value takes precedence over the checkpoint's.
        saved: The run of the checkpoint, if one is used.
        options: From each class that the config names to the option that names it.
    """

    parser: Parser
    datamodule: ImageDataModule
    model: Classifier
    model_class: type[Classifier]
    trainer: Trainer

    trains = False
    default_checkpoint: str | None = None
    common_options: Sequence[str] = (
        *("trainer.accelerator", "trainer.devices", "trainer.precision"),
        *("data", "data.data_dir", "data.eval_batch_size"),
    )
    given_over_saved: Sequence[str] = ("metrics",)

    def __init__(
        self,
        command: str,
        arguments: Sequence[str] | dict[str, Any],
        description: str = "",
        objects: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.command = command
        self.words = () if isinstance(arguments, dict) else tuple(arguments)
        self.objects = objects
        self.saved: SavedRun | None = None
        arguments = arguments if isinstance(arguments, dict) else read_pipes(arguments)
        self.named = named_class(arguments)
        super().__init__(
            self.named or Classifier,
            ImageDataModule,
            trainer_class=Trainer,
            subclass_mode_data=True,
            seed_everything_default=42,
            parser_class=Parser,
            parser_kwargs={"prog": f"{PROG} {command}", "description": description},
            save_config_callback=None,  # it would save in the first logger's folder
            auto_configure_optimizers=False,
            run=False,
            args=arguments,
        )

    @classmethod
    def main(cls, command: str, description: str, arguments: Sequence[str]) -> None:
        """Run the command as a process; a user's mistake ends it with one line."""
        quieten_lightning()
        with user_errors(), patched_jsonargparse():
            run = cls(command, arguments, description)
            leave_as_usual()
            run.run()

    def run(self) -> None:
        """Run the command, after its options are parsed and its objects are built."""
        raise NotImplementedError

    def say(self, line: str) -> None:
        """Tell the user something about the options."""
        rank_zero_print(line)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the trainer, the model and the data, and a key for the class of the user's own model."""
        if self.model_class is not Classifier:
            path = f"{self.model_class.__module__}.{self.model_class.__qualname__}"
            parser.add_argument("--model.class_path", type=str, default=path, help="Class of the model.")
        super().add_core_arguments_to_parser(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that do not belong to the trainer, the model or the data."""
        self.parser.common_options = self.common_options
        parser.add_argument("--name", type=str, help=f"Folder of the run, in {LOGS}.")
        parser.add_argument(
            "--num_threads",
            type=restricted_number_type("Threads", int, [(">", 0), ("<=", 1024)]),
            default=1,
            help="CPU threads per process; more than one pays off only for large networks.",
        )
        parser.add_argument(
            "--origin",
            type=dict[str, Any] | None,
            help="Study and trial of the config: tune writes it, report reads it.",
        )
        values = DEFAULTS | {f"model.{name}": UNKNOWN_SIZE for name in SIZE_ARGUMENTS}
        given = parser.get_defaults()  # a model of the user's own may make its network itself, or have a default
        missing = [key for key in values if not key.startswith("model.") or given.get(key, UNKNOWN_SIZE) is None]
        parser.set_defaults({key: values[key] for key in missing})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, and take what is missing from the checkpoint."""
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)
        self.normalize(self.config)
        path = self.find_checkpoint()
        if path is not None:
            self.use_checkpoint(path, args)
        seed = self.config.seed_everything
        if seed is None or seed is False:  # Lightning would set no seed, and the run could not be repeated
            seed = self.config.seed_everything = secrets.randbelow(2**32)
            self.say(f"Seed: --seed_everything {seed}, drawn for this run")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed_everything {seed} must be from 0 to 2^32 - 1.")
        self.use_finders()
        trainer = self.config.trainer
        if str(trainer.precision).startswith("bf16") and has_bf16(trainer.accelerator) is False:
            self.say(
                f"Precision {trainer.precision} is emulated here, several times slower than 32-true: the device has no "
                "bfloat16 instructions. --trainer.precision auto chooses a fast precision."
            )

    @property
    def logs(self) -> Path:
        """The folder of all runs."""
        return Path(self.config.trainer.default_root_dir or ".", LOGS)

    def find_checkpoint(self) -> Path | None:
        """Return the path of the checkpoint to use, or None.

        Raises:
            UserError: If the newest run's checkpoint is wanted and no run has one.
        """
        given = self.config.get("ckpt_path") or self.default_checkpoint
        if given in ("last", "best"):
            return newest_checkpoint(self.logs / self.config.name, given)
        return None if given is None else Path(given)

    def saved_options(self, saved: SavedRun) -> dict[str, Any]:
        """Return what a checkpoint provides besides model and data: the options that affect the results of ``fit``."""
        if not saved.config:
            return {}
        return {"trainer": {name: saved.config["trainer"].get(name) for name in ("precision", "plugins")}}

    def use_checkpoint(self, path: Path, args: Sequence[str]) -> None:
        """Parse again with the checkpoint's values as defaults; the model is always the checkpoint's.

        Raises:
            UserError: If the checkpoint cannot be used.
        """
        if not path.is_file():
            raise UserError(
                f"There is no checkpoint at {path}. Give another path, or last or best for that of the newest run."
            )
        self.saved = SavedRun.read(path)
        found = self.saved.model_class
        if self.named not in (None, found):
            raise UserError(f"{path} holds a {found.__name__}, not a {self.named.__name__}: leave out --model.")
        if found is not self.model_class:  # the parser has the options of another class
            self.model_class = self._model_class = found
            self.setup_parser(False, self.parser_kwargs, {})
        values = {**self.saved_options(self.saved), "model": self.saved.model, "data": self.saved.data}
        self.parser.exit_on_error = False
        try:
            config = self.parser.parse_args([f"--config={json.dumps(values)}", *args])
            self._check_paths(path, paths_in(self.plain_config(config)["trainer"], "trainer"))
            self.normalize(config)
            given = self.plain_config(config)["model"]
            model = self.saved.model | {name: given[name] for name in self.given_over_saved if name in given}
            self.config = self.parser.parse_object({"model": model, "ckpt_path": str(path)}, config)
        except ArgumentError as error:
            reason = shorten(str(error))
            if "unrecognized arguments" in reason:  # typed, but its class has no such argument
                raise UserError(f"{reason}: {path} has a model of the class {found.__name__}.") from error
            raise UserError(f"{path} cannot be used: its hyper-parameters are invalid. {reason}") from error
        self.parser.exit_on_error = True
        for key, value in model.items():
            if given.get(key, value) != value:
                self.say(f"model.{key} is {value}, as in the checkpoint: the given value is not used")

    def _check_paths(self, checkpoint: Path, paths: dict[str, str]) -> None:
        """Check that a checkpoint from elsewhere, which may be untrusted, makes nothing write outside the new run.

        Raises:
            UserError: If it sets such a path, and the user has not typed that path.
        """
        typed = paths_in(self.plain_config()["trainer"]).values()
        foreign = {key: value for key, value in paths.items() if value not in typed}
        if foreign and not checkpoint.resolve().is_relative_to(self.logs.resolve()):
            key, value = next(iter(foreign.items()))
            raise UserError(
                f"{checkpoint} is not from a run in {self.logs}, and with its {key} {value} would write outside the "
                "new run. If you want that, give the option yourself."
            )

    def use_finders(self) -> None:
        """Remove Lightning's BatchSizeFinder and LearningRateFinder, which only a new training needs."""
        for finder in self.take_finders():
            self.say(f"{resolve_name(finder.class_path).__name__} is not used: it needs a new training.")
            return

    def take_finders(self) -> list[Namespace]:
        """Remove Lightning's finders from the callbacks and return them."""
        trainer = self.config.trainer
        given = as_list(trainer.callbacks)
        finders = [each for each in given if each and resolve_name(each.class_path) in FINDERS]
        if finders:
            trainer.callbacks = [each for each in given if each not in finders] or None
        return finders

    def normalize(self, config: Namespace) -> None:
        """Replace ``auto``, ``~`` and null in a config by their meaning on this machine.

        Raises:
            UserError: If a value is invalid.
        """
        for group in ("trainer", "model", "data"):
            if not isinstance(config[group], Namespace):
                raise UserError(f"{group} must be a mapping of options, not {config[group]}.")
        for group, made in (("trainer", pl.Trainer), ("model", self.model_class)):
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
        data = config.data.init_args
        if data.data_dir is not None:  # config and checkpoint may be used from another folder
            data.data_dir = str(Path(data.data_dir).expanduser().absolute())
        check_times(config.trainer)
        config.trainer.precision = choose_precision(config.trainer.precision, config.trainer.accelerator)
        folder = config.trainer.default_root_dir
        if folder is not None:
            if "://" in str(folder):
                raise UserError(f"--trainer.default_root_dir {folder} is a URL: give a local folder.")
            config.trainer.default_root_dir = str(Path(folder).expanduser())

    def plain_config(self, config: Namespace | None = None) -> dict[str, Any]:
        """Return a complete config, by default the command's own, in types that YAML and JSON can hold."""
        if config is not None and hasattr(self, "datamodule"):
            fill_sizes(config, self.datamodule)
        text = self.parser.dump(config or self.config, skip_unset=False, skip_validation=True, format="json")
        plain: dict[str, Any] = json.loads(text)
        return plain

    def before_instantiate_classes(self) -> None:
        torch.set_num_threads(self.config.num_threads)

    def instantiate_classes(self) -> None:
        """Build data module, model and trainer; report a value that one of them refuses as the user's mistake."""
        self.config_dump = self.plain_config()  # Lightning would otherwise dump the config twice
        self.options = chosen_classes(self.config_dump)
        try:
            self._make()
        except Exception as error:
            if is_for_users(error) or (not isinstance(error, TypeError | ValueError) and is_from_user_code(error)):
                raise
            reason = explain(error, self.options)
            if str(error).startswith("Does not validate"):
                reason = shorten(str(error))
            path = self.config.get("ckpt_path")
            raise UserError(f"{path} cannot be used: {reason}" if path else reason) from error
        # only a model that is built from a config has hyper-parameters of plain types
        arguments = {**self.config_dump["model"], "_instantiator": INSTANTIATOR}
        if "class_path" in arguments:  # under the name by which Lightning finds it
            arguments["_class_path"] = arguments.pop("class_path")
        self.model.save_hyperparameters(arguments)

    def _make(self) -> None:
        data = self.parser.make_data(self.config)
        network = None if self.saved else self.parser.typed
        for line in fill_sizes(self.config, data, network):
            self.say(line)
        self.config_dump = self.plain_config()
        super().instantiate_classes()
        self.datamodule.reuse_loaded(data)
        if self.saved is not None and self.saved.data_state is not None:  # Lightning restores only the same data class
            self.datamodule.load_state_dict(self.saved.data_state)
        self.model.check_images(self.datamodule.image_shape, len(self.datamodule.classes))
        self.check_training()
        optimizers = self.model.configure_optimizers()  # fails here rather than when the training starts
        self._check_monitors(optimizers)

    def check_training(self) -> None:
        """Check that the model can be trained on the data, if the command trains."""

    def _check_monitors(self, optimizers: Any) -> None:
        """Check that the metrics which callbacks and schedule monitor are logged, unless the user's code may log.

        Raises:
            UserError: If a monitored metric will not be logged.
        """
        followers: list[Any] = [*self.trainer.callbacks]  # type: ignore[attr-defined]
        if any(
            type(each).__module__.partition(".")[0] not in ("lightning", "mnist_lightning")
            for each in (*followers, self.model)
        ):
            return
        logits = torch.zeros(1, len(self.datamodule.classes))  # running the network would draw its dropout
        values = self.model.metrics(logits, torch.zeros(1, dtype=torch.long), torch.zeros(()))
        known = ["lr", *(f"{stage}/{name}" for stage in ("train", "val") for name in values)]
        known += [f"val/{name}" for name in self.model.epoch_metrics.names]
        monitored = [(type(follower).__name__, getattr(follower, "monitor", None)) for follower in followers]
        if isinstance(optimizers, dict):
            monitored.append(("lr_scheduler", optimizers["lr_scheduler"]["monitor"]))
        for name, monitor in monitored:
            if monitor is not None and monitor not in known:
                raise UserError(f"{name} monitors {monitor}, which is not logged. Logged metrics: {', '.join(known)}.")

    def make_callbacks(self, options: Namespace) -> list[Callback]:
        """Return the callbacks that the trainer gets in addition to the user's.

        Args:
            options: Options of the trainer.
        """
        if options.barebones:
            self.say("With barebones, nothing is logged, shown or kept.")
            return []
        given = [*as_list(options.callbacks), *self.objects.get("callbacks", [])]
        if options.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in given):
            return [CellProgressBar() if is_in_cell() else EpochProgressBar()]
        return []

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer."""
        options = self.config_init.trainer
        # Lightning's model summary shows no layers
        is_needed = not self.trains and any(isinstance(each, Checkpoint) for each in as_list(options.callbacks))
        kwargs = {"enable_checkpointing": is_needed, "enable_model_summary": False, **kwargs}
        if isinstance(options.logger, bool | None) or not self.trains:
            kwargs["logger"] = False  # FitCLI adds TensorBoard's logger once the run folder is known
        given = as_list(options.plugins)
        for plugin in given:
            if isinstance(plugin, LightningCheckpointIO):
                raise UserError(
                    f"--trainer.plugins {type(plugin).__name__}: checkpoints are written by this package, atomically, "
                    "and read without running code. Leave the plugin out."
                )
        kwargs["plugins"] = [*given, CheckpointIO()]
        kwargs |= {name: value for name, value in self.objects.items() if name != "callbacks"}
        self.trainer_defaults["callbacks"] = [*self.make_callbacks(options), *self.objects.get("callbacks", [])]
        trainer: Any = super().instantiate_trainer(**kwargs)
        if any(word in str(options.strategy) for word in ("spawn", "fork", "notebook")):
            raise UserError(
                f"--trainer.strategy {options.strategy} starts processes that would have to copy the parser, which is "
                "impossible. Use --trainer.strategy ddp, which starts the command once per device."
            )
        # Lightning checks this only for several devices: two processes with one device each would both have rank 0
        environment = trainer._accelerator_connector.cluster_environment
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)
        trainer._checkpoint_connector = CheckpointConnector(trainer)
        trainer.fit_loop = FitLoop(trainer)
        if self.config_init.get("fast"):
            speed_up(trainer)
        return trainer  # type: ignore[no-any-return]


def add_training_options(parser: LightningArgumentParser) -> None:
    """Add the options of the commands that train."""
    parser.add_argument("--notes", type=str, default="", help="What `runs` and the report say about the run.")
    parser.add_argument("--tags", type=list[str], default=[], help="Words by which `runs --tags` finds the run.")
    parser.add_argument("--tensorboard", type=bool, default=True, help="Whether to write TensorBoard events.")
    parser.add_argument(
        "--fast", type=bool, default=True, help="Whether training steps skip hooks that nothing listens to."
    )


FLAG: dict[str, Any] = {"type": bool, "nargs": "?", "const": True, "default": False}
"""Arguments of an option that needs no value; for ``store_true``, the parser takes any value in a file."""


def add_method_options(parser: LightningArgumentParser, method: str) -> None:
    """Add the options of a Trainer method, such as ``--ckpt_path``."""
    skip = {"model", "datamodule", "weights_only", "return_predictions"}
    skip |= {f"{prefix}dataloaders" for prefix in ("", "train_", "val_")}
    parser.add_method_arguments(Trainer, method, as_group=False, skip=skip)


def check_times(trainer: Namespace) -> None:
    """Check the trainer's intervals.

    Raises:
        UserError: If one is not a valid interval.
    """
    for name in ("val_check_interval", "check_val_every_n_epoch", "accumulate_grad_batches"):
        if isinstance(value := trainer[name], int) and value < 1:
            raise UserError(f"--trainer.{name} {value} must be at least 1.")
    for name in ("max_time", "val_check_interval"):
        if isinstance(trainer[name], str | dict):
            try:
                Timer(trainer[name])
            except (MisconfigurationException, TypeError) as error:
                raise UserError(
                    f"--trainer.{name} {trainer[name]} must be days:hours:minutes:seconds, such as 00:00:10:00, or a "
                    "mapping such as {minutes: 10}."
                ) from error


def read_pipes(words: Sequence[str]) -> list[str]:
    """Replace configs from pipes, such as ``--config <(...)``, by their text: a pipe can be read only once."""
    read = []
    for index, word in enumerate(words):
        option, sign, value = word.rpartition("=")
        if (option or words[index - 1]) in ("--config", "-c") and Path(value).is_fifo():
            text = Path(value).read_text(encoding="utf-8")
            try:
                word = f"{option}{sign}{json.dumps(yaml.safe_load(text))}"
            except (yaml.YAMLError, TypeError) as error:
                raise UserError(f"{value} is not a config: {error}") from error
        read.append(word)
    return read


def paths_in(config: Any, key: str = "") -> dict[str, str]:
    """Return the values of a config that name a file, folder or URL to write to, by their keys."""
    if isinstance(config, list):
        config = dict(enumerate(config))
    if isinstance(config, dict):
        return {name: path for part in config for name, path in paths_in(config[part], f"{key}.{part}").items()}
    is_path = re.search(r"(dir|path|file|filename|folder|uri|url|location)$", key) and not key.endswith("class_path")
    return {key.lstrip(".").replace(".init_args", ""): config} if is_path and isinstance(config, str) else {}


def chosen_classes(config: Any, option: str = "") -> dict[type, str]:
    """Return the classes that a config names, each with the option that names it."""
    found: dict[type, str] = {}
    if isinstance(config, list):
        for each in config:
            found |= chosen_classes(each, option)
    elif isinstance(config, dict):
        with suppress(ImportError, AttributeError, KeyError, TypeError, ValueError):
            found[resolve_name(config["class_path"])] = option
        for key, value in config.items():
            found |= chosen_classes(value, option if key == "init_args" else f"{option}.{key}".lstrip("."))
    return found


CHATTER = (
    *("Tip:", "💡 Tip:", "Seed set to ", "`Trainer.fit` stopped: `max_epochs="),  # what the user asked for
    *("Restoring states from the checkpoint", "Loaded model weights from"),  # the commands say so
    *("GPU available: False", "TPU available: False", "LOCAL_RANK: 0 - "),  # but a GPU is named
)
"""Starts of Lightning's messages that tell nothing new."""


def _is_useful(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CHATTER)


def quieten_lightning() -> None:
    """Silence Lightning's tips and messages about intended behavior."""
    for name in ("pytorch.utilities.rank_zero", "pytorch.accelerators.cuda", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{name}").addFilter(_is_useful)
    for message in (
        ".*does not have many workers",  # the data is in memory
        ".*smaller than the logging interval",  # metrics are logged once an epoch
        ".*torch.jit.trace",  # TensorBoard draws its graph with it
        ".*callbacks used to create the checkpoint",  # RunCheckpoint, which only `fit` needs
        ".*LeafSpec",  # caused by Lightning itself
        ".*GrpcStorageProxy is experimental",
    ):
        warnings.filterwarnings("ignore", message)
