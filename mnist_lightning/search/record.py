"""Metrics, and what is stored in a trial beside Optuna's own."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from operator import index
from typing import Any, Literal

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

COMPUTED = ("parameters", "flops", "seconds")
"""Metrics that are not logged: trainable parameters, operations for one image, time that the training took."""


Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Metric:
    """A metric and whether a high or a low value is good.

    Attributes:
        name: As it is logged, or one of ``COMPUTED``.
        direction: ``"maximize"`` or ``"minimize"``; by default low is good for losses, errors and what is computed.
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
        """Return the best of some values, or of pairs that begin with one."""
        return (max if self.sign == 1 else min)(values)

    def excess(self, value: float, limit: float) -> float:
        """Return by how much a value is worse than a limit; 0 or less if it is not."""
        return self.sign * (limit - value)


def directions_of(metrics: Sequence[Metric]) -> list[Direction]:
    """Return the directions of metrics, as Optuna wants them."""
    return ["maximize" if metric.sign == 1 else "minimize" for metric in metrics]


def metrics_of(study: Study) -> list[Metric]:
    """Return what a study optimizes."""
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
    """The user attributes of a trial: all that another process needs to go on with it.

    Attributes:
        owner: Name of the process that runs it; empty while it waits.
        heartbeat: Changes as long as the owner's command lives.
        executions: Those that are finished, in their order: ``execution`` (its number), ``seed``, ``score`` (the first
            metric at its best epoch), ``scores`` (all metrics, if there are several), ``limited`` (what has limits),
            ``seconds``, ``values`` (pairs of epoch and first metric), ``folder`` (in that of the study).
        attempts: How many processes died at it since an execution was finished.
        error: Why it failed.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: If an attribute is not one that ``tune`` writes.
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

    @classmethod
    def of(cls, trial: FrozenTrial) -> "TrialRecord":
        """Read a trial's."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: trial.user_attrs[name] for name in names if name in trial.user_attrs})


def check_finite(values: Iterable[Any]) -> None:
    """Raise a ValueError or TypeError if a value is not a finite number."""
    for value in values:
        if isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{value} stands for a finite number")


def is_counted(trial: FrozenTrial) -> bool:
    """Return whether a trial is one of ``n_trials``: all are but those that were one too many."""
    return trial.state != TrialState.FAIL or "error" in trial.user_attrs
