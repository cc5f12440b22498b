"""The Optuna study behind ``tune``: who draws a trial, who owns it, and what becomes of it when its owner dies."""

import json
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
import psutil
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, GridSampler
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mnist_lightning.parsing import shorten
from mnist_lightning.runs import flatten
from mnist_lightning.tune.space import (
    SearchSpace,
    describe,
    describe_conditions,
    in_distribution,
    short_key,
    short_value,
)
from mnist_lightning.tune.storage import open_storage

if TYPE_CHECKING:
    import pandas as pd

ATTEMPTS = 3
"""How often a trial is begun whose process dies."""

SWEEPS = 6
"""Sweeps in a grace period: a process on another machine that is silent for so many has vanished."""


class TrialSampler(BaseSampler):
    """Draws each trial with a sampler of its own, seeded for the trial's number.

    So what a trial gets depends on the seed and its number (and, if the sampler learns, on the trials before), not on
    how often the study was interrupted, and processes that share a study never repeat each other's draws.

    Args:
        study: The study. (Some pruners show a sampler only a part of it.)
        make: Makes the sampler of a trial from its number.
        combinations: How many there are, of which the sampler draws each once; infinite for most samplers.
    """

    def __init__(self, study: Study, make: Callable[[int], BaseSampler], combinations: float = math.inf) -> None:
        self._study = study
        self._make = make
        self._sampler = make(0)
        self.combinations = combinations

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler = self._make(trial.number)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        return self._sampler.sample_independent(study, trial, name, distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        try:
            self._make(trial.number).after_trial(study, trial, state, values)  # another process may have drawn it
        except RuntimeError as error:  # samplers of finite spaces stop Study.optimize, which is not used here
            if "Study.stop" not in str(error):
                raise

    def is_exhausted(self) -> bool:
        """Whether there is nothing left to draw."""
        if self.combinations == math.inf:
            return False
        counted = [trial for trial in self._study.get_trials(deepcopy=False) if is_counted(trial)]
        if isinstance(self._sampler, GridSampler):  # what is enqueued may lie beside the grid
            return len({trial.system_attrs.get("grid_id") for trial in counted} - {None}) >= self.combinations
        return len({tuple(sorted(trial.params.items())) for trial in counted}) >= self.combinations


def open_study(
    storage: BaseStorage,
    name: str,
    directions: Sequence[Literal["maximize", "minimize"]],
    settings: dict[str, Any],
    space: SearchSpace,
) -> tuple[Study, bool]:
    """Load a study that has these settings and this space, or make it.

    Args:
        storage: Where it is.
        name: Its name.
        directions: ``maximize`` or ``minimize``, for each metric.
        settings: What else a value of the study depends on, in plain types.
        space: Its search space.

    Returns:
        The study, and whether it is new.

    Raises:
        MisconfigurationException: There is one by this name, but with other settings or another space.
    """
    searched = {key: json.loads(distribution_to_json(space[key])) for key in space}
    for key, conditions in space.conditions.items():
        searched[key]["when"] = conditions
    texts = {key: json.dumps(distribution) for key, distribution in searched.items()}
    direction = directions[0] if len(directions) == 1 else [*directions]
    own = {**settings, "direction": direction, "search_space": texts}
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        study.set_user_attr("settings", own)
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            study.set_metric_names(metrics_of(study))  # for Optuna's dashboard
        return study, True
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
    for _ in range(50):  # whoever makes it at this moment still has to write them
        if "settings" in study.user_attrs or study.get_trials(deepcopy=False):
            break
        time.sleep(0.1)
    found = study.user_attrs.get("settings")
    if found is None and not study.get_trials(deepcopy=False):
        study.set_user_attr("settings", own)
    elif not isinstance(found, dict):
        raise MisconfigurationException(f"The study {name} was not made by tune. Take another --study_name.")
    elif differences := _differences(found, own):
        raise MisconfigurationException(
            f"The study {name} has other settings: {'; '.join(differences)}. "
            "Give those to continue it, or take another --study_name."
        )
    check_study(study, space)
    return study, False


def find_study(name: str, source: str) -> Study | None:
    """Load a study from a journal's path or a storage's URL; None if there is none, and nothing is made.

    Raises:
        MisconfigurationException: If it is damaged.
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
        MisconfigurationException: If something of it is not what ``tune`` writes.
    """
    of_study = f"the study {study.study_name}"
    with _damage(f"The{of_study[3:]}"):
        _check_numbers(study.user_attrs.get("limits", {}).values())
        _check_numbers([study.user_attrs.get("deadline") or 0])
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
        raise MisconfigurationException(
            f"{what} is damaged or was not made by tune: {reason}. Take another study."
        ) from error


def _check_trial(trial: FrozenTrial, n_values: int) -> None:
    if trial.state == TrialState.COMPLETE:
        _check_numbers(trial.values)
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
    attributes = trial.user_attrs
    for execution in attributes.get("executions", []):
        _check_numbers([execution["score"], *execution.get("scores", []), *dict(execution["values"]).values()])
        [*map(index, [execution["execution"], *dict(execution["values"])])]
    index(attributes.get("attempts", 0))
    attributes.get("owner", "").partition(":")
    [int(execution) for execution in attributes.get("workers", {})]


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{value} stands for a finite number")


def _differences(found: dict[str, Any], own: dict[str, Any]) -> list[str]:
    there, here = _flat(found), _flat(own)
    # studies of the first version had less settings
    keys = [*there, *(key for key in here if "version" in found or key in own["search_space"])]
    return [
        f"{key} is {_describe(key, there)} in the study, {_describe(key, here)} in the command"
        for key in dict.fromkeys(keys)
        if there.get(key) != here.get(key) and not _is_one_for_all(there.get(key), here.get(key))
    ]


def _is_one_for_all(one: Any, other: Any) -> bool:
    """Whether one of two values is a list of nothing but the other, as where a number stands for all layers."""
    values, value = (one, other) if isinstance(one, list) else (other, one)
    return isinstance(values, list) and bool(values) and all(each == value for each in values)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    space = settings.get("search_space")
    rest = {key: value for key, value in settings.items() if key != "search_space"}
    return {**flatten(rest), **(space if isinstance(space, dict) else {})}


def _describe(key: str, flat: dict[str, Any]) -> str:
    if key not in flat:
        return "not searched"
    try:
        conditions = json.loads(flat[key]).get("when", {})
        return describe(json_to_distribution(flat[key])) + describe_conditions(conditions)
    except (KeyError, TypeError, ValueError):  # another setting
        return str(flat[key])


def metrics_of(study: Study) -> list[str]:
    """The names of a study's metrics."""
    settings = study.user_attrs.get("settings")
    metric = settings.get("metric") if isinstance(settings, dict) else None
    names = [metric] if isinstance(metric, str) else metric
    if isinstance(names, list) and len(names) == len(study.directions):
        return [*map(str, names)]
    return [f"value {index}" for index, _ in enumerate(study.directions)] if len(study.directions) > 1 else ["value"]


def signs(study: Study) -> list[int]:
    """For each metric 1 if a high value is good, -1 if a low one is."""
    return [1 if direction == StudyDirection.MAXIMIZE else -1 for direction in study.directions]


def check_limits(limits: dict[str, float], metrics: Sequence[str]) -> None:
    """See that each limit is one of a metric, and a number.

    Raises:
        MisconfigurationException: One is not.
    """
    if unknown := limits.keys() - {*metrics}:
        raise MisconfigurationException(f"limits: {', '.join(unknown)} is not among the metrics, {', '.join(metrics)}.")
    if unlimited := [name for name, limit in limits.items() if not math.isfinite(limit)]:
        raise MisconfigurationException(f"limits: that of {', '.join(unlimited)} must be a finite number.")


def best_trial(study: Study, limits: dict[str, float] | None = None) -> FrozenTrial:
    """The trial with the best first metric, of those within the limits of the others; the earliest of equals.

    Args:
        study: The study.
        limits: By name of a metric; by default those of the last command that searched.

    Raises:
        MisconfigurationException: There is none.
    """
    names, best = metrics_of(study), []
    limits = study.user_attrs.get("limits", {}) if limits is None else limits
    check_limits(limits, names)
    sign = dict(zip(names, signs(study), strict=True))
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        values = {name: sign[name] * value for name, value in zip(names, trial.values, strict=True)}
        if all(values[name] >= sign[name] * limit for name, limit in limits.items()):
            best.append(([*values.values()], -trial.number, trial))
    if not best:
        raise MisconfigurationException(
            f"No completed trial is within {', '.join(f'{name} {limit:g}' for name, limit in limits.items())}: "
            "give other --limits, or take any with --trial N."
        )
    return max(best, key=lambda item: item[:2])[2]


def format_value(value: float) -> str:
    """A value of a metric: whole numbers in full, others with four decimals."""
    return f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.4f}"


def results(study: Study, keys: Sequence[str]) -> "pd.DataFrame":
    """The completed trials, the best first, as text: number, values, scores of the executions, values of ``keys``."""
    import pandas as pd  # takes a while

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign, rows = signs(study)[0], []
    for trial in sorted(trials, key=lambda trial: -sign * trial.values[0]):
        scores = " ".join(f"{execution['score']:.4f}" for execution in trial.user_attrs.get("executions", []))
        params = [short_value(trial.params.get(key, "-")) for key in keys]
        rows.append([str(trial.number), *map(format_value, trial.values), scores, *params])
    return pd.DataFrame(rows, columns=["trial", *metrics_of(study), "executions", *map(short_key, keys)])


def process_name(pid: int | None = None) -> str:
    """Machine, number and start time of a process, by default of this one: it is never given to another."""
    pid = pid or os.getpid()
    return f"{_machine()}:{pid}:{_start_time(pid)}"


def _machine() -> str:
    """Where the number of a process means the same: the host since its start, or a container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def _start_time(pid: int) -> str | None:
    """Return when a process started, in seconds; empty if the system does not say, None if the process is dead."""
    try:
        process = psutil.Process(pid)
        # a container's first process may never bury the dead
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        # Linux counts from its start: there, what psutil adds to the ticks moves when the clock is set
        return f"{process.create_time() - (psutil.boot_time() if psutil.LINUX else 0):.2f}"
    except psutil.NoSuchProcess:
        return None
    except (psutil.Error, OSError):
        return ""


def set_attributes(study: Study, trial: FrozenTrial, **attributes: Any) -> None:
    """Change attributes of a trial that is not finished.

    Raises:
        UpdateFinishedTrialError: It is finished.
    """
    for name, value in attributes.items():
        study._storage.set_trial_user_attr(trial._trial_id, name, value)


def is_counted(trial: FrozenTrial) -> bool:
    """Whether a trial is one of ``n_trials``: all are but those that were given up before they were begun."""
    return trial.state != TrialState.FAIL or "error" in trial.user_attrs


def ask(study: Study, space: SearchSpace, n_trials: int, owner: str) -> int | None:
    """Take a trial: one that waits, or a new one if the study has less than ``n_trials``.

    Args:
        study: The study, with a :class:`TrialSampler`.
        space: Its search space.
        n_trials: Trials of the study in all.
        owner: Name of the process that answers for the trial.

    Returns:
        The trial's number, or None if there is none to take.
    """
    sampler: Any = study.sampler
    for _ in range(100):
        trials = study.get_trials(deepcopy=False)
        is_waiting = any(trial.state == TrialState.WAITING for trial in trials)
        if (sum(map(is_counted, trials)) >= n_trials or sampler.is_exhausted()) and not is_waiting:
            break
        trial = study.ask()
        trial.set_user_attr("owner", owner)  # first: should this process die, it is known whose the trial was
        for name, distribution in space.items():
            if not space.is_drawn(name, trial.params):
                continue
            if name in trial.params.keys() - trial.relative_params.keys() and math.isinf(sampler.combinations):
                # half of it was drawn before: with this, the rest is what it would have been
                sampler.sample_independent(study, study.get_trials(deepcopy=False)[trial.number], name, distribution)
            trial._suggest(name, distribution)
        before = [other for other in study.get_trials(deepcopy=False)[: trial.number] if is_counted(other)]
        # two machines may take the last place at once, or draw the same combination: the lowest number has it
        is_repeat = math.isfinite(sampler.combinations) and any(other.params == trial.params for other in before)
        if len(before) < n_trials and not is_repeat:
            return trial.number
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
    return None


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


def is_over(study: Study) -> bool:
    """Whether no trial may begin any more."""
    return time_left(study) == 0


def is_there(study: Study, params: dict[str, Any]) -> bool:
    """Whether a trial has these parameters, or waits to get them."""
    trials = study.get_trials(deepcopy=False)
    return any(params in (trial.params, trial.system_attrs.get("fixed_params")) for trial in trials)


def find_trial(study: Study, number: int, space: SearchSpace) -> FrozenTrial:
    """A trial with all of its parameters.

    Raises:
        MisconfigurationException: There is none of this number.
    """
    trials = study.get_trials(deepcopy=False)
    if number < len(trials) and space.has_all(trials[number].params):
        return trials[number]
    drawn = [str(trial.number) for trial in trials if space.has_all(trial.params)]
    raise MisconfigurationException(
        f"The study {study.study_name} has no trial {number}: its numbers are {', '.join(drawn) or 'none yet'}."
    )


def is_complete(study: Study, n_trials: int) -> bool:
    """Whether all trials are finished that the study, with its :class:`TrialSampler`, shall have or can draw."""
    trials = study.get_trials(deepcopy=False)
    if sum(is_counted(trial) for trial in trials if trial.state.is_finished()) >= n_trials:
        return True
    sampler: Any = study.sampler
    return sampler.is_exhausted() and all(trial.state.is_finished() for trial in trials)


def give_back(study: Study, trial: FrozenTrial, *, attempts: int) -> None:
    """Let a running trial wait for another process, with the parameters and executions that it has.

    Args:
        study: The study.
        trial: The trial.
        attempts: How often a process has died that ran it.
    """
    with suppress(UpdateFinishedTrialError, ValueError):  # another process was faster
        if "error" in trial.user_attrs:
            study.tell(trial.number, state=TrialState.FAIL)
        else:
            set_attributes(study, trial, workers={}, attempts=attempts, owner="")
            study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def sweep(study: Study, heartbeats: dict[int, tuple[float | None, int]]) -> list[int]:
    """Give back the running trials whose process is dead, or whose machine has vanished.

    Processes of this machine can be looked at. Those of others let their trials' ``heartbeat`` change while they live;
    that it does not is counted in sweeps, so clocks need not agree, and a storage that was away accuses nobody.

    Args:
        study: The study.
        heartbeats: From the number of a trial to its last heartbeat and in how many sweeps it was the same; brought up
            to date.

    Returns:
        The numbers of the trials that were given back.
    """
    dead = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state != TrialState.RUNNING:
            heartbeats.pop(trial.number, None)
            continue
        machine, _, process = trial.user_attrs.get("owner", "").partition(":")
        heartbeat = trial.user_attrs.get("heartbeat")
        before, silent = heartbeats.get(trial.number, (heartbeat, -1))
        heartbeats[trial.number] = heartbeat, silent + 1 if heartbeat == before else 0
        if machine == _machine():
            pid, _, start = process.partition(":")
            is_dead = not pid.isdecimal() or _start_time(int(pid)) not in (start, "")
        else:  # or without an owner: it is about to write its name, or died before
            is_dead = heartbeats[trial.number][1] >= SWEEPS
        if is_dead:
            give_back(study, trial, attempts=trial.user_attrs.get("attempts", 0) + 1)
            heartbeats.pop(trial.number)  # who takes it next is heard anew
            dead.append(trial.number)
    return dead
