"""Which sampler draws a trial, and with which seed."""

import copy
import inspect
from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import Any

import numpy as np
import optuna
from jsonargparse import Namespace
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler, QMCSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from mnist_lightning.search.record import Metric, directions_of, ordinal
from mnist_lightning.search.space import SearchSpace
from mnist_lightning.system.errors import UserError


class TrialSampler(BaseSampler):
    """Draw each trial with its own sampler, seeded for the trial's ordinal.

    So a trial's draw depends on the seed, the ordinal and, if the sampler learns, the earlier trials. It does not
    depend on how often the study was interrupted or how many processes share it.

    Args:
        study: The whole study; some pruners pass a sampler only a part of it.
        make: Makes the sampler of a trial from its ordinal, the number of earlier trials that count.

    Attributes:
        is_finite: Whether the sampler draws each combination once, and then stops.
    """

    def __init__(self, study: Study, make: Callable[[int], BaseSampler]) -> None:
        self._study = study
        self._make = make
        self._sampler = make(0)
        self.is_finite = isinstance(self._sampler, GridSampler | BruteForceSampler)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler = self._make(ordinal(self._study, trial.number))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        return self._sampler.sample_independent(study, trial, name, distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        if not (self.is_finite and "fixed_params" in trial.system_attrs):  # GridSampler needs a trial's grid index
            self._sampler.after_trial(study, trial, state, values)


def draw(trial: Trial, space: SearchSpace) -> None:
    """Draw the parameters of a trial, except those that it already has."""
    study, sampler = trial.study, trial.study.sampler
    drawn_before = trial.params.keys() - trial.relative_params.keys()
    for name, distribution in space.items():
        if not space.is_drawn(name, trial.params):
            continue
        if name in drawn_before and not getattr(sampler, "is_finite", False):
            # a process drew this and died: draw again, so that the remaining draws do not change
            frozen = study.get_trials(deepcopy=False)[trial.number]
            sampler.sample_independent(study, frozen, name, distribution)
        if isinstance(distribution, CategoricalDistribution):
            trial.suggest_categorical(name, distribution.choices)
        elif isinstance(distribution, FloatDistribution):
            trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
        elif isinstance(distribution, IntDistribution):
            trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def make_sampler(study: Study, config: Namespace, seed: int, space: SearchSpace) -> TrialSampler:
    """Make the sampler of a study.

    Args:
        study: The study.
        config: Class path and arguments of Optuna's sampler.
        seed: Seed of the search, for a sampler without its own seed.
        space: The search space.

    Raises:
        UserError: If the sampler does not suit the space.
    """
    if space.conditions and issubclass(resolve_name(config.class_path), GridSampler):
        raise UserError("GridSampler does not support conditions (when): use BruteForceSampler.")

    def make(ordinal: int) -> BaseSampler:
        seeded = copy.deepcopy(config)
        _seed(seeded, seed, ordinal)
        sampler: BaseSampler = _create(seeded)
        return sampler

    return TrialSampler(study, make)


def _create(config: Any) -> Any:
    """Return the object that a parsed config describes; jsonargparse would check it again for each trial."""
    if not (isinstance(config, Namespace) and "class_path" in config):
        return config
    arguments = {**vars(config.get("init_args") or Namespace()), **(config.get("dict_kwargs") or {})}
    return resolve_name(config.class_path)(**{name: _create(value) for name, value in arguments.items()})


def _seed(config: Namespace, seed: int, ordinal: int) -> None:
    """Seed a sampler and its inner samplers for a trial."""
    sampler_class = resolve_name(config.class_path)
    arguments = config["init_args"] = config.get("init_args") or Namespace()
    if sampler_class is QMCSampler and arguments.get("independent_sampler") is None:
        # the default would use the sequence's seed, and draw the same values in every trial
        arguments["independent_sampler"] = Namespace(class_path="optuna.samplers.RandomSampler")
    for inner in vars(arguments).values():
        if isinstance(inner, Namespace) and "class_path" in inner:
            _seed(inner, seed, ordinal)
    if "seed" in inspect.signature(sampler_class).parameters:
        own = arguments.get("seed")
        own = seed if own is None else own
        if sampler_class in (GridSampler, QMCSampler):  # all points of a grid or sequence share one seed
            arguments["seed"] = int(own)
        elif own is not False:
            arguments["seed"] = int(np.random.SeedSequence([own, ordinal]).generate_state(1)[0])


def check_sampler(config: Namespace, seed: int, space: SearchSpace, metrics: Sequence[Metric]) -> None:
    """Check, before the first training, that two trials can be drawn.

    Raises:
        UserError: If a package of the sampler is missing, or the sampler does not suit the space or the metrics.
    """
    study = optuna.create_study(directions=directions_of(metrics))
    study.sampler = make_sampler(study, config, seed, space)

    errors: list[Exception] = []

    def objective(trial: Trial) -> list[float]:
        try:
            draw(trial, space)
        except Exception as error:  # Optuna would print its traceback
            errors.append(error)
            trial.study.stop()
        return [0.0] * len(metrics)

    study.optimize(objective, n_trials=2)
    for error in errors:
        name, reason = config.class_path.rpartition(".")[2], " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            raise UserError(f"sampler: {name} needs the package {error.name}: pip install {error.name}") from error
        raise UserError(f"sampler: {name} cannot draw. {reason}") from error
