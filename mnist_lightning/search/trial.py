"""One trial: draw its parameters, train its executions, tell its values.

A worker calls :func:`run_trials`, which calls Optuna's ``Study.optimize`` with an :class:`Objective`. For each
execution of a trial, :meth:`Objective.execute` keeps the books, and :meth:`Objective.train` trains as ``fit`` does.
"""

import copy
import gc
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import optuna
import torch
import yaml
from filelock import FileLock
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import WandbLogger
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, WilcoxonPruner
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from torch.utils.flop_counter import FlopCounterMode

from mnist_lightning.commands.fit import SilentFit
from mnist_lightning.data import ImageDataModule
from mnist_lightning.networks import count_parameters
from mnist_lightning.search.record import COMPUTED, Direction, Metric, TrialRecord, is_counted, limited_metrics, ordinal
from mnist_lightning.search.recovery import ATTEMPTS, process_name
from mnist_lightning.search.sampler import draw, make_sampler
from mnist_lightning.search.space import SearchSpace, bounds, config_with, instantiate
from mnist_lightning.search.study import best_trial, has_room, is_time_up, limited_values
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.nested import as_list
from mnist_lightning.training.callbacks import RunLogger
from mnist_lightning.training.checkpoints import RunCheckpoint

REPEATS = 3
"""After so many repeated trials in a row, a finite space is considered exhausted."""


class FailedTrialError(Exception):
    """Ends a trial that fails, or that is surplus."""


class AbandonedTrial(BaseException):
    """Ends a trial without telling the study: another process runs it, or will continue it.

    It is not an Exception, since ``Study.optimize`` tells the study about every Exception.
    """


@dataclass
class Search:
    """The data that the workers of a search share.

    Attributes:
        options: The command's own options.
        metrics: The metrics to optimize.
        base: Config of a run, whose keys the space changes.
        space: The search space.
        storage: Path or URL of the study's storage.
        folder: The study's folder, for the logs of the executions.
        directions: The directions of metrics that have limits, where the model knows them.
    """

    options: Namespace
    metrics: list[Metric]
    base: dict[str, Any]
    space: SearchSpace
    storage: str
    folder: Path
    directions: Mapping[str, Direction] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """The epochs of the longest execution."""
        epochs = self.space.get("trainer.max_epochs")
        is_base = epochs is None or "trainer.max_epochs" in self.space.conditions
        return int(max([*(bounds(epochs) if epochs else []), *([self.base["trainer"]["max_epochs"]] * is_base)]))

    def lock(self) -> FileLock:
        """Return a lock that one worker on this machine can hold.

        Raises:
            FileNotFoundError: If the study's folder was moved or deleted; the lock would create it again.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} was moved or deleted while the search ran.")
        return FileLock(self.folder / ".lock")

    @property
    def limited(self) -> list[Metric]:
        """The metrics that have limits, whether the study optimizes them or not."""
        return limited_metrics(self.options.limits, self.metrics, self.directions)


class Objective:
    """The function that ``Study.optimize`` calls for each trial.

    Args:
        search: The search.
        study: The search's study.
        storage: The study's storage.
        name: Name of this process.
    """

    def __init__(self, search: Search, study: Study, storage: BaseStorage, name: str) -> None:
        self.search = search
        self.study = study
        self.name = name
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._data: ImageDataModule | None = None
        self._repeats = 0

    def __call__(self, trial: Trial) -> list[float]:
        """Run a trial, or the rest of a trial whose process died.

        Raises:
            FailedTrialError: If the trial fails, or is surplus.
            TrialPruned: If the pruner ends the trial.
            AbandonedTrial: If another process has the trial or, with a cause, if this process cannot continue.
        """
        try:
            return self._run(trial)
        except (FailedTrialError, optuna.TrialPruned):
            raise
        except UpdateFinishedTrialError:
            raise AbandonedTrial from None
        except Exception as error:  # an error of the machine or the storage
            raise AbandonedTrial from error

    def _run(self, trial: Trial) -> list[float]:
        total = self.search.options.n_trials
        if trial.number >= total and ordinal(self.study, trial.number) >= total:
            raise FailedTrialError("two processes asked for the last trial simultaneously")
        trial.set_user_attr("owner", self.name)
        record = TrialRecord.of(self._frozen(trial))
        with self.search.lock():  # otherwise two workers could draw the same values from a finite space
            draw(trial, self.search.space)
            self._check_repeat(trial)
        if record.error is None and record.attempts >= ATTEMPTS:
            self._fail(trial, f"{ATTEMPTS} processes died while running it")
        if record.error is not None:  # the trial failed, and its process died before it told the study
            raise FailedTrialError(record.error)
        executions = [*record.executions]
        for number in range(self.search.options.executions_per_trial):
            if number not in [execution["execution"] for execution in executions]:
                executions.append(self.execute(trial, number, executions))
                executions.sort(key=lambda execution: execution["execution"])
                trial.set_user_attr("executions", executions)
                if record.attempts:  # a trial that makes progress does not kill its processes
                    trial.set_user_attr("attempts", 0)
            if self.report(trial, executions) and len(executions) < self.search.options.executions_per_trial:
                raise optuna.TrialPruned
        limits = self.search.options.limits
        values = limited_values(executions, limits)  # lacks limits that are newer than an execution
        for metric in self.search.limited:
            if metric.name in values:
                trial.set_constraint(metric.name, metric.excess(values[metric.name], limits[metric.name]))
        return [mean(values) for values in zip(*map(scores_of, executions), strict=True)]

    def _frozen(self, trial: Trial) -> FrozenTrial:
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
        return self._storage.get_trial(trial_id)

    def owns(self, trial: Trial) -> bool:
        """Return whether this process still owns a trial: other machines may have considered this one dead."""
        frozen = self._frozen(trial)
        return frozen.state == TrialState.RUNNING and frozen.user_attrs.get("owner") == self.name

    def _fail(self, trial: Trial, error: str) -> None:
        trial.set_user_attr("error", error)
        raise FailedTrialError(error)

    def _check_repeat(self, trial: Trial) -> None:
        """Fail a trial that repeats a combination of a finite space; after several in a row, stop the search."""
        is_finite = getattr(self.study.sampler, "is_finite", False)
        if not is_finite or "fixed_params" in self._frozen(trial).system_attrs:
            return
        # a later trial may have drawn first
        others = [other for other in self.study.get_trials(deepcopy=False) if other.number != trial.number]
        if not any(is_counted(other) and other.params == trial.params for other in others):
            self._repeats = 0
            return
        self._repeats += 1  # one repeat may be two processes drawing simultaneously, several are not
        if self._repeats == REPEATS:
            self.study.stop()
        raise FailedTrialError("this combination already has a trial")

    def report(
        self, trial: Trial, executions: Sequence[dict[str, Any]], curve: Mapping[int, float] | None = None
    ) -> bool:
        """Report a trial's intermediate values, and ask the pruner.

        Each value estimates the trial's value: the mean over its executions so far of the best epoch so far. Its step
        counts epochs, including those of earlier executions. For Wilcoxon's test, which compares pairs, step and value
        are the number of an execution and its score.

        Args:
            trial: The trial.
            executions: The finished executions.
            curve: From epochs to values, of the running execution.

        Returns:
            Whether the pruner ends the trial.
        """
        if len(self.search.metrics) > 1:  # pruners support only one metric
            return False
        metric, epochs = self.search.metrics[0], self.search.epochs
        curves = [dict(execution["values"]) for execution in executions]
        if curve is not None:
            curves.append(dict(curve))
        steps: dict[int, float] = {}
        for number, values in enumerate(curves):
            scores = [execution["score"] for execution in executions[:number]]
            if not isinstance(self.study.pruner, WilcoxonPruner):
                for epoch in values:
                    best = metric.best(value for e, value in values.items() if e <= epoch)
                    steps[number * epochs + epoch] = mean([*scores, best])
            elif number < len(executions):
                steps[number] = executions[number]["score"]
        known = self._frozen(trial).intermediate_values
        for step in steps.keys() - known.keys():
            trial.report(steps[step], step)
        return bool(steps) and trial.should_prune()

    def execute(self, trial: Trial, number: int, executions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Train an execution; return its record."""
        start = time.perf_counter()
        config = config_with(self.search.base, trial.params, self.search.space)
        config["seed_everything"] += number  # the same seeds in all trials, so that trials are comparable
        config["origin"] = {"study_name": self.search.options.study_name, "trial": trial.number}
        folder = _new_folder(self.search.folder, trial.number, number)
        progress = TrialCallback(self, trial, executions)
        try:
            self.train(config, folder, progress)
            result = progress.result()
        except (OSError, UpdateFinishedTrialError):  # a fault of the machine, or another process has the trial
            raise
        except (Exception, SystemExit) as error:  # caused by this combination of values
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if not self.owns(trial):
                raise AbandonedTrial from None
            self._fail(trial, f"{type(error).__name__}: {' '.join(str(error).split())}")
        if not self.owns(trial):
            raise AbandonedTrial
        if progress.pruned or self.search.options.keep_checkpoints == "none":
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if progress.pruned:
            raise optuna.TrialPruned
        return {
            "execution": number,
            "seed": config["seed_everything"],
            "seconds": round(time.perf_counter() - start, 2),
            "folder": folder.relative_to(self.search.folder).as_posix(),
            **result,
        }

    def train(self, config: dict[str, Any], folder: Path, progress: "TrialCallback") -> None:
        """Train a config as ``fit`` would; write config, events and weights to a folder."""
        search = self.search
        gc.collect()  # the trainer and data of the last execution, however it ended, are in reference cycles
        loggers: list[Any] = []
        named = copy.deepcopy(config)
        _name_loggers(named["trainer"]["logger"], "_".join([search.options.study_name, *folder.parts[-2:]]))
        try:
            run = SilentFit(named)
            complete = {key: value for key, value in run.plain_config().items() if key in config}
            complete["trainer"]["logger"] = config["trainer"]["logger"]
            (folder / "config.yaml").write_text(yaml.safe_dump(complete, sort_keys=False), encoding="utf-8")
            if self._data is not None:
                run.datamodule.reuse_splits(self._data)
            self._data = run.datamodule
            loggers = [*run.trainer.loggers]
            if loggers:
                with search.lock():  # two loggers could fail to create the same database simultaneously
                    for logger in loggers:
                        logger.experiment  # noqa: B018
            if config["tensorboard"]:
                tensorboard = RunLogger(search.folder, folder.parent.name, folder.name, default_hp_metric=False)
                run.trainer.loggers = [tensorboard, *loggers]
            callbacks: list[Any] = run.trainer.callbacks  # type: ignore[attr-defined]
            mode: Any = "max" if search.metrics[0].sign == 1 else "min"
            progress.checkpoint = RunCheckpoint(complete, search.metrics[0].name, mode)
            progress.checkpoint.dirpath = str(folder / "checkpoints")
            callbacks += [progress.checkpoint, progress]
            run.trainer.fit(run.model, datamodule=run.datamodule)
        finally:
            for logger in loggers:
                if isinstance(logger, WandbLogger):  # otherwise the next execution would log to the same run
                    logger.experiment.finish()


def run_trials(search: Search, storage: BaseStorage) -> None:
    """Run trials of a study until none is left to start.

    Raises:
        Exception: If the machine or the storage stops a trial; the trial is left unchanged.
    """
    pruner = instantiate(BasePruner, search.options.pruner)
    study = optuna.load_study(storage=storage, study_name=search.options.study_name, pruner=pruner)
    study.sampler = make_sampler(study, search.options.sampler, search.base["seed_everything"], search.space)
    objective = Objective(search, study, storage, process_name())

    def can_go_on() -> bool:
        return has_room(study, search.options.n_trials) and not is_time_up(study)

    def after_trial(study: Study, _: FrozenTrial) -> None:
        if search.options.keep_checkpoints == "best":
            delete_weights(search, study)
        if not can_go_on():
            study.stop()

    is_exhausted = False
    while can_go_on() and not is_exhausted:
        try:
            study.optimize(objective, catch=(FailedTrialError,), callbacks=[after_trial])
            is_exhausted = True  # without an exception, optimize returns only after study.stop()
        except AbandonedTrial as reason:
            if isinstance(reason.__cause__, Exception):
                raise reason.__cause__ from None


def scores_of(execution: dict[str, Any]) -> list[float]:
    """Return the values of all metrics of an execution, at the best epoch of the first metric."""
    scores: list[float] = execution.get("scores", [execution["score"]])
    return scores


def kept_weights(search: Search, trial: FrozenTrial) -> Path | None:
    """Return the path of a trial's weights on this machine, those of its best execution; None if none are kept."""
    record = TrialRecord.of(trial)
    if not record.executions:
        return None
    path = search.folder / record.best_execution(search.metrics[0]).get("folder", "") / "checkpoints/best.ckpt"
    return path if path.is_file() else None


def delete_weights(search: Search, study: Study) -> None:
    """Delete the weights of all finished trials except the best one."""
    best = None
    with suppress(UserError):  # no trial is complete, or none is within the limits
        best = best_trial(study, search.options.limits)
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and (best is None or trial.number != best.number):
            for execution in TrialRecord.of(trial).executions:
                folder = search.folder / execution.get("folder", "") / "checkpoints"
                if "folder" in execution and folder.is_dir():
                    shutil.rmtree(folder, ignore_errors=True)


def _new_folder(study_folder: Path, trial: int, execution: int) -> Path:
    """Create and return the folder of an execution; the logs of lost executions stay."""
    lost = 0
    while True:
        again = f"_again_{lost}" if lost else ""
        folder = study_folder / f"trial_{trial:03}" / f"execution_{execution}{again}"
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        lost += 1


def _name_loggers(config: Any, name: str) -> None:
    """Name the user's loggers after the execution, unless they have a name: each execution has its own loggers."""
    keys = {"CSVLogger": "version", "TensorBoardLogger": "version", "MLFlowLogger": "run_name", "WandbLogger": "name"}
    for logger in as_list(config):
        key = keys.get(logger["class_path"].rpartition(".")[2]) if isinstance(logger, dict) else None
        if key is not None and logger.setdefault("init_args", {}).get(key) is None:
            logger["init_args"][key] = name


class TrialCallback(Checkpoint):
    """Reports the metric after each epoch, ends the training of a trial that is pruned or lost, and logs the score.

    Lightning calls a Checkpoint last, when the epoch's training metrics also exist.

    Args:
        objective: The objective, which holds the search and the study.
        trial: The trial.
        executions: The trial's finished executions.

    Attributes:
        checkpoint: The callback that measures each epoch, as in ``fit``; it is called before this one.
        pruned: Whether the pruner ended the trial.
    """

    checkpoint: RunCheckpoint

    def __init__(self, objective: Objective, trial: Trial, executions: Sequence[dict[str, Any]]) -> None:
        self._objective = objective
        self._trial = trial
        self._executions = executions
        self._metrics = objective.search.metrics
        self._names = [metric.name for metric in (*self._metrics, *objective.search.limited)]
        self._epochs: dict[int, dict[str, float]] = {}
        self.pruned = False

    def result(self) -> dict[str, Any]:
        """Return the values at the best epoch of the first metric, and those of all epochs.

        Raises:
            ValueError: If no epoch has values of all metrics.
        """
        if not self._epochs:
            logged = dict.fromkeys(name for row in self.checkpoint.history for name in row if "/" in name)
            raise ValueError(
                f"no epoch ended with values of {', '.join(self._names)}; logged metrics: {', '.join(logged) or 'none'}"
            )
        first, curve = self._metrics[0], self._curve()
        score = first.best(curve.values())
        best = self._epochs[next(epoch for epoch, value in curve.items() if value == score)]
        result: dict[str, Any] = {"score": score, "values": [*curve.items()]}
        if len(self._metrics) > 1:
            result["scores"] = [best[metric.name] for metric in self._metrics]
        if limited := self._objective.search.limited:
            result["limited"] = {metric.name: best[metric.name] for metric in limited}
        return result

    def _curve(self) -> dict[int, float]:
        return {epoch: values[self._metrics[0].name] for epoch, values in self._epochs.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._add_epoch(pl_module):
            return
        self.pruned = self._objective.report(self._trial, self._executions, self._curve())
        if self.pruned or not self._objective.owns(self._trial):
            trainer.should_stop = True

    def _add_epoch(self, module: LightningModule) -> bool:
        """Keep the values of the last epoch; return whether it has all, for which it may have to be validated."""
        row = self.checkpoint.history[-1]
        if any(name not in row and name not in COMPUTED for name in self._names):
            return False
        epoch = int(row["epoch"])
        for name, value in row.items():
            if not math.isfinite(value):
                raise ArithmeticError(f"{name} is {value} after epoch {epoch + 1}")
        known = {**self._epochs.get(epoch, {}), **row}
        self._epochs[epoch] = {n: known[n] if n in known else self._compute(n, module) for n in self._names}
        return True

    def _compute(self, name: str, module: LightningModule) -> float:
        """Return the value of a metric that is not logged."""
        if name == "parameters":
            return count_parameters(module)
        if name == "seconds":
            return round(time.perf_counter() - self._start, 2)
        module.eval()  # otherwise dropout would draw random numbers
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(module.example_input_array.to(module.device))  # type: ignore[union-attr]
        module.train()
        return float(counter.get_total_flops())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores, and the config for TensorBoard's page "HParams"."""
        if self.checkpoint.history:
            self._add_epoch(pl_module)  # once more: a callback may have averaged the weights
        result = self.result()
        others = zip(self._metrics[1:], scores_of(result)[1:], strict=True)
        scores = {"score": result["score"], **{metric.name: value for metric, value in others}}
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):  # its x axis is the epoch
                logger.log_metrics(scores, step=int(self.checkpoint.history[-1]["epoch"]) + 1)
                logger.log_settings(self.checkpoint.config or {})
            else:
                logger.log_metrics(scores, step=trainer.global_step)
