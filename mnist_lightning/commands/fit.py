"""``fit``: train a network and evaluate it."""

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    Checkpoint,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    ProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_summary import get_human_readable_count, summarize
from lightning.pytorch.utilities.seed import isolate_rng

from mnist_lightning.classifier import SCHEDULE, Classifier
from mnist_lightning.commands.cli import TRAINING_OPTIONS, RunCLI, add_method_options, add_training_options
from mnist_lightning.system.console import (
    command_line,
    fill_terminal,
    format_table,
    quoted,
    rank_zero_print,
    shorten_middle,
    show_status,
)
from mnist_lightning.system.errors import UserError, library_errors
from mnist_lightning.system.files import write_csv
from mnist_lightning.system.nested import as_list, flatten
from mnist_lightning.training.callbacks import Figures, RunLogger
from mnist_lightning.training.checkpoints import RunCheckpoint
from mnist_lightning.training.precision import Trainer
from mnist_lightning.training.runs import RUN_KEYS, environment, new_version
from mnist_lightning.training.saved_run import SavedRun
from mnist_lightning.training.slurm import SlurmJob


class FitCLI(RunCLI):
    """Trains a network, then tests the weights of the last epoch and of the best one.

    Attributes:
        checkpoint: The callback that keeps the run on disk; None if nothing is kept.
        job: The SLURM job of this process, if it belongs to one.
        run_dir: The run folder, once it exists.
    """

    trains = True
    common_options = TRAINING_OPTIONS
    given_over_saved = ("metrics", *SCHEDULE)
    checkpoint: RunCheckpoint | None = None
    job: SlurmJob | None = None
    run_dir: Path | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        add_training_options(parser)
        add_method_options(parser, "fit")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if isinstance(args, list) and SLURMEnvironment.detect():
            self.job = SlurmJob(args)
        super().parse_arguments(parser, args)

    def find_checkpoint(self) -> Path | None:
        path = self.job.checkpoint(self.logs / self.config.name) if self.job else None
        return path or super().find_checkpoint()

    def saved_options(self, saved: SavedRun) -> dict[str, Any]:
        return saved.config  # all of it: the run continues as it was

    def use_checkpoint(self, path: Path, args: Sequence[str]) -> None:
        """Take the run's config from the checkpoint, and report where the given options differ."""
        super().use_checkpoint(path, args)
        assert self.saved is not None
        before = self.saved_options(self.saved)
        if "trainer" not in before:
            rank_zero_print(
                f"{path} was not written by fit and does not hold the trainer's options: those of this command are "
                "used."
            )
        now = flatten(self.plain_config())
        for key, value in flatten({**before, "data": self.saved.data, "model": {}, "name": {}, "origin": {}}).items():
            if now.get(key, value) != value:
                rank_zero_print(f"Continuing with {key.replace('.init_args', '')} {now[key]}: the run had {value}")

    def use_finders(self) -> None:
        """Replace Lightning's BatchSizeFinder and LearningRateFinder by the values they find, before the run starts.

        The run's config then holds a plain batch size and learning rate, so the run can be continued.

        Raises:
            UserError: If there are several devices, since each might find a different value.
        """
        trainer = self.config.trainer
        if self.config.ckpt_path or trainer.fast_dev_run:
            super().use_finders()
            return
        for finder in self.take_finders():
            kind = resolve_name(finder.class_path)
            if str(trainer.devices) != "1":
                raise UserError(
                    f"{kind.__name__} works on one device: run it with --trainer.devices 1, then give the found value."
                )
            key, found = self.find(kind, {**vars(finder.init_args)})
            option = f"--{key.replace('.init_args', '')}"
            if found is None:
                rank_zero_print(f"{kind.__name__} found nothing in so few steps: {option} stays {self.config[key]}.")
            else:
                rank_zero_print(f"{kind.__name__} found {option} {found:.4g}: the run uses it.")
                self.config[key] = found

    def find(self, kind: type, arguments: dict[str, Any]) -> tuple[str, float | None]:
        """Run a finder; return its config key, and the value that it finds or None."""
        config = {key: value for key, value in self.plain_config().items() if key in ("name", *RUN_KEYS)}
        with tempfile.TemporaryDirectory() as folder:  # the finder saves a checkpoint there, to restore it afterwards
            config["trainer"] |= {"callbacks": None, "logger": False, "default_root_dir": folder}
            trial = SilentFit(config)
            tuner: Any = Tuner(trial.trainer)
            if kind is not LearningRateFinder:
                size = tuner.scale_batch_size(trial.model, datamodule=trial.datamodule, **arguments)
                return "data.init_args.batch_size", size
            arguments |= {"num_training": arguments.pop("num_training_steps"), "update_attr": False}
            finder = tuner.lr_find(trial.model, datamodule=trial.datamodule, **arguments)
            return "model.optimizer.init_args.lr", finder.suggestion()

    def check_training(self) -> None:
        """Check that augmentation keeps the size of the images.

        Raises:
            UserError: If it changes the size.
        """
        shape = self.datamodule.image_shape
        images, labels = torch.zeros(2, *shape), torch.zeros(2, dtype=torch.long)
        with isolate_rng():  # the check must not change the training's random numbers
            for augment in self.datamodule.augmentation:
                images, labels = augment(images, labels)
                if images.shape != (2, *shape):
                    raise UserError(
                        f"--data.augmentation {type(augment).__name__} makes images of shape {tuple(images.shape)} "
                        f"(batch, channels, height, width) from a batch of shape {(2, *shape)}: use one that keeps "
                        "the shape."
                    )

    @property
    def keeps_run(self) -> bool:
        """Whether the command keeps a run folder."""
        options = self.config.trainer
        return not (options.logger is False or options.fast_dev_run or options.barebones)

    def make_callbacks(self, options: Namespace) -> list[Callback]:
        callbacks = super().make_callbacks(options)
        if self.keeps_run and options.enable_checkpointing is not False:
            config = self.plain_config()
            self.checkpoint = RunCheckpoint({key: config[key] for key in ("name", "origin", *RUN_KEYS)})
            callbacks += [self.checkpoint, Figures(self.checkpoint)]
        return callbacks

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.keeps_run:
            kwargs["enable_checkpointing"] = self.config_init.trainer.enable_checkpointing
        trainer = super().instantiate_trainer(**kwargs)
        if self.checkpoint is not None:  # before the user's own, so that their files hold the epoch's metrics
            listeners: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            listeners.remove(self.checkpoint)
            others = [isinstance(callback, Checkpoint) for callback in listeners]
            listeners.insert(others.index(True) if any(others) else len(others), self.checkpoint)
        return trainer

    def run(self) -> None:
        trainer, data = self.trainer, self.datamodule
        for stage in ("fit", "test"):  # check all data before training
            data.setup(stage)
        if trainer.is_global_zero:
            self.print_data_and_layers()
        if self.keeps_run:
            self.make_folder()
        try:
            with library_errors(self.run_dir, self.options):
                with isolate_rng():  # MLflow draws a random run name
                    _start_loggers(trainer.loggers)
                trainer.fit(self.model, datamodule=data, ckpt_path=self.config.ckpt_path)
        except (UserError, MisconfigurationException):
            if trainer.is_global_zero:
                self.remove_untrained()
            raise
        except (SystemExit, OSError):  # Ctrl-C, a full disk
            if trainer.is_global_zero and self.checkpoint and Path(self.checkpoint.last_model_path).is_file():
                print(f"Continue: {command_line('fit', '--ckpt_path', self.checkpoint.last_model_path)}")
            raise
        if trainer.limit_test_batches != 0 and not trainer.barebones:
            self.test()
        if self.run_dir is not None and trainer.is_global_zero:
            print(f"\nRun: {self.run_dir}\nView it: {quoted('tensorboard', '--logdir', self.logs)}")

    def print_data_and_layers(self) -> None:
        """Print the shapes of the data and the layers of the network."""
        data = self.datamodule
        print(fill_terminal(data.describe()))
        for name in ("train", "val", "test"):
            split = getattr(data, name)
            shapes = [tuple(tensor.shape) for tensor in (split.images, split.labels)]
            # a batch would be augmented, and so draw random numbers
            dtypes = [tensor.dtype for tensor in (split.scaled([0]), split.labels)]
            print(f"  {name:5}  images {shapes[0]} {dtypes[0]}, labels {shapes[1]} {dtypes[1]}")
        if self.config.trainer.enable_model_summary is not False and not self.trainer.barebones:
            print(f"\n{describe_layers(self.model)}\n")

    def make_folder(self) -> None:
        """Make the run folder, write the config, and pass the folder to the loggers, the checkpoint and the job."""
        config, trainer = self.config, self.trainer
        version = new_version(self.logs / config.name)
        self.run_dir = self.logs / config.name / f"version_{version}"
        if trainer.is_global_zero:
            (self.run_dir / "config.yaml").write_text(self.parser.dump(config, skip_unset=False), encoding="utf-8")
            made_by = json.dumps(environment(self.command, *self.words), indent=2)
            (self.run_dir / "environment.json").write_text(f"{made_by}\n", encoding="utf-8")
        if config.tensorboard:
            own_logger = RunLogger(self.logs, config.name, version, default_hp_metric=False)
            trainer.loggers = [own_logger, *trainer.loggers]
        if self.checkpoint is not None:
            self.checkpoint.dirpath = str(self.run_dir / "checkpoints")
            if self.job is not None:
                self.job.watch(trainer, self.run_dir)

    def remove_untrained(self) -> None:
        """Remove the run folder if the run failed before its first epoch ended."""
        if self.run_dir is None or (self.run_dir / "checkpoints/last.ckpt").is_file():
            return
        for logger in self.trainer.loggers:
            logger.finalize("failed")
        shutil.rmtree(self.run_dir)
        with suppress(OSError):  # other runs exist
            self.run_dir.parent.rmdir()
            self.logs.rmdir()

    def test(self) -> None:
        """Test the trained weights; write the results to the run folder and print them as a table."""
        checkpoint, trainer = self.checkpoint, self.trainer
        epochs = checkpoint.history[-1]["epoch"] + 1 if checkpoint and checkpoint.history else trainer.current_epoch
        show_status("Testing …")
        loggers, trainer.loggers = trainer.loggers, []
        trainer.profiler = PassThroughProfiler()  # type: ignore[attr-defined] # PyTorch's works only once
        (results,) = trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        for logger in loggers:
            logger.log_metrics({**results, "epoch": epochs - 1}, step=trainer.global_step)
        rows: dict[str, dict[str, float]] = {f"last epoch ({epochs})": dict(results)}
        if checkpoint is not None and checkpoint.best_model_path:
            best = SavedRun.read(checkpoint.best_model_path)
            best.restore(self.model)
            (results,) = trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            rows[f"best val/accuracy (epoch {best.epoch + 1})"] = dict(results)
        if not trainer.is_global_zero:
            return
        if self.run_dir is not None:
            write_csv(self.run_dir / "test.csv", [{"weights": name, **metrics} for name, metrics in rows.items()])
        if not all(math.isfinite(value) for metrics in rows.values() for value in metrics.values()):
            rank_zero_print(
                "The training has diverged: some test metrics are not finite. A lower learning rate may help."
            )
        titles = ["weights after the", *(name.replace("/", " ").replace("_", " ") for name in results)]
        cells = [[weights, *(f"{value:.4f}" for value in metrics.values())] for weights, metrics in rows.items()]
        show_status("")
        print(f"\n{format_table([titles, *cells])}")


def describe_layers(model: Classifier) -> str:
    """Return a table of the network's layers, at most 80 columns wide, and a line with their sums."""
    summary = summarize(model, max_depth=2)
    names = [shorten_middle(name, 28) for name in summary.layer_names]
    types = [shorten_middle(name, 16) for name in summary.layer_types]
    titles = ["layer", f"{'type':{max(map(len, types))}}", "output", "parameters", "operations"]
    outputs = [" x ".join(map(str, size[1:])) if isinstance(size, list) else str(size) for size in summary.out_sizes]
    operations = [get_human_readable_count(sum(counts.values())).strip() for counts in summary.flop_counts.values()]
    columns = [names, [f"{each:{len(titles[1])}}" for each in types], outputs]
    columns += [[f"{count:,}" for count in summary.param_nums], operations]
    total, trainable = summary.total_parameters, summary.trainable_parameters
    sums = [f"{total:,} parameters" + (f", {trainable:,} of them trainable" if trainable < total else "")]
    sums += [f"{summary.model_size:.3g} MB", f"{summary.total_flops:,} operations per image"]
    return f"{format_table([titles, *zip(*columns, strict=True)])}\n{', '.join(sums)}"


ONLY_IN_FIT = (ModelCheckpoint, OnExceptionCheckpoint, ProgressBar)
"""Callbacks that write a run's checkpoints or show its progress; a search does both itself."""


class SilentFit(FitCLI):
    """A silent training without a run folder, for a search or for a finder.

    Args:
        config: Config of a run.
    """

    keeps_run = False

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__("fit", config)

    def say(self, line: str) -> None:
        pass

    def make_callbacks(self, options: Namespace) -> list[Callback]:
        return []

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.config_init.trainer
        options.callbacks = [each for each in as_list(options.callbacks) if not isinstance(each, ONLY_IN_FIT)]
        kwargs["enable_checkpointing"] = any(isinstance(each, Checkpoint) for each in options.callbacks)
        return super().instantiate_trainer(enable_progress_bar=False, **kwargs)


def _start_loggers(loggers: Sequence[Any]) -> None:
    """Check, before the training, that the loggers have what they need, such as an account or a server."""
    for logger in loggers:
        try:
            logger.experiment  # noqa: B018
        except Exception as error:  # each logger raises its own
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(
                f"{type(logger).__name__} cannot be used: {reason}. Fix that, give it other arguments "
                "(--trainer.logger.…), or leave it out."
            ) from error


main = FitCLI.main
