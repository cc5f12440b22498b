"""``tune``: searches keys of the config with an Optuna study, in several processes, and refits the best."""

import copy
import csv
import inspect
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NoReturn

import numpy as np
import optuna
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, lazy_instance
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner, WilcoxonPruner
from optuna.samplers import BaseSampler, GridSampler, QMCSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

from mnist_lightning.cli import Parser, RunCLI
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.runs import PROG, atomic_write, newest_file
from mnist_lightning.storage import open_storage
from mnist_lightning.study import (
    ATTEMPTS,
    SWEEPS,
    SearchSpace,
    TrialSampler,
    ask,
    bounds,
    counts,
    describe,
    open_study,
    process_name,
    put_back,
    results,
    short_key,
    short_value,
    sweep,
)
from mnist_lightning.workers import Worker


def _distribution(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"optuna.distributions.{name}", "init_args": arguments}


_UNITS = _distribution("IntDistribution", low=32, high=512, step=32)
_DROPOUT = _distribution("FloatDistribution", low=0.1, high=0.5, step=0.1)
_L2 = _distribution("CategoricalDistribution", choices=[0.01, 0.1, 1.0])
_OPTIMIZER = _distribution(
    "CategoricalDistribution",
    choices=[f"mnist_lightning.optimizers.Keras{name}" for name in ("Adam", "SGD", "RMSprop")],
)

NOTEBOOK_SPACE: dict[str, dict[str, Any]] = {
    "model.network.init_args.units.0": _UNITS,
    "model.network.init_args.l2.0": _L2,
    "model.network.init_args.dropout.0": _DROPOUT,
    "model.network.init_args.units.1": _UNITS,
    "model.network.init_args.l2.1": _L2,
    "model.network.init_args.dropout.1": _DROPOUT,
    "model.optimizer.class_path": _OPTIMIZER,
}
"""The seven hyper-parameters that the notebook searches."""


class TuneTrainer(Trainer):
    """The Trainer of ``tune``: its method gives the command its options, and ``TuneCLI`` does the work."""

    def tune(
        self,
        search_space: dict[str, dict[str, Any]] = NOTEBOOK_SPACE,
        metric: Literal["val/accuracy", "val/loss", "val/penalized_loss"] = "val/accuracy",
        direction: Literal["maximize", "minimize"] | None = None,
        sampler: BaseSampler = lazy_instance(RandomSampler),  # noqa: B008
        pruner: BasePruner = lazy_instance(NopPruner),  # noqa: B008
        n_trials: PositiveInt = 10,
        executions_per_trial: PositiveInt = 2,
        study_name: str = "tune",
        storage: str | None = None,
        workers: PositiveInt | None = None,
        grace_period: PositiveFloat = 60.0,
        enqueue_baseline: bool = False,
        refit: bool = True,
        refit_epochs: PositiveInt = 20,
    ) -> NoReturn:
        """Search hyper-parameters with an Optuna study and refit the best.

        Args:
            search_space: From a key of this config (an item of a list by its index) to class path and arguments of the
                Optuna distribution of its values.
            metric: A trial's value is this metric at its best epoch, averaged over the trial's executions.
            direction: Whether a good value is high or low; by default high for an accuracy and low for a loss.
            sampler: Draws the trials. Its seed is seed_everything, unless given.
            pruner: Ends bad trials early, after an epoch or an execution.
            n_trials: Trials of the study in all, those of earlier commands and of other processes included.
            executions_per_trial: Trainings of a trial, with the seeds seed_everything, seed_everything + 1, ...
            study_name: Name of the study, and of its folder in lightning_logs.
            storage: Path of a journal file or URL of an Optuna storage; by default journal.log in the study's folder.
            workers: Processes that train; by default one for each GPU or, without any, each CPU core.
            grace_period: Seconds after which the trials of a machine that has vanished are run by others.
            enqueue_baseline: Whether a new study starts with the values that the config has.
            refit: Whether the best is trained anew at the end, as a run of its own.
            refit_epochs: Epochs of that.
        """
        raise NotImplementedError


@dataclass
class Task:
    """What a worker needs for one execution of a trial."""

    config: dict[str, Any]
    folder: Path
    name: str
    params: dict[str, Any]
    metric: str
    maximize: bool


class Execution(RunCLI):
    """One training of a trial, in a worker: ``fit`` with a TensorBoard log and a report after each validation.

    Args:
        task: What to do.
        connection: Where reports go, and the word to go on or to stop comes from.

    Attributes:
        curve: From the epoch to the value of the metric.
    """

    def __init__(self, task: Task, connection: "Connection[Any, Any]") -> None:
        self.task = task
        self.connection = connection
        self.curve: dict[int, float] = {}
        super().__init__("fit", "", {"subcommand": "fit", "fit": task.config})

    def fit(self, model: LightningModule, datamodule: MNISTDataModule, ckpt_path: str | None) -> None:
        """Train; the test images are not touched."""
        folder, name, lost = self.task.folder, self.task.name, 0
        while (folder / name).exists():  # the log of a lost execution stays
            lost += 1
            name = f"{self.task.name}_again_{lost}"
        self.trainer.loggers = [TensorBoardLogger(folder.parent, folder.name, name, default_hp_metric=False)]
        self.trainer.callbacks.append(Reports(self))  # type: ignore[attr-defined]
        self.trainer.fit(model, datamodule=datamodule)


class Reports(Callback):
    """Sends the metric of each epoch to the parent, which answers whether to go on; at the end, logs the score."""

    def __init__(self, execution: Execution) -> None:
        self._execution = execution

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        execution, metrics = self._execution, trainer.callback_metrics
        for name, metric in metrics.items():
            if not math.isfinite(metric):
                raise ArithmeticError(f"{name} is {metric.item()} after epoch {trainer.current_epoch + 1}")
        value = metrics[execution.task.metric].item()
        execution.curve[trainer.current_epoch] = value
        execution.connection.send(("epoch", (trainer.current_epoch, value)))
        if not execution.connection.recv():
            trainer.should_stop = True  # Lightning finishes the epoch and its logs

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log hyper-parameters and score for TensorBoard's page "HParams"."""
        task = self._execution.task
        score = (max if task.maximize else min)(self._execution.curve.values())
        for logger in trainer.loggers:
            logger.log_hyperparams(task.params, {"score": score})


class TuneCLI(RunCLI):
    """The command ``tune``."""

    run_trainer = TuneTrainer
    run_epochs = 10
    run_name = "tuned"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run, with the batch size of the notebook's search."""
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"data.batch_size": 32})

    def before_instantiate_classes(self) -> None:
        """Set up this process."""
        super().before_instantiate_classes()
        options = self.config["tune"]
        options.direction = options.direction or ("maximize" if "accuracy" in options.metric else "minimize")
        for key in ("sampler", "pruner"):
            arguments = options[key].get("init_args", {})
            for name, value in arguments.items():  # a number is taken for text where both may stand: max_resource
                arguments[name] = int(value) if isinstance(value, str) and value.isdecimal() else value

    def tune(self, model: LightningModule, datamodule: MNISTDataModule, **options: Any) -> None:
        """Search, print the results, refit the best."""
        datamodule.setup("fit")  # all data is checked before anything is trained
        self.options = self.config["tune"]
        self.seed = self.options.seed_everything
        self.space: SearchSpace = {
            key: _make_distribution(key, config) for key, config in (options["search_space"] or {}).items()
        }
        parser: Any = self._parser("tune")
        self.base: dict[str, Any] = json.loads(parser.dump(self.options, skip_none=False, format="json"))
        self._check_space(parser)
        print("Search space:")
        width = max(map(len, self.space))
        for key, distribution in self.space.items():
            print(f"  {key:{width}}  {describe(distribution)}")

        folder = self.logs / self.options.study_name
        settings = self.config_of({key: bounds(distribution)[0] for key, distribution in self.space.items()})
        del settings["num_threads"], settings["data"]["data_dir"]
        settings["trainer"] = {"max_epochs": settings["trainer"]["max_epochs"]}
        settings.update({key: self.base[key] for key in ("metric", "executions_per_trial")})
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage: Any = open_storage(self.options.storage or str(folder / "journal.log"))
        study, is_new = open_study(self.storage, self.options.study_name, self.options.direction, settings, self.space)
        study.sampler = TrialSampler(study, self._make_sampler)
        study.pruner = options["pruner"]
        if is_new and self.options.enqueue_baseline:
            study.enqueue_trial({key: _get(self.base, key) for key in self.space})
        search = Search(study, self, folder)
        interrupted = search.run()
        self._print_results(study)
        if interrupted:
            print(f"\nStopped. Continue: {PROG} {shlex.join(sys.argv[1:])}")
            sys.exit(130)
        if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            failed = [trial for trial in study.trials if "error" in trial.user_attrs]
            reason = f" The first failed: {failed[0].user_attrs['error']}" if failed else ""
            raise MisconfigurationException(f"No trial was completed, so there is nothing to refit.{reason}")
        path = folder / "best.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_text(yaml.safe_dump(self._best_config(study, parser), sort_keys=False))
        print(f"\nBest config: {path}    Train it: {PROG} fit --config {path}")
        if not self.options.refit:
            return
        # several commands that share the study end together
        finished = [t for t in study.get_trials(deepcopy=False) if t.datetime_complete is not None and counts(t)]
        last = max(finished, key=lambda trial: (trial.datetime_complete, trial.number)).user_attrs.get("owner")
        if search.took_part and last != process_name():
            print(f"Refit: left to {last}, which ended the last trial. The same command, given again, does it here.")
        else:
            self._refit(path)

    def config_of(self, params: dict[str, Any]) -> dict[str, Any]:
        """Config of a run with these values of the search space."""
        keys = ("seed_everything", "num_threads", "trainer", "model", "data")
        config = {key: copy.deepcopy(self.base[key]) for key in keys}
        for key in sorted(params, key=lambda key: not key.endswith(".class_path")):  # a class, then its arguments
            parent, _, last = key.rpartition(".")
            node = _get(config, parent)
            if last == "class_path" and node[last] != params[key]:
                node["init_args"] = {}  # not those of the class before
            node[int(last) if isinstance(node, list) else last] = params[key]
        return config

    def _check_space(self, parser: Parser) -> None:
        if not self.space:
            raise MisconfigurationException("search_space is empty: give at least one key and its distribution.")
        for key in self.space:
            try:
                if not key.startswith(("trainer.", "model.", "data.")):
                    raise KeyError(key)
                _get(self.base, key)
            except (AttributeError, KeyError, IndexError, ValueError, TypeError) as error:
                raise MisconfigurationException(
                    f"search_space: trainer, model and data have no key {key}. "
                    f"`{PROG} tune --print_config` shows their keys; an item of a list is its key with .0, .1, ..."
                ) from error
            for part in self.space:
                if part.startswith(f"{key}."):
                    raise MisconfigurationException(f"search_space: {part} is a part of {key}: search one of them.")
        epochs = self.space.get("trainer.max_epochs")
        for value in bounds(epochs) if epochs else [self.options.trainer.max_epochs]:
            if not isinstance(value, int) or value < 1:
                raise MisconfigurationException(f"A search needs a number of epochs: trainer.max_epochs is {value}.")
        first = {key: bounds(distribution)[0] for key, distribution in self.space.items()}
        parser.exit_on_error = False
        for key, distribution in self.space.items():
            for value in bounds(distribution):
                try:
                    parser.parse_object(self.config_of({**first, key: value}))
                except ArgumentError as error:
                    reason = " ".join(str(error.message).split())
                    raise MisconfigurationException(f"search_space: {key} cannot be {value!r}. {reason}") from error
        parser.exit_on_error = True

    def _make_sampler(self, place: int) -> BaseSampler:
        config = copy.deepcopy(self.options.sampler)
        sampler_class = type(self.config_init["tune"].sampler)
        if "seed" in inspect.signature(sampler_class).parameters:
            seed = config.init_args.get("seed")
            seed = self.seed if seed is None else seed
            if sampler_class in (GridSampler, QMCSampler):  # the points of a grid or sequence belong together
                config.init_args["seed"] = int(seed)
            elif seed is not False:
                config.init_args["seed"] = int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
        parser = ArgumentParser()
        parser.add_argument("--sampler", type=BaseSampler)
        sampler: BaseSampler = parser.instantiate(Namespace(sampler=config)).sampler
        return sampler

    def _best_config(self, study: Study, parser: LightningArgumentParser) -> dict[str, Any]:
        parsed = parser.parse_object(self.config_of(study.best_params))
        whole = json.loads(parser.dump(parsed, skip_none=False, format="json"))
        config = {key: whole[key] for key in ("seed_everything", "num_threads", "trainer", "model", "data")}
        config["trainer"]["max_epochs"] = int(self.options.refit_epochs)
        return {"name": self.options.name, **config}

    def _print_results(self, study: Study) -> None:
        trials = study.get_trials(deepcopy=False)
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        states = [("completed", TrialState.COMPLETE), ("pruned", TrialState.PRUNED), ("failed", TrialState.FAIL)]
        numbers = [f"{sum(t.state == state and counts(t) for t in trials)} {name}" for name, state in states]
        print(f"\nTrials of study {study.study_name}: {', '.join(numbers)}")
        if not complete:
            return
        columns = ["trial", self.options.metric, "executions", *map(short_key, self.space)]
        rows = [columns, *results(study, list(self.space))[:10]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
        print(f"\nBest: trial {study.best_trial.number}, {self.options.metric} {study.best_value:.4f}")
        for key in self.space:
            print(f"  {key}: {study.best_params[key]}")
        if len({trial.value for trial in complete}) > 1:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            importances = optuna.importance.get_param_importances(study, evaluator=evaluator)
            shown = ", ".join(f"{short_key(key)} {importance:.2f}" for key, importance in importances.items())
            print(f"Importance (fANOVA): {shown}")

    def _refit(self, config: Path) -> None:
        wanted = yaml.safe_load(config.read_text()).items()
        for run in sorted((self.logs / self.options.name).glob("version_*")):
            if (run / "test.csv").exists() and wanted <= yaml.safe_load((run / "config.yaml").read_text()).items():
                print(f"Refit: it is there already, {run}")
                break
        else:
            print(f"\nRefit: {PROG} fit --config {config}")
            RunCLI("fit", "", ["fit", "--config", str(config)])
        print(f"\n{'test, weights of the last epoch':32}{'loss':>10}{'penalized loss':>16}{'accuracy':>10}")
        for name in ("baseline", self.options.name):
            path = newest_file((self.logs / name).glob("version_*/test.csv"))
            if path is not None:
                with path.open(newline="") as file:
                    last = next(csv.DictReader(file))
                loss, penalized, accuracy = (float(last[f"test/{n}"]) for n in ("loss", "penalized_loss", "accuracy"))
                print(f"{path.parent!s:32}{loss:10.4f}{penalized:16.4f}{accuracy:10.4f}")
        print(f"\nCompare them: {PROG} report")


@dataclass
class RunningTrial:
    """A trial of this process, and what is known of its executions."""

    trial: Trial
    waiting: deque[int]
    ended: dict[int, dict[str, Any]]
    curves: dict[int, dict[int, float]] = field(default_factory=dict)
    active: set[int] = field(default_factory=set)
    lost: int = 0
    reported: int = -1
    pruned: bool = False
    error: str | None = None
    taken: bool = False

    @property
    def stopped(self) -> bool:
        """Whether none of its executions shall go on."""
        return self.pruned or self.error is not None or self.taken


@dataclass
class Slot:
    """The place of a worker, and what it is at."""

    device: str | None
    worker: Worker | None = None
    running: RunningTrial | None = None
    execution: int = 0
    start: float = 0.0


class Search:
    """Asks the study for trials, hands their executions to workers, and tells the study how they end.

    Args:
        study: The study.
        cli: Gives the options, and the config of a trial.
        folder: Where the executions' logs go.
    """

    def __init__(self, study: Study, cli: TuneCLI, folder: Path) -> None:
        self.study = study
        self.cli = cli
        self.options = cli.options
        self.space = cli.space
        self.folder = folder
        self.maximize = self.options.direction == "maximize"
        epochs = self.space.get("trainer.max_epochs")
        self.epochs: int = max(bounds(epochs)) if epochs else self.options.trainer.max_epochs
        self.trials: list[RunningTrial] = []
        self.heard: dict[int, tuple[float | None, int]] = {}
        self.took_part = False
        self.slots = [Slot(device) for device in self._devices()]

    def run(self) -> bool:
        """Search until the study has its trials; gives whether it was interrupted."""
        total = self.options.n_trials * self.options.executions_per_trial * self.epochs
        shape = "{desc} |{bar}| {percentage:3.0f} % [{elapsed} < {remaining}]"
        self.bar: tqdm[Any] = tqdm(total=total, bar_format=shape, leave=False, disable=None)
        terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a cluster sends before it kills
        try:
            self._loop()
        except KeyboardInterrupt:
            return True
        finally:
            interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
            for slot in self.slots:
                if slot.worker is not None:
                    slot.worker.end()
            self.cli.storage.patience = 0.0
            with suppress(MisconfigurationException):  # the storage is away: whoever comes next will notice
                for running in self.trials:
                    put_back(self.study, self._frozen(running), self.space, blame=False)
            self.bar.close()
            signal.signal(signal.SIGTERM, terminate)
            signal.signal(signal.SIGINT, interrupt)
        return False

    def _devices(self) -> list[str | None]:
        trainer = self.options.trainer
        gpus: list[str] = []
        if trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        if trainer.devices != 1:  # one training takes several
            return [None] * (self.options.workers or 1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = self.options.workers or len(gpus) or cores
        return [gpus[i % len(gpus)] if gpus else None for i in range(count)]

    def _loop(self) -> None:
        next_sweep = 0.0
        while True:
            if time.monotonic() > next_sweep:
                for running in self.trials:
                    with self._unless_taken(running):
                        running.trial.set_user_attr("heartbeat", time.time())
                sweep(self.study, self.space, self.heard)
                next_sweep = time.monotonic() + self.options.grace_period / SWEEPS
            self._show_progress()
            for slot in self.slots:
                if slot.running is None and not self._hand_out(slot):
                    break
            busy = [slot for slot in self.slots if slot.running is not None]
            if busy:
                for connection in wait([slot.worker.connection for slot in busy if slot.worker], timeout=1):
                    self._receive(next(slot for slot in busy if slot.worker and slot.worker.connection is connection))
            elif self._is_complete():
                return
            else:
                self.took_part = True
                time.sleep(1)  # the last trials are with another process, which may die

    def _is_complete(self) -> bool:
        finished = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]
        return sum(map(counts, finished)) >= self.options.n_trials or self._is_exhausted()

    def _is_exhausted(self) -> bool:
        return isinstance(self.study.sampler, TrialSampler) and self.study.sampler.exhausted

    def _hand_out(self, slot: Slot) -> bool:
        """Give a free worker the next execution, if there is one."""
        in_turn = not isinstance(self.study.pruner, NopPruner)  # a pruner looks at one execution after the other
        ready = (t for t in self.trials if t.waiting and not t.stopped and not (in_turn and t.active))
        running = next(ready, None) or self._ask()
        if running is None:
            return False
        slot.running, slot.execution, slot.start = running, running.waiting.popleft(), time.perf_counter()
        running.active.add(slot.execution)
        running.curves[slot.execution] = {}
        trial = running.trial
        config = self.cli.config_of(trial.params)
        if self.cli.seed is not False:
            config["seed_everything"] = self.cli.seed + slot.execution
        config["trainer"].update(enable_progress_bar=False, enable_checkpointing=False, logger=None)
        folder = self.folder / f"trial_{trial.number:03}"
        name = f"execution_{slot.execution}"
        slot.worker = slot.worker or Worker(slot.device)
        task = Task(config, folder, name, trial.params, self.options.metric, self.maximize)
        with suppress(OSError):  # that a worker is dead shows when its answer is waited for
            slot.worker.connection.send(task)
        return True

    def _ask(self) -> RunningTrial | None:
        trial = None if self._is_exhausted() else ask(self.study, self.space, self.options.n_trials)
        if trial is None:
            return None
        ended = {execution["execution"]: execution for execution in trial.user_attrs.get("executions", [])}
        waiting = deque(e for e in range(self.options.executions_per_trial) if e not in ended)
        running = RunningTrial(trial, waiting, ended, {e: dict(ended[e]["values"]) for e in ended})
        self.trials.append(running)
        self.took_part = True
        if trial.user_attrs.get("attempts", 0) >= ATTEMPTS:
            running.error = f"{ATTEMPTS} processes died that ran it"
        if running.error is not None or not waiting:
            self._finish(running)
            return self._ask()
        return running

    def _receive(self, slot: Slot) -> None:
        """Take a message of a worker, or notice that it is dead."""
        running, execution, worker = slot.running, slot.execution, slot.worker
        assert running is not None
        assert worker is not None
        try:
            kind, content = worker.connection.recv()
        except (EOFError, ConnectionError):
            kind, content = "died", worker.end()
            slot.worker = None
        if kind == "epoch":
            epoch, value = content
            running.curves[execution][epoch] = value
            with self._unless_taken(running):
                self._report(running)
                running.pruned = running.pruned or running.trial.should_prune()
            with suppress(OSError):
                worker.connection.send(not running.stopped)
            return
        slot.running = None
        running.active.discard(execution)
        if kind == "end":
            curve = running.curves[execution]
            running.ended[execution] = {
                "execution": execution,
                "seed": None if self.cli.seed is False else self.cli.seed + execution,
                "score": (max if self.maximize else min)(curve.values()),
                "seconds": round(time.perf_counter() - slot.start, 2),
                "values": list(curve.items()),
            }
            with self._unless_taken(running):
                running.trial.set_user_attr("executions", [running.ended[e] for e in sorted(running.ended)])
                self._report(running)
                running.pruned = running.pruned or (bool(running.waiting) and running.trial.should_prune())
        elif kind == "error":
            running.error = content
        elif kind == "fault":
            raise MisconfigurationException(
                f"{content}. What is finished is kept: after a remedy, give the command again."
            )
        else:
            running.lost += 1
            if running.lost < ATTEMPTS:
                running.waiting.appendleft(execution)
            else:
                running.error = f"{ATTEMPTS} workers died that ran it, the last with exit code {content}"
        if not running.active and (running.stopped or not running.waiting):
            self._finish(running)

    @contextmanager
    def _unless_taken(self, running: RunningTrial) -> Iterator[None]:
        """Notice that others took this process for dead, and have its trial now."""
        try:
            yield
        except UpdateFinishedTrialError:
            running.taken = True

    def _report(self, running: RunningTrial) -> None:
        """Report to the study what is known, in the order of the executions.

        A value is an estimate of the trial's: the mean of the best epochs so far, of the executions so far. Its step
        counts epochs, those of earlier executions included. For Wilcoxon's test, which compares pairs, it is an
        execution and its score.
        """
        best = max if self.maximize else min
        scores: list[float] = []
        for execution in range(self.options.executions_per_trial):
            curve = running.curves.get(execution, {})
            if isinstance(self.study.pruner, WilcoxonPruner):
                if execution in running.ended and execution > running.reported:
                    running.trial.report(running.ended[execution]["score"], execution)
                    running.reported = execution
            else:
                for epoch in sorted(curve):
                    step = execution * self.epochs + epoch
                    if step > running.reported:
                        so_far = best(value for e, value in curve.items() if e <= epoch)
                        running.trial.report(mean([*scores, so_far]), step)
                        running.reported = step
            if execution not in running.ended:
                return
            scores.append(running.ended[execution]["score"])

    def _finish(self, running: RunningTrial) -> None:
        trial = running.trial
        self.trials.remove(running)
        with self._unless_taken(running):
            if running.error is not None:
                trial.set_user_attr("error", running.error)
                self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            elif running.pruned:
                self.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            elif not running.taken:
                value = mean(running.ended[e]["score"] for e in sorted(running.ended))
                self.study.tell(trial, value, skip_if_finished=True)
        frozen = self._frozen(running)
        result = f"{frozen.value:.4f}" if frozen.value is not None else running.error
        if not counts(frozen):
            result = "another process runs it anew: this one was silent for too long"
        params = ", ".join(f"{short_key(key)} {short_value(frozen.params[key])}" for key in self.space)
        with self.bar.external_write_mode():
            print(f"Trial {trial.number:3} {frozen.state.name.lower():8} {result}  {params}", flush=True)

    def _frozen(self, running: RunningTrial) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[running.trial.number]

    def _show_progress(self) -> None:
        if self.bar.disable:
            return
        trials = [trial for trial in self.study.get_trials(deepcopy=False) if counts(trial)]
        states = [trial.state for trial in trials]
        finished = sum(state.is_finished() for state in states)
        values = [trial.value for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
        self.bar.desc = f"Trials {finished}/{self.options.n_trials}"
        for name, state in (("pruned", TrialState.PRUNED), ("failed", TrialState.FAIL)):
            if state in states:
                self.bar.desc += f", {states.count(state)} {name}"
        if values:
            self.bar.desc += f", best {(max if self.maximize else min)(values):.4f}"
        of_trial = self.options.executions_per_trial * self.epochs
        self.bar.n = finished * of_trial + sum(len(curve) for t in self.trials for curve in t.curves.values())
        self.bar.refresh()


def _make_distribution(key: str, config: dict[str, Any]) -> BaseDistribution:
    # not by the command's parser: it would give a key's new distribution arguments of the default one
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--distribution", type=BaseDistribution)
    try:
        distribution: BaseDistribution = parser.instantiate(parser.parse_object({"distribution": config})).distribution
        json.dumps(distribution._asdict(), allow_nan=False)  # Optuna takes infinite bounds, and fails at the first draw
    except Exception as error:  # jsonargparse and Optuna have many
        reason = " ".join(str(error).split())
        raise MisconfigurationException(f"search_space: {key} has no valid distribution. {reason}") from error
    return distribution


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        # an index has one name, so that no item is searched twice
        config = config[[str(i) for i in range(len(config))].index(part)] if isinstance(config, list) else config[part]
    return config
