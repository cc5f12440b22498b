"""Options of ``tune``, first trials, results and refit."""

import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from pkgutil import resolve_name
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

from mnist_lightning.commands.cli import (
    DEFAULTS,
    FLAG,
    TRAINING_OPTIONS,
    RunCLI,
    add_training_options,
    quieten_lightning,
)
from mnist_lightning.commands.fit import ONLY_IN_FIT, FitCLI
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
    full_names,
    in_distribution,
    make_space,
    params_of,
    short_key,
)
from mnist_lightning.search.storage import open_storage
from mnist_lightning.search.study import (
    OF_TRAINING,
    best_trial,
    check_limits,
    find_study,
    find_trial,
    format_value,
    has_trial_with,
    importances,
    is_complete,
    is_time_up,
    limited_values,
    open_study,
    pareto_front,
    renew_deadline,
    results,
    source_of,
)
from mnist_lightning.search.trial import Search, kept_weights
from mnist_lightning.system.console import PROG, command_line, format_table, hide_password, quoted, terminal_width
from mnist_lightning.system.errors import UserError, user_errors
from mnist_lightning.system.files import atomic_write
from mnist_lightning.system.nested import as_list, flatten, get_value, spread
from mnist_lightning.system.signals import Interrupt, interruptible
from mnist_lightning.training.runs import LABELS, RUN_KEYS, newest_file

# bounded, since a huge number would exhaust the memory
Count: Any = restricted_number_type("Count", int, [(">", 0), ("<=", 10**6)])
Processes: Any = restricted_number_type("Processes", int, [(">", 0), ("<=", 1000)])


@dataclass
class SearchOptions:
    """Options of ``tune``.

    Args:
        search_space: Maps each key of this config (for an item of a list, its index) to class path and arguments of the
            Optuna distribution of its values. A key may omit its first parts, as long as only one key ends that way:
            lr, units.0.
        metric: A trial's value is this metric at its best epoch, averaged over the trial's executions. To search for
            several metrics, repeat the option: the others are taken at the best epoch of the first. parameters, flops
            and seconds are also metrics.
        direction: Whether to maximize or minimize each metric; by default losses, errors, parameters, flops and seconds
            are minimized, all others maximized.
        limits: The worst value of a metric that is allowed in the best trial, as in --limits.parameters 50000; samplers
            that learn look for trials within the limits. The metric need not be one of --metric.
        sampler: Draws the trials. Its seed is seed_everything, unless given.
        pruner: Ends bad trials early, after an epoch or an execution.
        n_trials: Total number of trials of the study, including those of earlier commands and other processes.
        timeout: Time after which no trial starts, such as 90 (seconds), 30m, 2h or 1d; all commands that share the
            study at the same time use that of the first.
        finish_trials: Whether running trials finish when the time is up; otherwise they are requeued.
        executions_per_trial: Executions of a trial, with the seeds seed_everything, seed_everything + 1, ...
        study_name: Name of the study, and of its folder in lightning_logs.
        storage: Path of a journal file or URL of an Optuna storage; by default journal.log in the study's folder.
        workers: Number of processes, each of which trains one trial at a time; by default one per GPU or, without a
            GPU, one per CPU core.
        grace_period: Seconds after which other machines take over the trials of a machine that has vanished.
        enqueue_baseline: Whether to run the config's own values as a trial; in a new study, as the first.
        enqueue: YAML file with a list of trials to run first. Each is a mapping from keys of the search space to
            values, or a config such as best.yaml; missing values are drawn.
        like: Name of another study, in lightning_logs or the storage: the values of its best trial are run first.
        keep_checkpoints: Whether to keep the weights of the best trial, as checkpoints of its executions.
        trial: Trial to take, instead of continuing the search and taking the best.
        refit: Whether to train the best trial's config again at the end, as an ordinary run.
        refit_epochs: Epochs of the refit, unless trainer.max_epochs was searched.
    """

    search_space: dict[str, dict[str, Any] | list[dict[str, Any]]] = field(default_factory=lambda: NOTEBOOK_SPACE)
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
    """Parses the options of a search in addition to those of a run; epochs and batch size are the notebook's."""

    common_options = TRAINING_OPTIONS

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        add_training_options(parser)
        parser.add_class_arguments(SearchOptions, as_group=False)
        parser.add_argument("--show", **FLAG, help="Only print the study's results so far.")
        parser.set_defaults({"name": "tuned", "trainer.max_epochs": 10})
        parser.set_defaults({"data": {**DEFAULTS["data"], "init_args": {"batch_size": 32}}})

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        defaults = self.parser.get_defaults()
        for option in fields(SearchOptions):  # null means the default, but an empty search space is a mistake
            value = self.config[option.name]
            if value is None and option.name != "search_space":
                self.config[option.name] = defaults[option.name]
            elif isinstance(value, int) and not isinstance(value, bool):
                self.config[option.name] = int(value)  # the workers do not know this parser's types
        if not self.config.show:  # the study holds its own limits
            check_limits(self.config.limits)
        for key in ("sampler", "pruner"):
            arguments = self.config[key].get("init_args", {})
            for name, value in arguments.items():  # where both are allowed, a number is read as text: max_resource
                arguments[name] = int(value) if isinstance(value, str) and value.isdecimal() else value

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.metrics = _metrics(self.config.metric, self.config.direction, self.known_direction)
        if len(self.metrics) > 1 and not self.config.pruner.class_path.endswith("NopPruner"):
            raise UserError("A pruner supports only one metric: leave out --pruner, or give one --metric.")

    def known_direction(self, name: str) -> Direction | None:
        """Return the direction of a metric that the model knows, such as one of torchmetrics; None for any other."""
        is_high = self.model.epoch_metrics.higher_is_better(name.rpartition("/")[2])
        return None if is_high is None else "maximize" if is_high else "minimize"


def _metrics(
    names: str | list[str],
    directions: Direction | list[Direction] | None,
    known: Callable[[str], Direction | None],
) -> list[Metric]:
    """Return the metrics that a search optimizes.

    Args:
        names: Names of the metrics.
        directions: Their directions, if given.
        known: Returns the direction of a name, or None for :class:`Metric`'s own rule.

    Raises:
        UserError: If names and directions do not match.
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
        raise UserError(
            f"The first metric determines the best epoch, which {names[0]} cannot: give another metric first."
        )
    return [Metric(name, direction or known(name)) for name, direction in zip(names, given, strict=True)]


def main(command: str, description: str, arguments: Sequence[str]) -> None:
    """Run the command."""
    seen: set[str] = set()
    words = []
    for word in arguments:  # turn --metric A --metric B into the parser's --metric A --metric+ B
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
    """Print a study's results so far, on any machine and also during the search.

    Raises:
        UserError: If the study does not exist or was not made by ``tune``.
    """
    name = run.config.study_name
    source = source_of(name, run.config.storage, run.logs)
    study = find_study(name, source)
    if study is None:
        raise UserError(f"There is no study {name} in {hide_password(source)}.")
    if not isinstance(study.user_attrs.get("settings"), dict):
        raise UserError(f"The study {name} was not made by tune. Use another --study_name.")
    _print_results(study, run.config.limits)


def tune(run: SearchCLI, command: str, interrupt: Interrupt) -> Study:
    """Search, print the results, refit the best.

    Args:
        run: The parsed options, and the config of a run.
        command: The command as the user typed it, to be printed.
        interrupt: The process's interrupt.

    Returns:
        The study.
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
        print(f"\nThe time is up. Continue: {command}")
    chosen = _write_best(study, run, search, command)
    if interrupted:
        print(f"\nStopped. Continue: {command}")
        sys.exit(130)
    if chosen is None:
        failed = [trial for trial in study.trials if "error" in trial.user_attrs]
        reason = f" The first failure: {failed[0].user_attrs['error']}" if failed else ""
        raise UserError(f"No trial is complete, so there is nothing to refit.{reason}")
    if options.refit:
        # several commands that share a study end at the same time: only one refits
        finished = [t for t in study.get_trials(deepcopy=False) if t.datetime_complete is not None and is_counted(t)]
        last = TrialRecord.of(max(finished, key=lambda trial: (trial.datetime_complete, trial.number))).owner
        if pool is not None and last not in pool.names:
            print(
                f"Refit: left to the command of {last}, which finished the last trial. Run this command again to do it "
                "here."
            )
        else:
            _refit(*chosen, run)
    return study


def _make_search(run: SearchCLI) -> Search:
    """Return what the workers share, after checking that all values of the space are valid."""
    base = {key: value for key, value in run.plain_config().items() if key in ("name", "origin", *RUN_KEYS)}
    given = full_names(run.config.search_space or {}, base)
    base = spread(base, map(full_key, given))
    space = make_space(given, base)
    check_values(space, base, run.parser)
    options = Namespace(**{field.name: run.config[field.name] for field in fields(SearchOptions)})
    source = source_of(options.study_name, options.storage, run.logs)
    directions = {name: direction for name in options.limits if (direction := run.known_direction(name))}
    return Search(options, run.metrics, base, space, source, run.logs / options.study_name, directions)


def _print_space(space: SearchSpace) -> None:
    print("Search space:")
    width = max(map(len, space))
    for key, distribution in space.items():
        print(f"  {key:{width}}  {describe(distribution)}{describe_conditions(space.conditions.get(key, {}))}")


def _open(run: SearchCLI, search: Search) -> tuple[Study, Any]:
    """Return the opened study and its storage."""
    storage = open_storage(search.storage)
    search.folder.mkdir(parents=True, exist_ok=True)
    defaults = flatten(_settings(run.plain_config(run.parser.get_defaults()), None))
    settings = _settings(config_with(search.base, search.space.example({}), search.space), run.datamodule.digest())
    settings["executions_per_trial"] = search.options.executions_per_trial
    study = open_study(storage, search.options.study_name, search.metrics, settings, search.space, defaults)
    study.set_user_attr("limits", dict(search.options.limits))  # for reports
    study.set_user_attr("directions", dict(search.directions))
    study.pruner = run.config_init.pruner
    return study, storage


def _enqueue(study: Study, first: Iterable[tuple[str, dict[str, Any]]], n_trials: int) -> None:
    """Enqueue the trials to run first, unless they exist or the study has no room."""
    for source, params in first:
        count = sum(map(is_counted, study.get_trials(deepcopy=False)))
        if has_trial_with(study, params):
            continue
        if count >= n_trials:
            print(f"{source}: left out, because the study is full. --n_trials {count + 1} makes room")
        else:
            study.enqueue_trial(params)


def _print_ways_to_look(search: Search, logs: Path) -> None:
    storage = ["--storage", search.options.storage] if search.options.storage else []
    print("To watch the search from another terminal:")
    print(f"  {command_line('tune', '--show', '--study_name', search.options.study_name, *storage)}")
    print(f"  {quoted('tensorboard', '--logdir', logs)}")
    if not search.storage.startswith("grpc://"):  # the dashboard reads only journals and databases
        print(f"  {quoted('optuna-dashboard', search.storage)}")


def _write_best(study: Study, run: SearchCLI, search: Search, command: str) -> tuple[Path, dict[str, Any]] | None:
    """Write the config of the best or chosen trial, and print how to train it; return None if there is no trial."""
    options = search.options
    if options.trial is None and not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return None
    trial = (
        best_trial(study, options.limits) if options.trial is None else find_trial(study, options.trial, search.space)
    )
    path, config = _write_config(trial, run, search)
    print(f"\nConfig of trial {trial.number}: {path}")
    if not options.refit:
        print(f"Train it: {command_line('fit', '--config', path)}")
    if weights := kept_weights(search, trial):
        print(f"Its weights: {weights}\nTest them: {command_line('test', '--ckpt_path', weights)}")
    print(f"Config of another trial: {command} --trial N")
    return path, config


def _first_trials(run: SearchCLI, space: SearchSpace, base: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the trials to run first, each with the option or file that it comes from.

    Raises:
        UserError: If a file or study does not exist, or has a value that is not searched.
    """
    options, trials = run.config, []
    given = [("enqueue_baseline", base)] if options.enqueue_baseline else []
    if options.like is not None:
        given.append((f"like {options.like}", _best_of(options.like, run, space)))
    if options.enqueue:
        given += _read_trials(options.enqueue, space, base)
    for source, values in given:
        found, values = {}, spread(values, map(full_key, space))
        for key in space:
            with suppress(KeyError, TypeError, IndexError, ValueError):  # a config may lack a conditional key
                found[key] = values[key] if key in values else get_value(values, full_key(key))
        params = params_of(found, space, source)
        if values.keys() <= space.keys() and (ignored := values.keys() - params.keys()):
            raise UserError(
                f"{source} has keys that are not drawn with the other values: {', '.join(ignored)}. Leave them out, or "
                "change the other values."
            )
        if params:
            trials.append((source, params))
    return trials


def _best_of(name: str, run: SearchCLI, space: SearchSpace) -> dict[str, Any]:
    """Return those values of another study's best trial that this space has."""
    source = source_of(name, run.config.storage, run.logs)
    study = find_study(name, source)
    if study is None:
        raise UserError(f"like: there is no study {name} in {hide_password(source)}.")
    best = best_trial(study).params
    values = {key: best[key] for key in space if key in best and in_distribution(best[key], space[key])}
    values = params_of(values, space, "")  # drop keys whose conditions no longer hold
    if left := sorted(best.keys() - values.keys()):
        print(f"like {name}: left out, as this search space lacks them: {', '.join(map(short_key, left))}")
    return values


def _read_trials(path: str, space: SearchSpace, base: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read trials from a file: mappings from keys, which may be short, to values; or configs."""
    try:
        # jsonargparse's loader, as for configs: YAML 1.1 does not read 1e-5, which json.dump writes, as a number
        items = get_loader("yaml")(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    items = items if isinstance(items, list) else [items]
    for number, item in enumerate(items):
        source = f"{path}, trial {number + 1} of {len(items)}"
        if not isinstance(item, dict) or not item:
            raise UserError(f"{source} is not a mapping from keys of the search space to values.")
        if "model" not in item:
            named = full_names(dict.fromkeys(item), base)
            if len(named) < len(item):
                raise UserError(f"{source} has two values for one key.")
            item = dict(zip(named, item.values(), strict=True))
            if unknown := item.keys() - space.keys():
                raise UserError(f"{source} has keys that are not searched: {', '.join(unknown)}.")
        yield source, item


def _write_config(trial: FrozenTrial, run: SearchCLI, search: Search) -> tuple[Path, dict[str, Any]]:
    """Write the config that refits a trial; return its path and the config."""
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
        raise UserError(f"timeout {timeout} is not a time: give seconds, or 30m, 2h, 1d.")
    return seconds


def _check_training(run: SearchCLI, search: Search) -> None:
    """Check, before the first trial, that data, network and metrics fit together."""
    if run.trainer.world_size > 1:
        raise UserError(
            "A trial trains on one device, and each worker gets its own: leave --trainer.devices at 1, and use "
            "--workers N for another number of workers."
        )
    options = run.trainer
    zero = [name for name in ("max_steps", "limit_train_batches", "limit_val_batches") if getattr(options, name) == 0]
    rare = [] if (options.check_val_every_n_epoch or 1) <= search.epochs else ["check_val_every_n_epoch"]
    if zero or rare:
        raise UserError(
            f"A trial needs a validated epoch: leave out {', '.join(f'--trainer.{name}' for name in zero + rare)}, or "
            f"change {'it' if len(zero + rare) == 1 else 'them'}."
        )
    classes = [resolve_name(each.class_path) for each in as_list(run.config.trainer.callbacks) if each]
    if names := ", ".join(each.__name__ for each in classes if issubclass(each, ONLY_IN_FIT)):
        print(f"Only the refit uses {names}: a search shows its own progress and keeps its own checkpoints.")
    run.datamodule.setup("fit")
    run.model.balance(run.datamodule)
    run.trainer.limit_val_batches = 1
    (logged,) = run.trainer.validate(run.model, datamodule=run.datamodule, verbose=False)
    for metric in (*search.metrics, *search.limited):
        if metric.name not in logged and metric.name not in COMPUTED and not metric.name.startswith("train/"):
            raise UserError(
                f"The metric {metric.name} is not logged in validation. Logged metrics: {', '.join(logged)}; "
                f"metrics in train/ and {', '.join(COMPUTED)} also work."
            )


def _settings(config: dict[str, Any], digest: str | None) -> dict[str, Any]:
    """Return the settings that affect the values of a study, besides its space and metrics.

    Args:
        config: Config of a run.
        digest: Digest that identifies the data, wherever it is stored.
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
    states = [("complete", TrialState.COMPLETE), ("pruned", TrialState.PRUNED), ("failed", TrialState.FAIL)]
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
        print(f"Pareto front, which no other trial dominates: {len(table)} of {len(complete)} trials")
    print(table.head(10 if len(study.directions) == 1 else 30).to_string(index=False, line_width=terminal_width()))
    limits = limits or study.user_attrs.get("limits", {})
    best = best_trial(study, limits)
    measured = {metric.name: value for metric, value in zip(metrics_of(study), best.values, strict=True)}
    measured |= limited_values(TrialRecord.of(best).executions, limits)
    values = ", ".join(f"{name} {format_value(value)}" for name, value in measured.items())
    within = ", ".join(f"{name} {format_value(value)}" for name, value in limits.items())
    print(f"\nBest{f' within {within}' if limits else ''}: trial {best.number}, {values}")
    for key, value in best.params.items():
        print(f"  {key}: {value}")
    if found := importances(study):
        print("Importance (fANOVA): " + ", ".join(f"{short_key(key)} {share:.2f}" for key, share in found.items()))


def _refit(path: Path, config: dict[str, Any], run: SearchCLI) -> None:
    """Train a config as an ordinary run, unless that run exists, and print it next to the baseline."""
    epochs, logs, options = config["trainer"]["max_epochs"], run.logs, run.config
    if done := _find_run(logs / config["name"], config):
        print(f"Refit: already done, {done}")
    else:
        if epochs != options.refit_epochs:
            print(f"\ntrainer.max_epochs was searched: {epochs}. --refit_epochs {options.refit_epochs} is not used.")
        print(f"\nRefit: {command_line('fit', '--config', path)}")
        labels = [f"--{key}={json.dumps(options[key])}" for key in LABELS if options[key]]
        FitCLI("fit", ["--config", str(path), *labels]).run()
    others = [path for path in logs.glob("*/version_*/test.csv") if path.parts[-3] != config["name"]]
    baselines = [path for path in others if path.parts[-3] == "baseline"]  # or, in a project without one, the newest
    other = newest_file(baselines or others)
    models = _compare([*([other.parents[1]] if other else []), logs / config["name"]])
    if len(models) == 2:
        storage = ["--storage", options.storage] if options.storage else []
        print(f"\nCompare them: {command_line('report', *models, '--study_name', options.study_name, *storage)}")
    else:
        print(f"\nTrain the notebook's baseline, to compare: {PROG} fit")


def _find_run(folder: Path, config: dict[str, Any]) -> Path | None:
    """Return the run folder of a config's complete run, or None."""
    for path in sorted(folder.glob("version_*/test.csv")):
        try:
            found = flatten(yaml.safe_load(path.with_name("config.yaml").read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, yaml.YAMLError):  # damaged, so not a run of this config
            continue
        if all(found.get(key, value) == value for key, value in flatten(config).items()):
            return path.parent
    return None


def _compare(folders: Sequence[Path]) -> list[str]:
    """Print the test results of the newest complete run in each folder; return the runs as arguments of ``report``."""
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
