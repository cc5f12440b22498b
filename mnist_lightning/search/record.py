"""Metrics, and what is stored in a trial beside Optuna's own."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import index
from typing import Any, Literal

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

COMPUTED = ("parameters", "flops", "seconds")
"""Metrics that are not logged: trainable parameters, operations per image, training time."""


Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Metric:
    """A metric and whether a high or a low value is good.

    Attributes:
        name: The name under which it is logged, or one of ``COMPUTED``.
        direction: ``"maximize"`` or ``"minimize"``; by default losses, errors and computed metrics are minimized.
    """

    name: str
    direction: Direction | None = None

    def __post_init__(self) -> None:
        if self.direction is None:
            is_low = self.name in COMPUTED or any(word in self.name for word in ("loss", "error"))
            object.__setattr__(self, "direction", "minimize" if is_low else "maximize")

    @property
    def sign(self) -> int:
        """1 if a high value is good, -1 if a low one is."""
        return 1 if self.direction == "maximize" else -1

    def best(self, values: Iterable[Any]) -> Any:
        """Return the best of some values, or of tuples that start with a value."""
        return (max if self.sign == 1 else min)(values)

    def excess(self, value: float, limit: float) -> float:
        """Return how much worse a value is than a limit; 0 or less if it is within the limit."""
        return self.sign * (limit - value)


def limited_metrics(
    limits: Iterable[str], metrics: Sequence[Metric], directions: Mapping[str, Direction]
) -> list[Metric]:
    """Return the metrics that have limits.

    Args:
        limits: Their names.
        metrics: The metrics that a study optimizes.
        directions: Directions of other metrics, where they are known.
    """
    known = {metric.name: metric for metric in metrics}
    return [known.get(name, Metric(name, directions.get(name))) for name in limits]


def directions_of(metrics: Sequence[Metric]) -> list[Direction]:
    """Return the directions of metrics, as Optuna expects them."""
    return ["maximize" if metric.sign == 1 else "minimize" for metric in metrics]


def metrics_of(study: Study) -> list[Metric]:
    """Return the metrics that a study optimizes."""
    settings = study.user_attrs.get("settings")
    metric = settings.get("metric") if isinstance(settings, dict) else None
    names = [metric] if isinstance(metric, str) else metric
    if not isinstance(names, list) or len(names) != len(study.directions):
        several = len(study.directions) > 1
        names = [f"value {number}" if several else "value" for number, _ in enumerate(study.directions)]
    directions: list[Direction] = [
        "maximize" if each == StudyDirection.MAXIMIZE else "minimize" for each in study.directions
    ]
    return [Metric(str(name), direction) for name, direction in zip(names, directions, strict=True)]


@dataclass(frozen=True)
class TrialRecord:
    """The user attributes of a trial: all that another process needs to continue the trial.

    Attributes:
        owner: Name of the process that runs the trial; empty while the trial waits.
        heartbeat: A number that changes while the owner's command is alive.
        executions: The finished executions in order: ``execution`` (its number), ``seed``, ``score`` (the first metric
            at its best epoch), ``scores`` (all metrics, if there are several), ``limited`` (metrics with limits),
            ``seconds``, ``values`` (pairs of epoch and first metric), ``folder`` (relative to the study's).
        attempts: Number of processes that died while running the trial since it last finished an execution.
        error: Why the trial failed.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: If an attribute is not as ``tune`` writes it.
    """

    owner: str = ""
    heartbeat: float | None = None
    executions: Sequence[dict[str, Any]] = field(default_factory=tuple)
    attempts: int = 0
    error: str | None = None

    def __post_init__(self) -> None:
        self.owner.partition(":")
        index(self.attempts)
        for execution in self.executions:
            curve = dict(execution["values"])
            check_finite([execution["score"], *execution.get("scores", []), *curve.values()])
            check_finite(execution.get("limited", {}).values())
            [*map(index, [execution["execution"], *curve])]

    def best_execution(self, metric: Metric) -> dict[str, Any]:
        """Return the finished execution with the best score, the first if several are equal."""
        score = metric.best(execution["score"] for execution in self.executions)
        return next(execution for execution in self.executions if execution["score"] == score)

    @classmethod
    def of(cls, trial: FrozenTrial) -> "TrialRecord":
        """Read the record of a trial."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: trial.user_attrs[name] for name in names if name in trial.user_attrs})


def check_finite(values: Iterable[Any]) -> None:
    """Raise a ValueError or TypeError if a value is not a finite number."""
    for value in values:
        if isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number")


def ordinal(study: Study, number: int) -> int:
    """Return how many trials before the one with a number are among ``n_trials``."""
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return number - sum(trial.number < number and not is_counted(trial) for trial in failed)


def is_counted(trial: FrozenTrial) -> bool:
    """Return whether a trial counts towards ``n_trials``: all do, except surplus and repeated trials."""
    return trial.state != TrialState.FAIL or "error" in trial.user_attrs
