"""The Optuna study behind ``tune``: who draws a trial, who owns it, and what becomes of it when its owner dies."""

import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from operator import index
from pathlib import Path
from typing import Any, Literal

import optuna
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

SearchSpace = dict[str, BaseDistribution]
"""From a key of the config, with dots and the indices of lists, to the distribution of its values."""

ATTEMPTS = 3
"""How often a trial is started whose process dies."""


class TrialSampler(BaseSampler):
    """Draws each trial with a sampler of its own, seeded for the trial's place in the study.

    So what a trial gets depends on the seed and its place (and, if the sampler learns, on the trials before), not on
    how often the study was interrupted, and processes that share a study never repeat each other's draws.

    Args:
        study: The study. (Some pruners show a sampler only a part of it.)
        make: Makes the sampler for a trial from its place: the number of trials drawn before it.
    """

    def __init__(self, study: Study, make: Callable[[int], BaseSampler]) -> None:
        self._study = study
        self._make = make
        self._sampler = make(0)
        self.exhausted = False
        """Whether the sampler has nothing left to draw, as that of a grid."""

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Take the sampler of this trial."""
        others = self._study.get_trials(deepcopy=False)
        place = sum("continues" not in other.user_attrs for other in others if other.number < trial.number)
        self._sampler = self._make(place)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What the trial's sampler draws together."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: SearchSpace) -> dict[str, Any]:
        """Draw parameters together."""
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        """Draw one parameter."""
        return self._sampler.sample_independent(study, trial, name, distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Let the sampler know, and learn whether it is done."""
        try:
            self._sampler.after_trial(study, trial, state, values)
        except RuntimeError as error:  # samplers of finite spaces stop Study.optimize, which is not used here
            if "Study.stop" not in str(error):
                raise
            self.exhausted = True


def open_study(
    storage: BaseStorage,
    name: str,
    direction: Literal["maximize", "minimize"],
    settings: dict[str, Any],
    space: SearchSpace,
) -> tuple[Study, bool]:
    """Load a study that has these settings and this space, or make it.

    Args:
        storage: Where it is.
        name: Its name.
        direction: ``maximize`` or ``minimize``.
        settings: What else a value of the study depends on, in plain types.
        space: Its search space.

    Returns:
        The study, and whether it is new.

    Raises:
        MisconfigurationException: There is one by this name, but with other settings or another space.
    """
    own = {**settings, "direction": direction, "search_space": {key: distribution_to_json(space[key]) for key in space}}
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction=direction)
        study.set_user_attr("settings", own)
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
    check_trials(study, space)
    return study, False


def check_trials(study: Study, space: SearchSpace) -> None:
    """See that the trials have what ``tune`` gives them.

    Raises:
        MisconfigurationException: One has not.
    """
    for trial in study.get_trials(deepcopy=False):
        attributes = trial.user_attrs
        try:
            if trial.state == TrialState.COMPLETE and trial.params.keys() != space.keys():
                raise ValueError("it has other parameters")
            for execution in attributes.get("executions", []):
                math.fsum([execution["score"], *(index(epoch) + value for epoch, value in execution["values"])])
                index(execution["execution"])
            index(attributes.get("attempts", 0))
            attributes.get("owner", "").partition(":")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"Trial {trial.number} of the study {study.study_name} is damaged or was not made by tune: {error!r}. "
                "Take another study."
            ) from error


def _differences(found: dict[str, Any], own: dict[str, Any], prefix: str = "") -> list[str]:
    differences = []
    for key in [*found, *(key for key in own if key not in found)]:
        there, here = (settings.get(key) for settings in (found, own))
        if isinstance(there, dict) and isinstance(here, dict):
            differences += _differences(there, here, "" if key == "search_space" else f"{prefix}{key}.")
        elif there != here:
            there, here = (_describe(value, key in settings) for value, settings in ((there, found), (here, own)))
            differences.append(f"{prefix}{key} is {there} in the study, {here} in the command")
    return differences


def _describe(value: Any, is_there: bool) -> str:
    if not is_there:
        return "not searched"
    try:
        return describe(json_to_distribution(value))
    except (KeyError, TypeError, ValueError):  # another setting
        return str(value)


def bounds(distribution: BaseDistribution) -> list[Any]:
    """The lowest and the highest value of a distribution, or all of its choices."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def describe(distribution: BaseDistribution) -> str:
    """A distribution in words."""
    if isinstance(distribution, CategoricalDistribution):
        return "one of " + ", ".join(short_value(choice) for choice in distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    step = "" if distribution.step is None or distribution.log else f", step {distribution.step:g}"
    return f"{distribution.low:g} to {distribution.high:g}{step}{', logarithmic' if distribution.log else ''}"


def short_key(key: str) -> str:
    """A config key without what only the config's nesting needs: ``units.0``, ``optimizer``."""
    parts = [part for part in key.split(".") if part not in ("init_args", "class_path")]
    return ".".join(parts[2:] if parts[:2] == ["model", "network"] and len(parts) > 2 else parts[1:] or parts)


def short_value(value: Any) -> str:
    """A value of a parameter: numbers in few digits, class paths by their last name."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value.rpartition(".")[2] if isinstance(value, str) else str(value)


def results(study: Study, keys: Sequence[str]) -> list[list[str]]:
    """The completed trials, the best first, as text: number, value, scores of the executions, values of ``keys``."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    rows = []
    for trial in sorted(trials, key=lambda trial: sign * (trial.value or 0.0)):
        scores = " ".join(f"{execution['score']:.4f}" for execution in trial.user_attrs.get("executions", []))
        rows.append([str(trial.number), f"{trial.value:.4f}", scores, *(short_value(trial.params[k]) for k in keys)])
    return rows


def process_name() -> str:
    """Machine, number and start time of this process: it is never given to another."""
    return f"{_machine()}:{os.getpid()}:{_start_time(os.getpid())}"


def _machine() -> str:
    """Where the number of a process means the same: the host since its start, or a container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def _start_time(pid: int) -> str | None:
    """When a process started, in ticks; empty where the system does not say, None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return ""


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of ``n_trials``: all are but those whose work was given to another trial."""
    return trial.state != TrialState.FAIL or "error" in trial.user_attrs


def _lost(trials: Sequence[FrozenTrial], space: SearchSpace) -> list[FrozenTrial]:
    """Trials that were given up but not yet enqueued anew: whoever did the one died before the other."""
    continued = {trial.user_attrs.get("continues") for trial in trials}
    return [
        trial
        for trial in trials
        if not counts(trial)
        and "owner" in trial.user_attrs
        and trial.number not in continued
        and trial.params.keys() == space.keys()
    ]


def ask(study: Study, space: SearchSpace, n_trials: int) -> Trial | None:
    """Take a trial: one that waits, or a new one if the study has less than ``n_trials``."""
    while True:
        trials = study.get_trials(deepcopy=False)
        is_waiting = any(trial.state == TrialState.WAITING for trial in trials)
        if sum(map(counts, trials)) + len(_lost(trials, space)) >= n_trials and not is_waiting:
            return None
        trial = study.ask(space)
        before = [other for other in study.get_trials(deepcopy=False) if other.number < trial.number]
        # two processes may take the last place at once, or enqueue the same trial anew: the lowest number has it
        is_surplus = sum(map(counts, before)) >= n_trials
        continues = trial.user_attrs.get("continues")
        is_twin = continues is not None and any(other.user_attrs.get("continues") == continues for other in before)
        if not is_surplus and not is_twin:
            trial.set_user_attr("owner", process_name())
            return trial
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)


def put_back(study: Study, trial: FrozenTrial, space: SearchSpace, *, blame: bool) -> None:
    """Give up a running trial: it is enqueued anew, with its parameters and the executions that it has finished.

    Args:
        study: The study.
        trial: The trial.
        space: The study's search space.
        blame: Whether this counts as one of the trial's attempts.
    """
    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        return  # another process was faster
    # one whose error is known has failed; one whose owner died while it was drawn is replaced by another
    if "error" not in trial.user_attrs and trial.params.keys() == space.keys():
        _enqueue_again(study, trial, blame=blame)


def _enqueue_again(study: Study, trial: FrozenTrial, *, blame: bool) -> None:
    attributes = {
        "executions": trial.user_attrs.get("executions", []),
        "attempts": trial.user_attrs.get("attempts", 0) + blame,
        "continues": trial.number,
    }
    study.enqueue_trial(trial.params, user_attrs=attributes)


SWEEPS = 6
"""Sweeps in a grace period: a process on another machine that is silent for so many has vanished."""


def sweep(study: Study, space: SearchSpace, heard: dict[int, tuple[float | None, int]]) -> None:
    """Put back the running trials whose process is dead, or whose machine has vanished.

    Processes of this machine can be looked at. Those of others let their trials' ``heartbeat`` change while they live;
    that it does not is counted in sweeps, so clocks need not agree, and a storage that was away accuses nobody.

    Args:
        study: The study.
        space: Its search space.
        heard: What the sweeps before heard of each trial: its heartbeat, and how many have heard the same; brought up
            to date.
    """
    trials = study.get_trials(deepcopy=False)
    for trial in _lost(trials, space):
        _enqueue_again(study, trial, blame=True)
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        machine, _, process = trial.user_attrs.get("owner", "").partition(":")
        heartbeat = trial.user_attrs.get("heartbeat")
        before, silent = heard.get(trial.number, (heartbeat, -1))
        heard[trial.number] = heartbeat, silent + 1 if heartbeat == before else 0
        if machine == _machine():
            pid, start = process.split(":")
            is_dead = _start_time(int(pid)) not in (start, "")
        else:  # or without an owner: it is about to write its name, or died before
            is_dead = heard[trial.number][1] >= SWEEPS
        if is_dead:
            put_back(study, trial, space, blame=True)
