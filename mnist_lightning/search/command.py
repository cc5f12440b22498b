"""Options of ``tune``, first trials, results and refit."""

import csv
import math
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import optuna
import yaml
from jsonargparse import Namespace, get_loader, lazy_instance
from jsonargparse.typing import NonNegativeInt, PositiveFloat, restricted_number_type
from lightning.pytorch.cli import LightningArgumentParser
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mnist_lightning.commands.cli import DEFAULTS, RunCLI, add_training_options, quieten_lightning
from mnist_lightning.commands.fit import FitCLI
from mnist_lightning.commands.parsing import patched_jsonargparse
from mnist_lightning.search.pool import Pool, devices
from mnist_lightning.search.record import COMPUTED, Direction, Metric, TrialRecord, is_counted, metrics_of
from mnist_lightning.search.sampler import check_sampler
from mnist_lightning.search.space import (
    NOTEBOOK_SPACE,
    SearchSpace,
    check_values,
    config_with,
    describe,
    describe_conditions,
    full_key,
    in_distribution,
    make_space,
    params_of,
    short_key,
    spread,
)
from mnist_lightning.search.storage import hide_password, open_storage
from mnist_lightning.search.study import (
    OF_TRAINING,
    best_trial,
    check_limits,
    find_study,
    find_trial,
    format_value,
    has_trial_with,
    is_complete,
    is_time_up,
    limited_values,
    open_study,
    pareto_front,
    renew_deadline,
    results,
)
from mnist_lightning.search.trial import Search, kept_weights
from mnist_lightning.system.console import PROG, command_line, format_table
from mnist_lightning.system.errors import UserError, user_errors
from mnist_lightning.system.files import atomic_write
from mnist_lightning.system.nested import flatten, get_value
from mnist_lightning.system.signals import Interrupt, interruptible
from mnist_lightning.training.runs import RUN_KEYS, newest_file

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
        limits: How bad a metric may be at most in the best trial, as --limits.parameters 50000; samplers that learn
            look for trials within. It need not be one of --metric.
        sampler: Draws the trials. Its seed is seed_everything, unless given.
        pruner: Ends bad trials early, after an epoch or an execution.
        n_trials: Trials of the study in all, those of earlier commands and of other processes included.
        timeout: Time after which no trial is begun, such as 90 (seconds), 30m, 2h or 1d; all commands that share the
            study at the same time keep to that of the first.
        finish_trials: Whether trials that run when the time is over are trained to their end, not put back.
        executions_per_trial: Trainings of a trial, with the seeds seed_everything, seed_everything + 1, ...
        study_name: Name of the study, and of its folder in lightning_logs.
        storage: Path of a journal file or URL of an Optuna storage; by default journal.log in the study's folder.
        workers: Processes that train, each one trial at a time; by default one for each GPU or, without any, each CPU
            core.
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
    direction: Direction | list[Direction] | None = None
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
        add_training_options(parser)
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
        self.metrics = _metrics(self.config.metric, self.config.direction)
        if not self.config.show:  # the study says which
            check_limits(self.config.limits)
        if len(self.metrics) > 1 and not self.config.pruner.class_path.endswith("NopPruner"):
            raise UserError("A pruner knows one metric only: leave --pruner, or give one --metric.")
        for key in ("sampler", "pruner"):
            arguments = self.config[key].get("init_args", {})
            for name, value in arguments.items():  # a number is taken for text where both may stand: max_resource
                arguments[name] = int(value) if isinstance(value, str) and value.isdecimal() else value


def _metrics(names: str | list[str], directions: Direction | list[Direction] | None) -> list[Metric]:
    """Return what a search optimizes.

    Raises:
        UserError: If names and directions do not fit together.
    """
    names = [names] if isinstance(names, str) else names
    given: Sequence[Direction | None] = (
        [directions] if isinstance(directions, str) else directions or [None] * len(names)
    )
    if len(given) != len(names) or len({*names}) != len(names) or not names:
        raise UserError(
            f"Each metric needs one direction: metric is {', '.join(names)}, direction {', '.join(map(str, given))}."
        )
    if names[0] in COMPUTED:
        raise UserError(f"The first metric tells the best epoch; {names[0]} cannot.")
    return [Metric(name, direction) for name, direction in zip(names, given, strict=True)]


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
    with user_errors(), patched_jsonargparse():
        run = SearchCLI(command, words, description)
        with interruptible() as interrupt:
            if run.config.show:
                show(run)
                return
            tune(run, command_line(command, *arguments), interrupt)


def show(run: SearchCLI) -> None:
    """Print the results so far of a study, from any machine and while it is searched.

    Raises:
        UserError: There is no such study.
    """
    name = run.config.study_name
    source = run.config.storage or str(run.logs / name / "journal.log")
    study = find_study(name, source)
    if study is None:
        raise UserError(f"There is no study {name} in {hide_password(source)}.")
    if not isinstance(study.user_attrs.get("settings"), dict):
        raise UserError(f"The study {name} was not made by tune.")
    _print_results(study, run.config.limits)


def tune(run: SearchCLI, command: str, interrupt: Interrupt) -> None:
    """Search, print the results, refit the best.

    Args:
        run: Gives the options, and the config of a run.
        command: What was typed, to be typed again.
        interrupt: Of the process.
    """
    options = run.config
    timeout = None if options.timeout is None else _seconds(options.timeout)
    search = _make_search(run)
    first = _first_trials(run, search.space, search.base)
    _check_training(run, search)
    _print_space(search.space)
    check_sampler(options.sampler, search.base["seed_everything"], search.space, search.metrics)
    study, storage = _open(run, search)
    _enqueue(study, first, options.n_trials)
    pool = None
    interrupted = False
    if options.trial is None and not is_complete(study, options.n_trials):
        _print_ways_to_look(search, run.logs)
        renew_deadline(study, timeout)
        pool = Pool(search, study, storage, devices(options))
        interrupted = pool.run(interrupt)
    _print_results(study, options.limits)
    if pool is not None and not interrupted and is_time_up(study) and not is_complete(study, options.n_trials):
        print(f"\nThe time is over. Continue: {command}")
    chosen = _write_best(study, run, search, command)
    if interrupted:
        print(f"\nStopped. Continue: {command}")
        sys.exit(130)
    if chosen is None:
        failed = [trial for trial in study.trials if "error" in trial.user_attrs]
        reason = f" The first failed: {failed[0].user_attrs['error']}" if failed else ""
        raise UserError(f"No trial was completed, so there is nothing to refit.{reason}")
    if options.refit:
        # several commands that share the study end together
        finished = [t for t in study.get_trials(deepcopy=False) if t.datetime_complete is not None and is_counted(t)]
        last = TrialRecord.of(max(finished, key=lambda trial: (trial.datetime_complete, trial.number))).owner
        if pool is not None and last not in pool.names:
            print(f"Refit: left to the command of {last}, which ended the last trial. This one, given again, does it.")
        else:
            _refit(*chosen, run.logs, options)


def _make_search(run: SearchCLI) -> Search:
    """Make what the workers share, and see that all values of the space can be had."""
    base = {key: value for key, value in run.plain_config().items() if key in ("name", "origin", *RUN_KEYS)}
    base = spread(base, run.config.search_space or {})
    space = make_space(run.config.search_space, base)
    check_values(space, base, run.parser)
    options = Namespace(**{field.name: run.config[field.name] for field in fields(SearchOptions)})
    folder = run.logs / options.study_name
    return Search(options, run.metrics, base, space, options.storage or str(folder / "journal.log"), folder)


def _print_space(space: SearchSpace) -> None:
    print("Search space:")
    width = max(map(len, space))
    for key, distribution in space.items():
        print(f"  {key:{width}}  {describe(distribution)}{describe_conditions(space.conditions.get(key, {}))}")


def _open(run: SearchCLI, search: Search) -> tuple[Study, Any]:
    """Open the study; return it and its storage."""
    storage = open_storage(search.storage)
    search.folder.mkdir(parents=True, exist_ok=True)
    defaults = flatten(_settings(run.plain_config(run.parser.get_defaults()), None))
    settings = _settings(config_with(search.base, search.space.example({}), search.space), run.datamodule.digest())
    settings["executions_per_trial"] = search.options.executions_per_trial
    study = open_study(storage, search.options.study_name, search.metrics, settings, search.space, defaults)
    study.set_user_attr("limits", dict(search.options.limits))  # for reports
    study.pruner = run.config_init.pruner
    return study, storage


def _enqueue(study: Study, first: Iterable[tuple[str, dict[str, Any]]], n_trials: int) -> None:
    """Enqueue the trials that are to be run first, unless they were, or there is no room."""
    for source, params in first:
        count = sum(map(is_counted, study.get_trials(deepcopy=False)))
        if has_trial_with(study, params):
            continue
        if count >= n_trials:
            print(f"{source}: not done, the study has its {count} trials. --n_trials {count + 1} has room")
        else:
            study.enqueue_trial(params)


def _print_ways_to_look(search: Search, logs: Path) -> None:
    storage = ["--storage", search.options.storage] if search.options.storage else []
    print("While it runs, elsewhere:")
    print(f"  {command_line('tune', '--show', '--study_name', search.options.study_name, *storage)}")
    print(f"  tensorboard --logdir {shlex.quote(str(logs))}")
    if not search.storage.startswith("grpc://"):  # the dashboard reads journals and databases
        print(f"  optuna-dashboard {shlex.quote(search.storage)}")


def _write_best(study: Study, run: SearchCLI, search: Search, command: str) -> tuple[Path, dict[str, Any]] | None:
    """Write the config of the best trial, or of the one that is wanted, and say how to train it; None without any."""
    options = search.options
    if options.trial is None and not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return None
    trial = (
        best_trial(study, options.limits) if options.trial is None else find_trial(study, options.trial, search.space)
    )
    path, config = _write_config(trial, run, search)
    print(f"\nConfig of trial {trial.number}: {path}    Train it: {command_line('fit', '--config', path)}")
    print(f"Of another: {command} --trial N")
    for weights in kept_weights(search, trial):
        print(f"Its weights: {weights}    Test them: {command_line('test', '--ckpt_path', weights)}")
    return path, config


def _first_trials(run: SearchCLI, space: SearchSpace, base: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the trials that the options want to be run first, each with where it comes from.

    Raises:
        UserError: If a file or study does not exist, or has a value that is not searched.
    """
    options, trials = run.config, []
    given = [("enqueue_baseline", base)] if options.enqueue_baseline else []
    if options.like is not None:
        given.append((f"like {options.like}", _best_of(options.like, run, space)))
    if options.enqueue:
        given += _read_trials(options.enqueue, space)
    for source, values in given:
        found, values = {}, spread(values, space)
        for key in space:
            with suppress(KeyError, TypeError, IndexError, ValueError):  # a config may lack what is not always drawn
                found[key] = values[key] if key in values else get_value(values, full_key(key))
        params = params_of(found, space, source)
        if values.keys() <= space.keys() and (ignored := values.keys() - params.keys()):
            raise UserError(
                f"{source}: {', '.join(ignored)} is not drawn beside the other values. Leave it, or change those."
            )
        if params:
            trials.append((source, params))
    return trials


def _best_of(name: str, run: SearchCLI, space: SearchSpace) -> dict[str, Any]:
    """Return the values of another study's best trial, as far as this space has them."""
    source = run.config.storage or str(run.logs / name / "journal.log")
    study = find_study(name, source)
    if study is None:
        raise UserError(f"like: there is no study {name} in {hide_password(source)}.")
    best = best_trial(study).params
    values = {key: best[key] for key in space if key in best and in_distribution(best[key], space[key])}
    values = params_of(values, space, "")  # without what depends on something that is not taken
    if left := sorted(best.keys() - values.keys()):
        print(f"like {name}: {', '.join(map(short_key, left))} not taken, which this space does not have")
    return values


def _read_trials(path: str, space: SearchSpace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read trials from a file: mappings from keys to values, or configs."""
    try:
        # as configs are read: to YAML 1.1 alone, 1e-5 is not a number, but to json.dump it is
        items = get_loader("yaml")(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    items = items if isinstance(items, list) else [items]
    for number, item in enumerate(items):
        source = f"{path}, trial {number + 1} of {len(items)}"
        if not isinstance(item, dict) or not item:
            raise UserError(f"{source} is no mapping from keys of the search space to values.")
        if "model" not in item and (unknown := item.keys() - space.keys()):
            raise UserError(f"{source}: {', '.join(map(str, unknown))} is not searched.")
        yield source, item


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
        raise UserError(f"timeout {timeout} is no time: give seconds, or 30m, 2h, 1d.")
    return seconds


def _check_training(run: SearchCLI, search: Search) -> None:
    """See that data, network and metrics fit together, before anything is trained."""
    if run.trainer.world_size > 1:
        raise UserError(
            "A trial trains on one device, and the workers share the devices out: leave --trainer.devices at 1, and "
            "say --workers N for another number of workers."
        )
    run.datamodule.setup("fit")
    run.trainer.limit_val_batches = 1
    (logged,) = run.trainer.validate(run.model, datamodule=run.datamodule, verbose=False)
    for metric in (*search.metrics, *search.limited):
        if metric.name not in logged and metric.name not in COMPUTED and not metric.name.startswith("train/"):
            raise UserError(
                f"The metric {metric.name} is not logged in validation. These are: {', '.join(logged)}; "
                f"those of train/ and {', '.join(COMPUTED)} can be taken as well."
            )


def _settings(config: dict[str, Any], digest: str | None) -> dict[str, Any]:
    """Return what the values of a study depend on, beside its space and metrics.

    Args:
        config: Of a run.
        digest: Tells its data, wherever that is, from any other.
    """
    data = {
        key: value for key, value in config["data"]["init_args"].items() if value is not None and value is not False
    }
    data = {key: value for key, value in data.items() if key not in ("data_dir", "eval_batch_size")}
    return {
        "seed_everything": config["seed_everything"],
        "trainer": {key: config["trainer"][key] for key in OF_TRAINING},
        "model": config["model"],
        "data": {**data, **({} if digest is None else {"digest": digest})},
    }


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
        front = {str(trial.number) for trial in pareto_front(study)}
        table = table[table["trial"].isin(front)]
        print(f"Pareto front: {len(table)} of them, none of which another betters in every metric")
    print(table.head(10 if len(study.directions) == 1 else 30).to_string(index=False))
    limits = limits or study.user_attrs.get("limits", {})
    best = best_trial(study, limits)
    measured = {metric.name: value for metric, value in zip(metrics_of(study), best.values, strict=True)}
    measured |= limited_values(best, limits)
    values = ", ".join(f"{name} {format_value(value)}" for name, value in measured.items())
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
    if run := _find_run(logs / config["name"], config):
        print(f"Refit: it is there already, {run}")
    else:
        if epochs != options.refit_epochs:
            print(f"\ntrainer.max_epochs was searched: {epochs}. --refit_epochs {options.refit_epochs} is not used.")
        print(f"\nRefit: {command_line('fit', '--config', path)}")
        FitCLI("fit", ["--config", str(path)]).run()
    models = _compare([logs / "baseline", logs / config["name"]])
    if len(models) == 2:
        storage = ["--storage", options.storage] if options.storage else []
        print(f"\nCompare them: {command_line('report', *models, '--study_name', options.study_name, *storage)}")
    else:
        print(f"\nTrain the notebook's baseline, to compare: {PROG} fit")


def _find_run(folder: Path, config: dict[str, Any]) -> Path | None:
    """Return the complete run of a config, if there is one."""
    for path in sorted(folder.glob("version_*/test.csv")):
        try:
            found = flatten(yaml.safe_load(path.with_name("config.yaml").read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, yaml.YAMLError):  # damaged: it is of another config
            continue
        if all(found.get(key, value) == value for key, value in flatten(config).items()):
            return path.parent
    return None


def _compare(folders: Sequence[Path]) -> list[str]:
    """Print the tests of the newest complete runs in folders; return the runs as ``report`` takes them."""
    tests = {}
    for folder in folders:
        newest = newest_file(folder.glob("version_*/test.csv"))
        if newest is not None:
            with newest.open(newline="", encoding="utf-8") as file:
                tests[folder.name] = newest.parent, next(csv.DictReader(file))
    metrics = [key for key in list(tests.values())[-1][1] if key.startswith("test/")]
    rows = [[str(run), *(f"{float(test.get(k, 'nan')):.4f}" for k in metrics)] for run, test in tests.values()]
    titles = ["test, weights of the last epoch", *(key.removeprefix("test/").replace("_", " ") for key in metrics)]
    print(f"\n{format_table([titles, *rows])}")
    return [f"{name}={run}" for name, (run, _) in tests.items()]
