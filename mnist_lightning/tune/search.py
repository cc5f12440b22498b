"""The search as its command and its workers share it, and what a worker does: take, train, report and tell.

All state is in the study, where other machines see it too. Attributes of a trial: ``owner``, the command that answers
for it while it runs; ``workers``, from the number of an execution to the worker that is at it; ``executions``, those
that are finished; ``attempts``, how often a process died that ran it, since the last of them; ``error``, why it failed.
"""

import copy
import inspect
import math
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from statistics import mean
from typing import Any

import numpy as np
import optuna
import torch
import yaml
from filelock import FileLock
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner, WilcoxonPruner
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler, QMCSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from torch.utils.flop_counter import FlopCounterMode

from mnist_lightning.checkpoints import RunCheckpoint
from mnist_lightning.commands.fit import TrainingCLI
from mnist_lightning.tune.space import SearchSpace, config_with, instantiate, max_epochs, size
from mnist_lightning.tune.storage import open_storage
from mnist_lightning.tune.study import (
    ATTEMPTS,
    TrialSampler,
    ask,
    best_trial,
    give_back,
    is_complete,
    is_over,
    process_name,
    set_attributes,
)

COMPUTED = ("parameters", "flops", "seconds")
"""Metrics that are not logged: trainable parameters, operations for one image, time that the training took."""


@dataclass
class Search:
    """What is searched, and how.

    Attributes:
        options: The command's own options.
        base: Config of a run, whose keys the space changes.
        space: The search space.
        storage: Path or URL of the study's storage.
        folder: Of the study, for the logs of the executions.
        owner: Name of the command's process.
    """

    options: Namespace
    base: dict[str, Any]
    space: SearchSpace
    storage: str
    folder: Path
    owner: str

    @property
    def epochs(self) -> int:
        """Epochs of the longest execution."""
        return int(max_epochs(self.space, self.base))

    @property
    def lock(self) -> FileLock:
        """Held while a process of this command changes who is at what."""
        if not self.folder.is_dir():
            raise MisconfigurationException(f"{self.folder} was moved or deleted while its study was searched.")
        return FileLock(self.folder / ".lock")

    def best(self, values: Any) -> Any:
        """The best of several values of the first metric."""
        return (max if self.options.direction[0] == "maximize" else min)(values)

    def checkpoints(self, trial: FrozenTrial) -> list[Path]:
        """The weights of a trial that are kept on this machine, those of the best execution."""
        scores = [(each["score"], each["execution"]) for each in _executions(trial)]
        if not scores:
            return []
        execution = self.best(scores)[1]
        pattern = f"trial_{trial.number:03}/execution_{execution}*/checkpoints/best.ckpt"
        return sorted(self.folder.glob(pattern), key=lambda path: path.stat().st_mtime)[-1:]

    def delete_checkpoints(self, study: Study) -> None:
        """Delete the checkpoints of trials that are finished, but not the best."""
        if self.options.keep_checkpoints == "none":
            return
        trials, best = study.get_trials(deepcopy=False), None
        with suppress(MisconfigurationException):  # none is complete, or within the limits
            best = best_trial(study, self.options.limits)
        for folder in self.folder.glob("trial_*/execution_*/checkpoints"):
            number = int(folder.parent.parent.name.removeprefix("trial_"))
            # the folder may be older than the study: what is of no trial of it is somebody's own
            if number < len(trials) and trials[number].state.is_finished() and trials[number] != best:
                shutil.rmtree(folder, ignore_errors=True)

    def check_sampler(self) -> None:
        """See that two trials can be drawn, before anything is trained.

        Raises:
            MisconfigurationException: If the sampler lacks a package, or does not suit the space or the metrics.
        """
        study = optuna.create_study(directions=self.options.direction)
        self.use_sampler(study)
        try:
            for _ in range(2):
                number = ask(study, self.space, 2, self.owner)
                if number is not None:
                    study.tell(number, [0.0] * len(study.directions))
        except Exception as error:  # a sampler may be anybody's
            name = self.options.sampler.class_path.rpartition(".")[2]
            raise MisconfigurationException(f"sampler: {name} cannot draw. {' '.join(str(error).split())}") from error

    def use_sampler(self, study: Study) -> None:
        """Let the study draw as this search does."""
        sampler_class, combinations = type(instantiate(BaseSampler, self.options.sampler)), math.inf
        if sampler_class is GridSampler and self.space.conditions:
            raise MisconfigurationException("GridSampler knows no conditions (when): take BruteForceSampler.")
        if sampler_class is GridSampler:
            combinations = math.prod(map(len, self.options.sampler.init_args.search_space.values()))
        elif sampler_class is BruteForceSampler:
            combinations = size(self.space)
        study.sampler = TrialSampler(study, self._make_sampler, combinations)

    def _make_sampler(self, number: int) -> BaseSampler:
        config = copy.deepcopy(self.options.sampler)
        self._seed_sampler(config, number)
        sampler: BaseSampler = instantiate(BaseSampler, config)
        return sampler

    def _seed_sampler(self, config: Namespace, number: int) -> None:
        """Seed a sampler, and those that it draws with, for the trial of a number."""
        sampler_class = resolve_name(config.class_path)
        arguments = config["init_args"] = config.get("init_args") or Namespace()
        if sampler_class is QMCSampler and arguments.get("independent_sampler") is None:
            # its own would have the seed of the sequence, and draw the same in every trial
            arguments["independent_sampler"] = Namespace(class_path="optuna.samplers.RandomSampler")
        for inner in vars(arguments).values():
            if isinstance(inner, Namespace) and "class_path" in inner:
                self._seed_sampler(inner, number)
        if "seed" in inspect.signature(sampler_class).parameters:
            seed = arguments.get("seed")
            seed = self.base["seed_everything"] if seed is None else seed
            if sampler_class in (GridSampler, QMCSampler):  # the points of a grid or sequence belong together
                arguments["seed"] = int(seed)
            elif seed is not False:
                arguments["seed"] = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


class TrialRunner:
    """Runs executions of trials until the study is complete.

    Args:
        search: The search.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.name = process_name()
        self.storage = open_storage(search.storage)
        self.storage.quiet = True  # the command says it
        pruner = instantiate(BasePruner, search.options.pruner)
        self.study = optuna.load_study(storage=self.storage, study_name=search.options.study_name, pruner=pruner)
        search.use_sampler(self.study)

    def run(self) -> None:
        """Take and train, and wait where all that is left is with others, who may die."""
        while True:
            with self.search.lock:
                taken = self._take()
            if taken is not None:
                with suppress(UpdateFinishedTrialError):  # others took this machine for dead, and have the trial now
                    self._train(*taken)
            elif is_complete(self.study, self.search.options.n_trials) or (is_over(self.study) and not self._running()):
                return
            else:
                time.sleep(1)

    def _take(self) -> tuple[FrozenTrial, int] | None:
        """Claim an execution: of a trial that this command has, or else of a new one."""
        self.search.delete_checkpoints(self.study)  # of whatever has ended since
        in_turn = not isinstance(self.study.pruner, NopPruner)  # a pruner looks at one execution after the other
        while True:
            for trial in filter(self._is_own, self._running()):
                if not trial.user_attrs.get("workers") or (self._free(trial) and not in_turn):
                    number: int | None = trial.number
                    break
            else:
                if is_over(self.study):
                    return None
                number = ask(self.study, self.search.space, self.search.options.n_trials, self.search.owner)
            if number is None:
                return None
            trial = self._trial(number)
            free = self._free(trial)
            if not self.search.space.has_all(trial.params):  # the worker that drew it died; asking completes it
                give_back(self.study, trial, attempts=trial.user_attrs.get("attempts", 0))
            elif trial.user_attrs.get("attempts", 0) >= ATTEMPTS:
                self._fail(trial, f"{ATTEMPTS} processes died that ran it")
            elif free:
                workers = {**trial.user_attrs.get("workers", {}), str(free[0]): self.name}
                set_attributes(self.study, trial, workers=workers)
                return trial, free[0]
            else:  # whoever finished its last execution died before saying so
                self._end(trial)

    def _train(self, trial: FrozenTrial, execution: int) -> None:
        """Run an execution, and record it."""
        search, start = self.search, time.perf_counter()
        config = config_with(search.base, trial.params, search.space)
        if config["seed_everything"] is not False:  # the same seeds in all trials, so that they compare
            config["seed_everything"] += execution
        config["origin"] = {"study_name": search.options.study_name, "trial": trial.number}
        progress = Progress(self, trial, execution)
        folder, name, lost = search.folder / f"trial_{trial.number:03}", f"execution_{execution}", 0
        while (folder / name).exists():  # the log of a lost execution stays
            lost += 1
            name = f"execution_{execution}_again_{lost}"
        loggers: list[Any] = []
        try:
            named = copy.deepcopy(config)
            _name_loggers(named["trainer"]["logger"], f"{search.options.study_name}_{folder.name}_{name}")
            run = TrainingCLI(named)
            complete = {key: value for key, value in run.plain_config().items() if key in config}
            complete["trainer"]["logger"] = config["trainer"]["logger"]
            loggers = [*run.trainer.loggers]
            with search.lock:
                (folder / name).mkdir(parents=True)
                for logger in loggers:
                    logger.experiment  # noqa: B018  # two at once could fail to make the same database
            (folder / name / "config.yaml").write_text(yaml.safe_dump(complete, sort_keys=False), encoding="utf-8")
            if config["tensorboard"]:
                tensorboard = TensorBoardLogger(search.folder, folder.name, name, default_hp_metric=False)
                run.trainer.loggers = [tensorboard, *loggers]
            callbacks: list[Any] = run.trainer.callbacks  # type: ignore[attr-defined]
            callbacks.append(progress)
            if search.options.keep_checkpoints == "best":
                mode: Any = search.options.direction[0][:3]
                checkpoint = RunCheckpoint(complete, search.options.metric[0], mode)
                checkpoint.dirpath = str(folder / name / "checkpoints")
                callbacks.append(checkpoint)
            run.trainer.fit(run.model, datamodule=run.datamodule)
        except (OSError, SIGTERMException, UpdateFinishedTrialError):  # the machine is at fault, or it is not ours
            raise
        except (Exception, SystemExit) as error:  # whatever a combination of values makes go wrong
            if self.is_own(trial):
                self._fail(trial, f"{type(error).__name__}: {' '.join(str(error).split())}")
            return
        finally:
            for logger in loggers:
                if isinstance(logger, WandbLogger):  # or the next would go on with the same run
                    logger.experiment.finish()
        result = {
            "execution": execution,
            "seed": None if config["seed_everything"] is False else config["seed_everything"],
            "score": progress.scores[0],
            "seconds": round(time.perf_counter() - start, 2),
            "values": list(progress.curve.items()),
        }
        if len(progress.scores) > 1:
            result["scores"] = progress.scores
        with search.lock:
            trial = self._trial(trial.number)
            workers = trial.user_attrs.get("workers", {})
            if not self._is_own(trial) or workers.get(str(execution)) != self.name:  # others have it
                return
            if progress.pruned:
                self.study.tell(trial.number, state=TrialState.PRUNED)
                return
            results = sorted([*_executions(trial), result], key=lambda each: each["execution"])
            workers = {e: name for e, name in workers.items() if e != str(execution)}
            # a trial that gets on is not what kills its processes
            set_attributes(self.study, trial, executions=results, workers=workers, attempts=0)
            pruned = self.report(trial, {})
            if len(results) == search.options.executions_per_trial:
                self._end(self._trial(trial.number))
            elif pruned:
                self.study.tell(trial.number, state=TrialState.PRUNED)

    def report(self, trial: FrozenTrial, running: dict[int, dict[int, float]]) -> bool:
        """Report what is known of a trial's executions, in their order.

        A value is an estimate of the trial's: the mean of the best epochs so far, of the executions so far. Its step
        counts epochs, those of earlier executions included. For Wilcoxon's test, which compares pairs, it is an
        execution and its score.

        Args:
            trial: The trial.
            running: From the number of an execution to the values of its epochs so far.

        Returns:
            Whether the trial shall end here.
        """
        trial, is_wilcoxon = self._trial(trial.number), isinstance(self.study.pruner, WilcoxonPruner)
        finished = {result["execution"]: dict(result["values"]) for result in _executions(trial)}
        scores: list[float] = []
        for execution, curve in sorted({**running, **finished}.items()):
            if execution > len(scores):
                break
            score = self.search.best(curve.values())
            values = {execution: score} if execution in finished else {}
            if not is_wilcoxon:
                values = {
                    execution * self.search.epochs + epoch: mean(
                        [*scores, self.search.best(value for e, value in curve.items() if e <= epoch)]
                    )
                    for epoch in curve
                }
            for step in values.keys() - trial.intermediate_values.keys():
                self.study._storage.set_trial_intermediate_value(trial._trial_id, step, values[step])
            if execution in finished:
                scores.append(score)
        return self.study.pruner.prune(self.study, self._trial(trial.number))

    def is_own(self, trial: FrozenTrial) -> bool:
        """Whether a trial is still this command's: others may have taken it for dead, or given it up."""
        return self._is_own(self._trial(trial.number))

    def _running(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _is_own(self, trial: FrozenTrial) -> bool:
        return trial.state == TrialState.RUNNING and trial.user_attrs.get("owner") == self.search.owner

    def _free(self, trial: FrozenTrial) -> list[int]:
        """The executions that are neither finished nor run by anybody."""
        taken = {result["execution"] for result in _executions(trial)}
        taken |= set(map(int, trial.user_attrs.get("workers", {})))
        return [e for e in range(self.search.options.executions_per_trial) if e not in taken]

    def _end(self, trial: FrozenTrial) -> None:
        scores = [result.get("scores", [result["score"]]) for result in _executions(trial)]
        self.study.tell(trial.number, [mean(values) for values in zip(*scores, strict=True)])

    def _fail(self, trial: FrozenTrial, error: str) -> None:
        set_attributes(self.study, trial, error=error)
        self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _trial(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]


def _name_loggers(config: Any, name: str) -> None:
    """Give the user's loggers, of which each execution has its own, the execution's name if they have none."""
    keys = {"CSVLogger": "version", "TensorBoardLogger": "version", "MLFlowLogger": "run_name", "WandbLogger": "name"}
    for logger in config if isinstance(config, list) else [config]:
        key = keys.get(logger["class_path"].rpartition(".")[2]) if isinstance(logger, dict) else None
        if key is not None and logger.setdefault("init_args", {}).get(key) is None:
            logger["init_args"][key] = name


def _executions(trial: FrozenTrial) -> list[dict[str, Any]]:
    executions: list[dict[str, Any]] = trial.user_attrs.get("executions", [])
    return executions


class Progress(Checkpoint):
    """Reports the metric after each epoch, and ends the training where it shall not go on; logs the score.

    As a Checkpoint, it is called when the metrics of the epoch's training are there, too.

    Attributes:
        curve: From the epoch to the value of the first metric.
        pruned: Whether the pruner ended the trial.
    """

    def __init__(self, runner: TrialRunner, trial: FrozenTrial, execution: int) -> None:
        self._runner = runner
        self._trial = trial
        self._execution = execution
        self._is_validated = False
        self._others: dict[int, list[float]] = {}
        self.curve: dict[int, float] = {}
        self.pruned = False

    @property
    def scores(self) -> list[float]:
        """The values of all metrics at the best epoch of the first."""
        best = self._runner.search.best(self.curve.values())
        epoch = next(epoch for epoch, value in self.curve.items() if value == best)
        return [best, *self._others[epoch]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_validated:  # with check_val_every_n_epoch
            return
        self._is_validated = False
        for name, metric in trainer.callback_metrics.items():
            if not math.isfinite(metric):
                raise ArithmeticError(f"{name} is {metric.item()} after epoch {trainer.current_epoch + 1}")
        first, *others = [self._value(name, trainer, pl_module) for name in self._runner.search.options.metric]
        self.curve[trainer.current_epoch] = first
        self._others[trainer.current_epoch] = others
        self.pruned = self._runner.report(self._trial, {self._execution: self.curve})
        if self.pruned or not self._runner.is_own(self._trial):
            trainer.should_stop = True

    def _value(self, name: str, trainer: Trainer, module: LightningModule) -> float:
        """The value of a metric, at the end of an epoch."""
        if name == "parameters":
            return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        if name == "seconds":
            return round(time.perf_counter() - self._start, 2)
        if name == "flops":
            module.eval()  # or it would draw random numbers
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                module(module.example_input_array.to(module.device))  # type: ignore[union-attr]
            module.train()
            return float(counter.get_total_flops())
        if name not in trainer.callback_metrics:
            raise KeyError(f"{name} is not logged; these are: {', '.join(trainer.callback_metrics)}")
        return float(trainer.callback_metrics[name])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log hyper-parameters and scores for TensorBoard's page "HParams"."""
        metrics = self._runner.search.options.metric
        scores = {"score": self.scores[0], **dict(zip(metrics[1:], self.scores[1:], strict=True))}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self._trial.params, scores)
            else:
                logger.log_metrics(scores, step=trainer.global_step)
