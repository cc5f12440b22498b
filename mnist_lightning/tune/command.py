"""The command ``tune``: starts workers, watches the study, and refits the best."""

import csv
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
import yaml
from jsonargparse import Namespace, get_loader, lazy_instance
from jsonargparse.typing import NonNegativeInt, PositiveFloat, restricted_number_type
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner, WilcoxonPruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from mnist_lightning.cli import DEFAULTS, RunCLI, fit, quieten_lightning
from mnist_lightning.parsing import corrected
from mnist_lightning.runs import (
    PROG,
    RUN_KEYS,
    atomic_write,
    command_line,
    flatten,
    format_table,
    newest_file,
    user_errors,
)
from mnist_lightning.signals import Interrupt, interruptible
from mnist_lightning.tune.search import COMPUTED, Search
from mnist_lightning.tune.space import (
    NOTEBOOK_SPACE,
    SearchSpace,
    check_values,
    config_with,
    describe,
    describe_conditions,
    full_key,
    get_value,
    in_distribution,
    make_space,
    params_of,
    short_key,
    short_value,
    spread,
)
from mnist_lightning.tune.storage import hide_password, open_storage
from mnist_lightning.tune.study import (
    ATTEMPTS,
    SWEEPS,
    best_trial,
    check_limits,
    find_study,
    find_trial,
    format_value,
    give_back,
    is_complete,
    is_counted,
    is_over,
    is_there,
    metrics_of,
    open_study,
    process_name,
    renew_deadline,
    results,
    set_attributes,
    sweep,
    time_left,
)
from mnist_lightning.tune.worker import Worker

# without a bound, what is made for each of them would fill the memory
Count: Any = restricted_number_type("Count", int, [(">", 0), ("<=", 10**6)])
Processes: Any = restricted_number_type("Processes", int, [(">", 0), ("<=", 1000)])


@dataclass
class SearchOptions:
    """Options of ``tune``.

    Args:
        search_space: From a key of this config (an item of a list by its index) to class path and arguments of the
            Optuna distribution of its values.
        metric: A trial's value is this metric at its best epoch, averaged over the trial's executions. Of several (give
            it again), those after the first are taken at the best epoch of the first; parameters, flops and seconds
            are metrics as well.
        direction: Whether a good value is high or low, for each metric; by default low for losses, errors, parameters,
            flops and seconds, else high.
        limits: With several metrics, how bad one may be at most in the best trial; as --limits.parameters 50000.
        sampler: Draws the trials. Its seed is seed_everything, unless given.
        pruner: Ends bad trials early, after an epoch or an execution.
        n_trials: Trials of the study in all, those of earlier commands and of other processes included.
        timeout: Time after which no trial is begun, such as 90 (seconds), 30m, 2h or 1d; all commands that share the
            study at the same time keep to that of the first.
        finish_trials: Whether trials that run when the time is over are trained to their end, not put back.
        executions_per_trial: Trainings of a trial, with the seeds seed_everything, seed_everything + 1, ...
        study_name: Name of the study, and of its folder in lightning_logs.
        storage: Path of a journal file or URL of an Optuna storage; by default journal.log in the study's folder.
        workers: Processes that train; by default one for each GPU or, without any, each CPU core.
        grace_period: Seconds after which the trials of a machine that has vanished are run by others.
        enqueue_baseline: Whether the values that the config has are a trial, the first of a new study.
        enqueue: YAML file with a list of trials that are run first. Each is a mapping from keys of the search space to
            values, or a config such as best.yaml; what is missing is drawn.
        like: Name of another study, in lightning_logs or the storage: the values of its best trial are run first.
        keep_checkpoints: Whether the weights of the best trial are kept, as checkpoints of its executions.
        trial: Take this trial of the study instead of searching on and taking the best.
        refit: Whether the best is trained anew at the end, as a run of its own.
        refit_epochs: Epochs of that, unless trainer.max_epochs was searched.
    """

    search_space: dict[str, dict[str, Any]] = field(default_factory=lambda: NOTEBOOK_SPACE)
    metric: str | list[str] = "val/accuracy"
    direction: Literal["maximize", "minimize"] | list[Literal["maximize", "minimize"]] | None = None
    limits: dict[str, float] = field(default_factory=dict)
    sampler: BaseSampler = lazy_instance(RandomSampler)  # noqa: RUF009
    pruner: BasePruner = lazy_instance(NopPruner)  # noqa: RUF009
    n_trials: Count = 10
    timeout: PositiveFloat | str | None = None
    finish_trials: bool = True
    executions_per_trial: Count = 2
    study_name: str = "tune"
    storage: str | None = None
    workers: Processes | None = None
    grace_period: PositiveFloat = 60.0
    enqueue_baseline: bool = False
    enqueue: str | None = None
    like: str | None = None
    keep_checkpoints: Literal["none", "best"] = "none"
    trial: NonNegativeInt | None = None
    refit: bool = True
    refit_epochs: Count = 20


class SearchCLI(RunCLI):
    """Parses the options of a search beside those of a run, with the notebook's epochs and batch size."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(SearchOptions, as_group=False)
        parser.add_argument("--show", action="store_true", help="Print the results so far of the study, and no more.")
        parser.set_defaults({"name": "tuned", "trainer.max_epochs": 10})
        parser.set_defaults({"data": {**DEFAULTS["data"], "init_args": {"batch_size": 32}}})

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        defaults = self.parser.get_defaults()
        for option in fields(SearchOptions):  # null is the default, but a search of nothing is a mistake
            value = self.config[option.name]
            if value is None and option.name != "search_space":
                self.config[option.name] = defaults[option.name]
            elif isinstance(value, int) and not isinstance(value, bool):
                self.config[option.name] = int(value)  # processes that start know no type of this parser
        metric, direction = self.config.metric, self.config.direction
        metrics = [metric] if isinstance(metric, str) else metric
        directions = [direction] if isinstance(direction, str) else direction or [*map(_direction, metrics)]
        if len(directions) != len(metrics) or len({*metrics}) != len(metrics) or not metrics:
            raise MisconfigurationException(
                f"Each metric needs one direction: metric is {', '.join(metrics)}, direction {', '.join(directions)}."
            )
        if metrics[0] in COMPUTED:
            raise MisconfigurationException(f"The first metric tells the best epoch; {metrics[0]} cannot.")
        if not self.config.show:  # the study says which
            check_limits(self.config.limits, metrics)
        if len(metrics) > 1 and not self.config.pruner.class_path.endswith("NopPruner"):
            raise MisconfigurationException("A pruner knows one metric only: leave --pruner, or give one --metric.")
        self.config.metric, self.config.direction = metrics, directions
        for key in ("sampler", "pruner"):
            arguments = self.config[key].get("init_args", {})
            for name, value in arguments.items():  # a number is taken for text where both may stand: max_resource
                arguments[name] = int(value) if isinstance(value, str) and value.isdecimal() else value


def _direction(metric: str) -> str:
    is_low = metric in COMPUTED or any(word in metric for word in ("loss", "error"))
    return "minimize" if is_low else "maximize"


def main(command: str, description: str, arguments: Sequence[str]) -> None:
    """Run the command."""
    seen: set[str] = set()
    words = []
    for word in arguments:  # --metric A --metric B are two, as the parser's --metric A --metric+ B
        key, is_joined, value = word.partition("=")
        words.append(f"{key}+{is_joined}{value}" if key in seen else word)
        seen |= {key} & {"--metric", "--direction"}
    quieten_lightning()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with user_errors(), corrected():
        run = SearchCLI(command, words, description)
        with interruptible() as interrupt:
            if run.config.show:
                show(run)
                return
            tune(run, command_line(command, *arguments), interrupt)


def show(run: SearchCLI) -> None:
    """Print the results so far of a study, from any machine and while it is searched.

    Raises:
        MisconfigurationException: There is no such study.
    """
    name = run.config.study_name
    source = run.config.storage or str(run.logs / name / "journal.log")
    study = find_study(name, source)
    if study is None:
        raise MisconfigurationException(f"There is no study {name} in {hide_password(source)}.")
    if not isinstance(study.user_attrs.get("settings"), dict):
        raise MisconfigurationException(f"The study {name} was not made by tune.")
    _print_results(study, run.config.limits)


def tune(run: SearchCLI, command: str, interrupt: Interrupt) -> None:
    """Search, print the results, refit the best.

    Args:
        run: Gives the options, and the config of a run.
        command: What was typed, to be typed again.
        interrupt: Of the process.
    """
    options = Namespace(**{field.name: run.config[field.name] for field in fields(SearchOptions)})
    timeout = None if options.timeout is None else _seconds(options.timeout)
    base = {key: value for key, value in run.plain_config().items() if key in ("name", "origin", *RUN_KEYS)}
    base = spread(base, options.search_space or {})
    space = make_space(options.search_space, base)
    check_values(space, base, run.parser)  # type: ignore[arg-type]
    first = _first_trials(run, space, base)
    _check_training(run)
    print("Search space:")
    width = max(map(len, space))
    for key, distribution in space.items():
        print(f"  {key:{width}}  {describe(distribution)}{describe_conditions(space.conditions.get(key, {}))}")

    folder = run.logs / options.study_name
    search = Search(options, base, space, options.storage or str(folder / "journal.log"), folder, process_name())
    search.check_sampler()
    storage = open_storage(search.storage)
    folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(search, run.datamodule.digest())
    study, _ = open_study(storage, options.study_name, options.direction, settings, space)
    study.set_user_attr("limits", dict(options.limits))  # for reports
    search.use_sampler(study)
    study.pruner = run.config_init.pruner
    for source, params in first:
        count = sum(map(is_counted, study.get_trials(deepcopy=False)))
        if is_there(study, params):
            continue
        if count >= options.n_trials:
            print(f"{source}: not done, the study has its {count} trials. --n_trials {count + 1} has room")
        else:
            study.enqueue_trial(params)
    took_part = options.trial is None and not is_complete(study, options.n_trials)
    if took_part:
        storage_option = ["--storage", options.storage] if options.storage else []
        print("While it runs, elsewhere:")
        print(f"  {command_line('tune', '--show', '--study_name', options.study_name, *storage_option)}")
        print(f"  tensorboard --logdir {shlex.quote(str(run.logs))}")
        if not search.storage.startswith("grpc://"):  # the dashboard reads journals and databases
            print(f"  optuna-dashboard {shlex.quote(search.storage)}")
        renew_deadline(study, timeout)
    interrupted = took_part and Workers(search, study, _devices(run.config, study)).run(interrupt)
    _print_results(study, options.limits)
    if took_part and not interrupted and is_over(study) and not is_complete(study, options.n_trials):
        print(f"\nThe time is over. Continue: {command}")
    path = None
    if options.trial is not None or study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        trial = best_trial(study, options.limits) if options.trial is None else find_trial(study, options.trial, space)
        path, config = _write_config(trial, run, search)
        print(f"\nConfig of trial {trial.number}: {path}    Train it: {command_line('fit', '--config', path)}")
        print(f"Of another: {command} --trial N")
        for weights in search.checkpoints(trial):
            print(f"Its weights: {weights}    Test them: {command_line('test', '--ckpt_path', weights)}")
    if interrupted:
        print(f"\nStopped. Continue: {command}")
        sys.exit(130)
    if path is None:
        failed = [trial for trial in study.trials if "error" in trial.user_attrs]
        reason = f" The first failed: {failed[0].user_attrs['error']}" if failed else ""
        raise MisconfigurationException(f"No trial was completed, so there is nothing to refit.{reason}")
    if not options.refit:
        return
    # several commands that share the study end together
    finished = [t for t in study.get_trials(deepcopy=False) if t.datetime_complete is not None and is_counted(t)]
    last = max(finished, key=lambda trial: (trial.datetime_complete, trial.number)).user_attrs.get("owner")
    if took_part and last != search.owner:
        print(f"Refit: left to {last}, which ended the last trial. The same command, given again, does it here.")
    else:
        _refit(path, config, run.logs, options)


def _first_trials(run: SearchCLI, space: SearchSpace, base: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The trials that the options want to be run first, each with where it comes from.

    Raises:
        MisconfigurationException: There is no such file or study, or what it has is not searched.
    """
    options, given = run.config, []
    if options.enqueue_baseline:
        given.append(("enqueue_baseline", base))
    if options.like is not None:
        source = options.storage or str(run.logs / options.like / "journal.log")
        other = find_study(options.like, source)
        if other is None:
            raise MisconfigurationException(f"like: there is no study {options.like} in {hide_password(source)}.")
        best = best_trial(other).params
        values = {key: best[key] for key in space if key in best and in_distribution(best[key], space[key])}
        values = params_of(values, space, "")  # without what depends on something that is not taken
        if left := sorted(best.keys() - values.keys()):
            print(f"like {options.like}: {', '.join(map(short_key, left))} not taken, which this space does not have")
        given.append((f"like {options.like}", values))
    if options.enqueue:
        try:
            # as configs are read: to YAML 1.1 alone, 1e-5 is no number, but to json.dump it is
            items = get_loader("yaml")(Path(options.enqueue).read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError) as error:
            raise MisconfigurationException(f"{options.enqueue} is no YAML: {' '.join(str(error).split())}") from error
        items = items if isinstance(items, list) else [items]
        for number, item in enumerate(items):
            source = f"{options.enqueue}, trial {number + 1} of {len(items)}"
            if not isinstance(item, dict) or not item:
                raise MisconfigurationException(f"{source} is no mapping from keys of the search space to values.")
            if "model" not in item and (unknown := item.keys() - space.keys()):
                raise MisconfigurationException(f"{source}: {', '.join(map(str, unknown))} is not searched.")
            given.append((source, item))
    trials = []
    for source, values in given:
        found, values = {}, spread(values, space)
        for key in space:
            with suppress(KeyError, TypeError, IndexError, ValueError):  # a config may lack what is not always drawn
                found[key] = values[key] if key in values else get_value(values, full_key(key))
        params = params_of(found, space, source)
        if values.keys() <= space.keys() and (ignored := values.keys() - params.keys()):
            raise MisconfigurationException(
                f"{source}: {', '.join(ignored)} is not drawn beside the other values. Leave it, or change those."
            )
        if params:
            trials.append((source, params))
    return trials


def _write_config(trial: FrozenTrial, run: SearchCLI, search: Search) -> tuple[Path, dict[str, Any]]:
    """Write the config that refits a trial; gives its file and itself."""
    options = search.options
    config = run.plain_config(run.parser.parse_object(config_with(search.base, trial.params, search.space)))
    config = {key: config[key] for key in search.base}
    config["origin"] = {"study_name": options.study_name, "trial": trial.number}
    if "trainer.max_epochs" not in search.space:
        config["trainer"]["max_epochs"] = int(options.refit_epochs)
    path = search.folder / ("best.yaml" if options.trial is None else f"trial_{trial.number:03}/config.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path, config


def _seconds(timeout: float | str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(timeout))
    seconds = float(match[1]) * {"m": 60, "h": 3600, "d": 86400}.get(match[2], 1) if match else 0
    if not 0 < seconds < math.inf:
        raise MisconfigurationException(f"timeout {timeout} is no time: give seconds, or 30m, 2h, 1d.")
    return seconds


def _check_training(run: SearchCLI) -> None:
    """See that data, network and metric fit together, before anything is trained."""
    if run.trainer.world_size > 1:
        raise MisconfigurationException(
            "A trial trains on one device, and the workers share the devices out: leave --trainer.devices at 1, and "
            "say --workers N for another number of workers."
        )
    run.datamodule.setup("fit")
    run.trainer.limit_val_batches = 1
    (metrics,) = run.trainer.validate(run.model, datamodule=run.datamodule, verbose=False)
    for metric in run.config.metric:
        if metric not in metrics and metric not in COMPUTED and not metric.startswith("train/"):
            raise MisconfigurationException(
                f"The metric {metric} is not logged in validation. These are: {', '.join(metrics)}; "
                f"those of train/ and {', '.join(COMPUTED)} can be taken as well."
            )


PLUMBING = {
    *("accelerator", "strategy", "devices", "num_nodes", "benchmark", "inference_mode", "num_sanity_val_steps"),
    *("logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "profiler", "detect_anomaly"),
    *("default_root_dir", "enable_checkpointing", "model_registry", "limit_test_batches", "limit_predict_batches"),
}
"""Keys of the trainer on which no value of a study depends."""


def _settings(search: Search, digest: str) -> dict[str, Any]:
    """What a value of the study depends on, beside its space."""
    settings = config_with(search.base, search.space.example({}), search.space)
    for key in ("name", "origin", "num_threads", "tensorboard", "fast"):
        del settings[key]
    settings["trainer"] = {key: value for key, value in settings["trainer"].items() if key not in PLUMBING}
    data = {
        key: value for key, value in settings["data"]["init_args"].items() if value is not None and value is not False
    }
    for key in ("data_dir", "eval_batch_size"):  # the digest tells the data, wherever it is
        data.pop(key, None)
    settings["data"] = {**data, "digest": digest}
    metric = search.options.metric if len(search.options.metric) > 1 else search.options.metric[0]
    return {**settings, "metric": metric, "executions_per_trial": search.options.executions_per_trial, "version": 2}


def _devices(options: Any, study: Study) -> list[str | None]:
    """For each worker the GPU that it may see, or None; there are no more than executions that are left."""
    gpus: list[str] = []
    if options.trainer.devices == 1 and options.trainer.accelerator in ("auto", "gpu", "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    finished = sum(is_counted(trial) for trial in study.get_trials(deepcopy=False) if trial.state.is_finished())
    left = max(1, options.n_trials - finished) * options.executions_per_trial
    count = min(options.workers or len(gpus) or cores, left)
    return [gpus[i % len(gpus)] if gpus else None for i in range(count)]


class Workers:
    """The processes of a search, and what the command does while they work.

    Args:
        search: The search.
        study: Its study.
        devices: For each worker the GPU that it may see, or None.
    """

    def __init__(self, search: Search, study: Study, devices: Sequence[str | None]) -> None:
        self.search = search
        self.study = study
        self.devices = devices
        self._workers: list[Worker] = []
        self._shown = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}

    def run(self, interrupt: Interrupt) -> bool:
        """Search until the study is complete; gives whether it was interrupted."""
        options = self.search.options
        total = options.n_trials * options.executions_per_trial * self.search.epochs
        shape = "{desc} |{bar}| {percentage:3.0f} % [{elapsed} < {remaining}]"
        self.bar: tqdm[Any] = tqdm(total=total, bar_format=shape, leave=False, disable=None)
        try:
            self._watch(interrupt)
        except KeyboardInterrupt:
            pass
        finally:
            interrupt.is_put_off = True
            for worker in self._workers:
                worker.stop()  # all at once
            for worker in self._workers:
                worker.end()
            storage: Any = self.study._storage
            storage.patience = 0.0
            with suppress(MisconfigurationException):  # the storage is away: whoever comes next will notice
                for trial in self._own_trials():
                    give_back(self.study, trial, attempts=trial.user_attrs.get("attempts", 0))
            self.bar.close()
            interrupt.is_put_off = False
        return interrupt.received

    def _watch(self, interrupt: Interrupt) -> None:
        """Keep the workers at work, and show how far the study is."""
        for device in self.devices:
            self._workers.append(Worker(self.search, device))
        heartbeats: dict[int, tuple[float | None, int]] = {}
        next_sweep, early_deaths = 0.0, 0
        while self._workers and not interrupt.received:  # some code swallows a KeyboardInterrupt
            if not self.search.options.finish_trials and is_over(self.study):
                break
            if time.monotonic() > next_sweep:
                for trial in self._own_trials():
                    with suppress(UpdateFinishedTrialError):
                        set_attributes(self.study, trial, heartbeat=time.time())
                for number in sweep(self.study, heartbeats):
                    self._print(f"Trial {number:3} is run again: its process died, or was silent for too long")
                next_sweep = time.monotonic() + self.search.options.grace_period / SWEEPS
            ended = wait([worker.process.sentinel for worker in self._workers], timeout=1)
            self._show_progress()
            for worker in [worker for worker in self._workers if worker.process.sentinel in ended]:
                self._workers.remove(worker)
                code, words = worker.end(), worker.last_words()
                if words is not None:
                    raise MisconfigurationException(words)
                if code == 0:
                    continue
                early_deaths = 0 if self._free(worker, code) else early_deaths + 1
                if early_deaths == ATTEMPTS:
                    raise MisconfigurationException(
                        f"{ATTEMPTS} workers died before they had begun, the last with exit code {code}. "
                        f"Is there enough memory for {len(self.devices)} workers?"
                    )
                self._workers.append(Worker(self.search, worker.device))
        self._show_progress()

    def _free(self, worker: Worker, code: int) -> bool:
        """Free the execution that a dead worker was at; gives whether it was at one."""
        with self.search.lock:
            for trial in self._own_trials():
                workers = trial.user_attrs.get("workers", {})
                left = {execution: name for execution, name in workers.items() if name != worker.name}
                if left != workers:
                    attempts = trial.user_attrs.get("attempts", 0) + 1
                    set_attributes(self.study, trial, workers=left, attempts=attempts)
                    self._print(f"Trial {trial.number:3} goes on with another worker: one died (exit code {code})")
                    return True
        return False

    def _own_trials(self) -> list[FrozenTrial]:
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in running if trial.user_attrs.get("owner") == self.search.owner]

    def _show_progress(self) -> None:
        trials = [trial for trial in self.study.get_trials(deepcopy=False) if is_counted(trial)]
        finished = [trial for trial in trials if trial.state.is_finished()]
        for trial in finished:
            if trial.number not in self._shown:
                self._shown.add(trial.number)
                result = " ".join(map(format_value, trial.values or [])) or trial.user_attrs.get("error")
                params = ", ".join(f"{short_key(key)} {short_value(value)}" for key, value in trial.params.items())
                self._print(f"Trial {trial.number:3} {trial.state.name.lower():8} {result}  {params}")
        states = [trial.state for trial in trials]
        self.bar.desc = f"Trials {len(finished)}/{self.search.options.n_trials}"
        for name, state in (("pruned", TrialState.PRUNED), ("failed", TrialState.FAIL)):
            if state in states:
                self.bar.desc += f", {states.count(state)} {name}"
        if TrialState.COMPLETE in states:
            best = self.search.best(trial.values[0] for trial in finished if trial.state == TrialState.COMPLETE)
            self.bar.desc += f", best {best:.4f}"
        if (left := time_left(self.study)) < math.inf:
            self.bar.desc += f", {tqdm.format_interval(left)} until no trial is begun"
        epochs = 1 if not isinstance(self.study.pruner, WilcoxonPruner) else self.search.epochs  # to a reported step
        steps = sum(len(trial.intermediate_values) for trial in trials if not trial.state.is_finished())
        of_trial = self.search.options.executions_per_trial * self.search.epochs
        self.bar.n = len(finished) * of_trial + steps * epochs
        self.bar.refresh()

    def _print(self, line: str) -> None:
        with self.bar.external_write_mode():
            print(line, flush=True)


def _print_results(study: Study, limits: dict[str, float]) -> None:
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    states = [("completed", TrialState.COMPLETE), ("pruned", TrialState.PRUNED), ("failed", TrialState.FAIL)]
    numbers = [f"{sum(t.state == state and is_counted(t) for t in trials)} {name}" for name, state in states]
    unfinished = [("running", TrialState.RUNNING), ("waiting", TrialState.WAITING)]
    counts = [(sum(t.state == state for t in trials), name) for name, state in unfinished]
    numbers += [f"{count} {name}" for count, name in counts if count]
    print(f"\nTrials of study {study.study_name}: {', '.join(numbers)}")
    if not complete:
        return
    keys = list(dict.fromkeys(key for trial in complete for key in trial.params))
    table = results(study, keys)
    if len(study.directions) > 1:
        front = {str(trial.number) for trial in study.best_trials}
        table = table[table["trial"].isin(front)]
        print(f"Pareto front: {len(table)} of them, none of which another betters in every metric")
    print(table.head(10 if len(study.directions) == 1 else 30).to_string(index=False))
    limits = limits or study.user_attrs.get("limits", {})
    best, metrics = best_trial(study, limits), metrics_of(study)
    values = ", ".join(f"{metric} {format_value(value)}" for metric, value in zip(metrics, best.values, strict=True))
    within = ", ".join(f"{name} {format_value(value)}" for name, value in limits.items())
    print(f"\nBest{f' within {within}' if limits else ''}: trial {best.number}, {values}")
    for key, value in best.params.items():
        print(f"  {key}: {value}")
    if len({trial.values[0] for trial in complete}) > 1:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        importances = optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=lambda trial: trial.values[0]
        )
        shown = ", ".join(f"{short_key(key)} {importance:.2f}" for key, importance in importances.items())
        print(f"Importance (fANOVA): {shown}")


def _refit(path: Path, config: dict[str, Any], logs: Path, options: Namespace) -> None:
    """Train a config as an ordinary run, unless there is one already, and show it beside the baseline."""
    epochs = config["trainer"]["max_epochs"]
    for run in sorted((logs / config["name"]).glob("version_*")):
        if (run / "test.csv").exists():
            found = flatten(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
            if all(found.get(key, value) == value for key, value in flatten(config).items()):
                print(f"Refit: it is there already, {run}")
                break
    else:
        if epochs != options.refit_epochs:
            print(f"\ntrainer.max_epochs was searched: {epochs}. --refit_epochs {options.refit_epochs} is not used.")
        print(f"\nRefit: {command_line('fit', '--config', path)}")
        fit(RunCLI("fit", ["--config", str(path)]))
    tests = {}
    for name in ("baseline", config["name"]):
        newest = newest_file((logs / name).glob("version_*/test.csv"))
        if newest is not None:
            with newest.open(newline="", encoding="utf-8") as file:
                tests[name] = newest.parent, next(csv.DictReader(file))
    metrics = [key for key in list(tests.values())[-1][1] if key.startswith("test/")]
    rows = [[str(run), *(f"{float(test.get(k, 'nan')):.4f}" for k in metrics)] for run, test in tests.values()]
    titles = ["test, weights of the last epoch", *(key.removeprefix("test/").replace("_", " ") for key in metrics)]
    print(f"\n{format_table([titles, *rows])}")
    if len(tests) == 2:
        models = [f"{name}={run}" for name, (run, _) in tests.items()]
        storage = ["--storage", options.storage] if options.storage else []
        print(f"\nCompare them: {command_line('report', *models, '--study', options.study_name, *storage)}")
    else:
        print(f"\nTrain the notebook's baseline, to compare: {PROG} fit")
