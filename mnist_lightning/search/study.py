"""The Optuna study: open and check it, find its best trial, measure its time."""

import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import ge, index
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mnist_lightning.commands.parsing import shorten
from mnist_lightning.search.record import Metric, TrialRecord, check_finite, directions_of, is_counted, metrics_of
from mnist_lightning.search.space import (
    SearchSpace,
    describe,
    describe_conditions,
    in_distribution,
    short_key,
    short_value,
)
from mnist_lightning.search.storage import open_storage
from mnist_lightning.system.errors import UserError
from mnist_lightning.system.nested import flatten

if TYPE_CHECKING:
    import pandas as pd


OF_TRAINING = (
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "precision", "deterministic", "plugins"),
    *("limit_train_batches", "limit_val_batches", "overfit_batches", "fast_dev_run", "accumulate_grad_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "gradient_clip_val", "gradient_clip_algorithm", "callbacks"),
    *("sync_batchnorm", "use_distributed_sampler", "reload_dataloaders_every_n_epochs"),
)
"""Keys of the trainer on which the values of a study depend."""


def open_study(
    storage: BaseStorage,
    name: str,
    metrics: Sequence[Metric],
    settings: dict[str, Any],
    space: SearchSpace,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Study:
    """Load a study that has these settings and this space, or make it.

    Args:
        storage: Where it is.
        name: Its name.
        metrics: What it optimizes.
        settings: What else a value of the study depends on, in plain types.
        space: Its search space.
        defaults: From a setting's key with dots to its value in a study that was made before there was such a setting.

    Raises:
        UserError: If there is a study of this name with other settings or another space.
    """
    searched = {key: json.loads(distribution_to_json(space[key])) for key in space}
    for key, conditions in space.conditions.items():
        searched[key]["when"] = conditions
    texts = {key: json.dumps(distribution) for key, distribution in searched.items()}
    names, directions = [metric.name for metric in metrics], directions_of(metrics)
    several = len(metrics) > 1
    own = {
        **settings,
        "metric": names if several else names[0],
        "direction": directions if several else directions[0],
        "search_space": texts,
    }
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        study.set_user_attr("settings", own)
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            study.set_metric_names(names)  # for Optuna's dashboard
        return study
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
    for _ in range(50):  # the process that makes it at this moment still has to write them
        if "settings" in study.user_attrs or study.get_trials(deepcopy=False):
            break
        time.sleep(0.1)
    found = study.user_attrs.get("settings")
    if found is None and not study.get_trials(deepcopy=False):
        study.set_user_attr("settings", own)
    elif not isinstance(found, dict):
        raise UserError(f"The study {name} was not made by tune. Take another --study_name.")
    elif differences := _differences(found, own, defaults):
        raise UserError(
            f"The study {name} has other settings: {'; '.join(differences)}. "
            "Give those to continue it, or take another --study_name."
        )
    check_study(study, space)
    return study


def find_study(name: str, source: str) -> Study | None:
    """Load a study from a journal's path or a storage's URL; None if there is none, and nothing is made.

    Raises:
        UserError: If it is damaged.
    """
    if "://" not in source and not Path(source).is_file():
        return None
    try:
        study = optuna.load_study(storage=open_storage(source), study_name=name)
    except KeyError:
        return None
    check_study(study)
    return study


def check_study(study: Study, space: SearchSpace | None = None) -> None:
    """See that a study holds what is read of it: anybody can edit a journal, and Optuna takes much of what is there.

    Args:
        study: The study, which need not be of ``tune``: what it lacks is not looked at.
        space: Its search space, if it is known: complete trials have values of the whole of it.

    Raises:
        UserError: If something of it is not what ``tune`` writes.
    """
    of_study = f"the study {study.study_name}"
    with _damage(f"The{of_study[3:]}"):
        check_finite(study.user_attrs.get("limits", {}).values())
        check_finite([study.user_attrs.get("deadline") or 0])
        if not study.directions:
            raise ValueError("it has no direction")
    for trial in study.get_trials(deepcopy=False):
        with _damage(f"Trial {trial.number} of {of_study}"):
            _check_trial(trial, len(study.directions))
            if trial.state == TrialState.COMPLETE and space is not None and not space.has_all(trial.params):
                raise ValueError("it has other parameters")


@contextmanager
def _damage(what: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = shorten(str(error) if isinstance(error, ValueError) else repr(error))
        raise UserError(f"{what} is damaged or was not made by tune: {reason}. Take another study.") from error


def _check_trial(trial: FrozenTrial, n_values: int) -> None:
    if trial.state == TrialState.COMPLETE:
        check_finite(trial.values)
        if len(trial.values) != n_values:
            raise ValueError(f"it has {len(trial.values)} values of {n_values} metrics")
    for step, value in trial.intermediate_values.items():
        index(step)
        value + 0.0
    for key, value in trial.params.items():
        if not in_distribution(value, trial.distributions[key]):
            raise ValueError(f"its {key} is {value!r}, not {describe(trial.distributions[key])}")
        short_key(key)
    trial.system_attrs.keys()
    TrialRecord.of(trial)


def _differences(found: dict[str, Any], own: dict[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    there, here = _flat(found), _flat(own)
    searched = own["search_space"].keys()
    there |= {key: defaults.get(key, value) for key, value in here.items() if key not in there and key not in searched}
    return [
        f"{key} is {_describe(key, there)} in the study, {_describe(key, here)} in the command"
        for key in dict.fromkeys([*there, *here])
        if there.get(key) != here.get(key)
    ]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in settings.items() if key != "search_space"}
    if isinstance(trainer := rest.get("trainer"), dict):
        rest["trainer"] = {key: value for key, value in trainer.items() if key in OF_TRAINING}
    space = settings.get("search_space")
    return {**flatten(rest), **(space if isinstance(space, dict) else {})}


def _describe(key: str, flat: dict[str, Any]) -> str:
    if key not in flat:
        return "not searched"
    try:
        conditions = json.loads(flat[key]).get("when", {})
        return describe(json_to_distribution(flat[key])) + describe_conditions(conditions)
    except (KeyError, TypeError, ValueError):  # another setting
        return str(flat[key])


def check_limits(limits: Mapping[str, float]) -> None:
    """See that limits are finite numbers.

    Raises:
        UserError: If one is not.
    """
    if unlimited := [name for name, limit in limits.items() if not math.isfinite(limit)]:
        raise UserError(f"limits: that of {', '.join(unlimited)} must be a finite number.")


def best_trial(study: Study, limits: Mapping[str, float] | None = None) -> FrozenTrial:
    """Return the trial with the best first metric, of those within the limits; the earliest of equals.

    Args:
        study: The study.
        limits: From the name of a metric to the worst value that is allowed; by default those of the last command
            that searched.

    Raises:
        UserError: If no completed trial is within the limits.
    """
    metrics, limits = metrics_of(study), study.user_attrs.get("limits", {}) if limits is None else limits
    check_limits(limits)
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if limits:
        trials = [trial for trial in trials if _is_within(trial, metrics, limits)]
    if not trials:
        raise UserError(
            f"No completed trial is within {', '.join(f'{name} {limit:g}' for name, limit in limits.items())}: "
            "give other --limits, or take any with --trial N."
        )

    def goodness(trial: FrozenTrial) -> tuple[list[float], int]:
        return [metric.sign * value for metric, value in zip(metrics, trial.values, strict=True)], -trial.number

    return max(trials, key=goodness)


def pareto_front(study: Study) -> list[FrozenTrial]:
    """Return the completed trials that no other betters in every metric; limits play no part, as they may change."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    signs = [metric.sign for metric in metrics_of(study)]
    values = [[sign * value for sign, value in zip(signs, trial.values, strict=True)] for trial in trials]

    def is_bettered(own: list[float]) -> bool:
        return any(other != own and all(map(ge, other, own)) for other in values)

    return [trial for trial, own in zip(trials, values, strict=True) if not is_bettered(own)]


def _is_within(trial: FrozenTrial, metrics: Sequence[Metric], limits: Mapping[str, float]) -> bool:
    values = limited_values(trial, limits) | dict(zip([metric.name for metric in metrics], trial.values, strict=True))
    known = {metric.name: metric for metric in metrics}
    # what was trained before there was a limit has no value
    return all(
        name in values and known.get(name, Metric(name)).excess(values[name], limit) <= 0
        for name, limit in limits.items()
    )


def limited_values(trial: FrozenTrial, limits: Iterable[str]) -> dict[str, float]:
    """Return the means over a trial's executions of what has limits, as far as it was recorded."""
    records = [execution.get("limited", {}) for execution in TrialRecord.of(trial).executions]
    return {
        name: mean(each[name] for each in records)
        for name in limits
        if records and all(name in each for each in records)
    }


def format_value(value: float) -> str:
    """A value of a metric: whole numbers in full, others with four decimals."""
    return f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.4f}"


def results(study: Study, keys: Sequence[str]) -> "pd.DataFrame":
    """The completed trials, the best first, as text: number, values, scores of the executions, values of ``keys``."""
    import pandas as pd  # takes a while

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    metrics, rows = metrics_of(study), []
    for trial in sorted(trials, key=lambda trial: -metrics[0].sign * trial.values[0]):
        scores = " ".join(f"{execution['score']:.4f}" for execution in TrialRecord.of(trial).executions)
        params = [short_value(trial.params.get(key, "-")) for key in keys]
        rows.append([str(trial.number), *map(format_value, trial.values), scores, *params])
    return pd.DataFrame(
        rows, columns=["trial", *(metric.name for metric in metrics), "executions", *map(short_key, keys)]
    )


def renew_deadline(study: Study, timeout: float | None) -> None:
    """Let no trial begin after ``timeout`` seconds from now, or without end; a time that others have set counts first.

    Clocks of machines must agree about as well as the time is meant.
    """
    if time_left(study) in (0.0, math.inf):  # it is over, or nobody has set one
        study.set_user_attr("deadline", None if timeout is None else time.time() + timeout)


def time_left(study: Study) -> float:
    """Seconds until no trial may begin any more, infinite if nobody has set a time."""
    deadline = study.user_attrs.get("deadline")
    return math.inf if deadline is None else max(0.0, deadline - time.time())


def is_time_up(study: Study) -> bool:
    """Whether no trial may begin any more."""
    return time_left(study) == 0


def has_trial_with(study: Study, params: dict[str, Any]) -> bool:
    """Whether a trial has these parameters, or waits to get them."""
    trials = study.get_trials(deepcopy=False)
    return any(params in (trial.params, trial.system_attrs.get("fixed_params")) for trial in trials)


def find_trial(study: Study, number: int, space: SearchSpace) -> FrozenTrial:
    """A trial with all of its parameters.

    Raises:
        UserError: There is none of this number.
    """
    trials = study.get_trials(deepcopy=False)
    if number < len(trials) and space.has_all(trials[number].params):
        return trials[number]
    drawn = [str(trial.number) for trial in trials if space.has_all(trial.params)]
    raise UserError(
        f"The study {study.study_name} has no trial {number}: its numbers are {', '.join(drawn) or 'none yet'}."
    )


def is_complete(study: Study, n_trials: int) -> bool:
    """Return whether a study has all its trials, and they are finished."""
    trials = study.get_trials(deepcopy=False)
    return sum(is_counted(trial) for trial in trials if trial.state.is_finished()) >= n_trials


def has_room(study: Study, n_trials: int) -> bool:
    """Return whether a trial waits, or can be added."""
    trials = study.get_trials(deepcopy=False)
    return sum(map(is_counted, trials)) < n_trials or any(trial.state == TrialState.WAITING for trial in trials)
