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
from mnist_lightning.search.record import (
    Metric,
    TrialRecord,
    check_finite,
    directions_of,
    is_counted,
    limited_metrics,
    metrics_of,
    ordinal,
)
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


ENOUGH_TRIALS = 20
"""The fewest trials whose importances are shown: those of fewer are mostly chance."""
OF_TRAINING = (
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "precision", "deterministic", "plugins"),
    *("limit_train_batches", "limit_val_batches", "overfit_batches", "fast_dev_run", "accumulate_grad_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "gradient_clip_val", "gradient_clip_algorithm", "callbacks"),
    *("sync_batchnorm", "use_distributed_sampler", "reload_dataloaders_every_n_epochs"),
)
"""Keys of the trainer that affect the values of a study."""


def open_study(
    storage: BaseStorage,
    name: str,
    metrics: Sequence[Metric],
    settings: dict[str, Any],
    space: SearchSpace,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Study:
    """Load a study with the given settings and space, or create it.

    Args:
        storage: Storage of the study.
        name: Name of the study.
        metrics: The metrics to optimize.
        settings: All other settings that affect the study's values, in plain types.
        space: Search space of the study.
        defaults: From a setting's dotted key to its value in a study that is older than the setting.

    Raises:
        UserError: If a study of this name exists with other settings or another space.
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
    for _ in range(50):  # another process may just have created the study and not yet written its settings
        if "settings" in study.user_attrs or study.get_trials(deepcopy=False):
            break
        time.sleep(0.1)
    found = study.user_attrs.get("settings")
    if found is None and not study.get_trials(deepcopy=False):
        study.set_user_attr("settings", own)
    elif not isinstance(found, dict):
        raise UserError(f"The study {name} was not made by tune. Use another --study_name.")
    elif differences := _differences(found, own, defaults):
        raise UserError(
            f"The study {name} has other settings: {'; '.join(differences)}. "
            "Use the study's settings to continue it, or another --study_name."
        )
    check_study(study, space)
    return study


def source_of(name: str, storage: str | None, logs: Path) -> str:
    """Return a study's journal or URL: the given storage, or else the journal in the study's folder."""
    return storage or str(logs / name / "journal.log")


def find_study(name: str, source: str) -> Study | None:
    """Load a study from a journal's path or a storage's URL; return None, and create nothing, if it does not exist.

    Raises:
        UserError: If the study is damaged.
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
    """Check the contents of a study: anyone can edit a journal, and Optuna checks little.

    Args:
        study: The study, which need not be from ``tune``: missing attributes are not checked.
        space: The study's search space, if known: each complete trial must have values for all of it.

    Raises:
        UserError: If the contents are not as ``tune`` writes them.
    """
    of_study = f"the study {study.study_name}"
    with _damage(f"The{of_study[3:]}"):
        check_finite(study.user_attrs.get("limits", {}).values())
        check_finite([study.user_attrs.get("deadline") or 0])
        dict(study.user_attrs.get("directions", {}))
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
        raise UserError(f"{what} is damaged or was not made by tune: {reason}. Use another --study_name.") from error


def _check_trial(trial: FrozenTrial, n_values: int) -> None:
    if trial.state == TrialState.COMPLETE:
        check_finite(trial.values)
        if len(trial.values) != n_values:
            raise ValueError(f"the number of its values is {len(trial.values)}, not {n_values}")
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
    except (KeyError, TypeError, ValueError):  # not a distribution
        return str(flat[key])


def check_limits(limits: Mapping[str, float]) -> None:
    """Check that limits are finite numbers.

    Raises:
        UserError: If a limit is not finite.
    """
    if unlimited := [name for name, limit in limits.items() if not math.isfinite(limit)]:
        raise UserError(f"limits: the limit of {', '.join(unlimited)} must be a finite number.")


def best_trial(study: Study, limits: Mapping[str, float] | None = None) -> FrozenTrial:
    """Return the trial within the limits that has the best first metric; the earliest if several are equal.

    Args:
        study: The study.
        limits: From the name of a metric to the worst allowed value; by default the limits of the last search command.

    Raises:
        UserError: If no complete trial is within the limits.
    """
    metrics, limits = metrics_of(study), study.user_attrs.get("limits", {}) if limits is None else limits
    check_limits(limits)
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if limits:
        limited = limited_metrics(limits, metrics, study.user_attrs.get("directions", {}))
        trials = [trial for trial in trials if _is_within(trial, metrics, limits, limited)]
    if not trials and not limits:
        raise UserError(f"The study {study.study_name} has no complete trial.")
    if not trials:
        raise UserError(
            f"No complete trial is within {', '.join(f'{name} {limit:g}' for name, limit in limits.items())}: "
            "change --limits, or choose a trial with --trial N."
        )

    def goodness(trial: FrozenTrial) -> tuple[list[float], int]:
        return [metric.sign * value for metric, value in zip(metrics, trial.values, strict=True)], -trial.number

    return max(trials, key=goodness)


def pareto_front(study: Study) -> list[FrozenTrial]:
    """Return the complete trials that no other trial dominates; limits are ignored, since they may change."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    signs = [metric.sign for metric in metrics_of(study)]
    values = [[sign * value for sign, value in zip(signs, trial.values, strict=True)] for trial in trials]

    def is_bettered(own: list[float]) -> bool:
        return any(other != own and all(map(ge, other, own)) for other in values)

    return [trial for trial, own in zip(trials, values, strict=True) if not is_bettered(own)]


def _is_within(
    trial: FrozenTrial, metrics: Sequence[Metric], limits: Mapping[str, float], limited: Sequence[Metric]
) -> bool:
    values = limited_values(TrialRecord.of(trial).executions, limits) | dict(
        zip([metric.name for metric in metrics], trial.values, strict=True)
    )
    # a trial that is older than a limit has no value for it
    return all(
        metric.name in values and metric.excess(values[metric.name], limits[metric.name]) <= 0 for metric in limited
    )


def limited_values(executions: Iterable[Mapping[str, Any]], limits: Iterable[str]) -> dict[str, float]:
    """Return the means over a trial's executions of the recorded metrics that have limits."""
    records = [execution.get("limited", {}) for execution in executions]
    return {
        name: mean(each[name] for each in records)
        for name in limits
        if records and all(name in each for each in records)
    }


def ranked_trials(study: Study) -> list[FrozenTrial]:
    """Return the complete trials, those with the best first metric first; limits are ignored."""
    trials, metric = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)), metrics_of(study)[0]
    return sorted(trials, key=lambda trial: -metric.sign * trial.values[0])


def format_value(value: float) -> str:
    """Format a metric's value: whole numbers in full, others with four decimals."""
    return f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.4f}"


def importances(study: Study) -> dict[str, float]:
    """Return the importance of each parameter that all trials have (fANOVA) for the first metric, largest first.

    It is empty for fewer than :data:`ENOUGH_TRIALS` complete trials, and if their values are all the same.
    """
    trials = ranked_trials(study)
    if len(trials) < ENOUGH_TRIALS or len({trial.values[0] for trial in trials}) == 1:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[0])


def trial_numbers(study: Study) -> "pd.DataFrame":
    """Return a table of the complete trials, best first: number, values, scores of the executions, parameters."""
    import pandas as pd  # slow to import

    names = [metric.name for metric in metrics_of(study)]
    rows = []
    for trial in ranked_trials(study):
        scores = [execution["score"] for execution in TrialRecord.of(trial).executions]
        row = {"trial": trial.number, **dict(zip(names, trial.values, strict=True))}
        row |= {f"execution {number}": score for number, score in enumerate(scores, start=1)}
        rows.append(row | {short_key(key): value for key, value in trial.params.items()})
    return pd.DataFrame(rows)


def results(study: Study, keys: Sequence[str]) -> "pd.DataFrame":
    """Return a table of texts, best trial first: number, values, scores of the executions, values of ``keys``."""
    import pandas as pd  # slow to import

    metrics, rows = metrics_of(study), []
    for trial in ranked_trials(study):
        scores = " ".join(f"{execution['score']:.4f}" for execution in TrialRecord.of(trial).executions)
        params = [short_value(trial.params.get(key, "-")) for key in keys]
        rows.append([str(trial.number), *map(format_value, trial.values), scores, *params])
    return pd.DataFrame(
        rows, columns=["trial", *(metric.name for metric in metrics), "executions", *map(short_key, keys)]
    )


def renew_deadline(study: Study, timeout: float | None) -> None:
    """Set the time after which no trial starts to ``timeout`` seconds from now, or remove it.

    A deadline of another command that has not passed stays. The machines' clocks must agree to the accuracy that is
    wanted for the deadline.
    """
    if time_left(study) in (0.0, math.inf):  # the deadline has passed, or there is none
        study.set_user_attr("deadline", None if timeout is None else time.time() + timeout)


def time_left(study: Study) -> float:
    """Return the seconds during which trials may start; infinite without a deadline."""
    deadline = study.user_attrs.get("deadline")
    return math.inf if deadline is None else max(0.0, deadline - time.time())


def is_time_up(study: Study) -> bool:
    """Return whether the deadline has passed, so that no trial may start."""
    return time_left(study) == 0


def has_trial_with(study: Study, params: dict[str, Any]) -> bool:
    """Return whether a trial has these parameters, or is enqueued with them."""
    trials = study.get_trials(deepcopy=False)
    return any(params in (trial.params, trial.system_attrs.get("fixed_params")) for trial in trials)


def find_trial(study: Study, number: int, space: SearchSpace) -> FrozenTrial:
    """Return the trial of a number, if all its parameters are drawn.

    Raises:
        UserError: If there is no such trial.
    """
    trials = study.get_trials(deepcopy=False)
    if number < len(trials) and space.has_all(trials[number].params):
        return trials[number]
    drawn = [str(trial.number) for trial in trials if space.has_all(trial.params)]
    raise UserError(
        f"The study {study.study_name} has no trial {number}: its trials are {', '.join(drawn) or 'none yet'}."
    )


def is_complete(study: Study, n_trials: int) -> bool:
    """Return whether all trials of a study are finished."""
    trials = study.get_trials(deepcopy=False)
    return sum(is_counted(trial) for trial in trials if trial.state.is_finished()) >= n_trials


def has_room(study: Study, n_trials: int) -> bool:
    """Return whether a trial is waiting or can be added."""
    trials = study.get_trials(deepcopy=False)
    # asked after each trial, so that it must be quick for thousands
    return ordinal(study, len(trials)) < n_trials or any(trial.state == TrialState.WAITING for trial in trials)
