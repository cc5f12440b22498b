"""Data of the page's charts: curves, calibration, costs and the study."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from mnist_lightning.comparison.evaluation import Model
from mnist_lightning.comparison.significance import reliability
from mnist_lightning.comparison.summary import searched
from mnist_lightning.search.record import Metric, TrialRecord, metrics_of
from mnist_lightning.search.space import short_key, short_value

Chart = dict[str, Any]
"""``group`` (its place on the page), ``title``, names of the axes ``x`` and ``y``, and ``series``: each with ``name``,
``kind`` (line, dashed, step, points or dots), numbers ``x`` and ``y``, and perhaps ``model`` (its index), ``stage``,
``low`` and ``high`` (a band), ``trials`` (a number for each point) and ``notes`` (a text for each point)."""


def metrics(models: Sequence[Model]) -> list[str]:
    """Return the metrics that any model has logged during its training."""
    logged = [(model, {key for row in model.runs[0].history for key in row}) for model in models]
    names = [name for model, keys in logged for name in model.test.metrics if {f"train/{name}", f"val/{name}"} & keys]
    return list(dict.fromkeys(names))


def model_charts(models: Sequence[Model]) -> list[Chart]:
    """Return the charts of the models."""
    return [*curves(models), calibration(models), *costs(models)]


def curves(models: Sequence[Model]) -> list[Chart]:
    """Return a chart for each metric: validation and training lines of each model, with bands over several runs."""
    return [
        {
            "group": "curves", "title": metric.replace("_", " "), "x": "epoch", "y": metric,
            "series": [
                {"name": model.name, "model": index, "stage": stage, "kind": kind, **_line(model, f"{stage}/{metric}")}
                for index, model in enumerate(models)
                for stage, kind in (("val", "line"), ("train", "dashed"))
            ],
        }
        for metric in metrics(models)
    ]  # fmt: skip


def _line(model: Model, key: str) -> dict[str, Any]:
    rows = [{row["epoch"]: row[key] for row in run.history if key in row} for run in model.runs]
    epochs = range(max(len(run.history) for run in model.runs))
    # JSON has neither infinity nor NaN: the curve gets a gap
    values = [[row[epoch] for row in rows if math.isfinite(row.get(epoch, math.nan))] for epoch in epochs]
    functions: dict[str, Any] = {"y": statistics.mean}
    if len(rows) > 1:
        functions |= {"low": min, "high": max}
    return {"x": [epoch + 1 for epoch in epochs]} | {
        name: [round(function(some), 6) if some else None for some in values] for name, function in functions.items()
    }


def calibration(models: Sequence[Model]) -> Chart:
    """Return the accuracy of the images by the models' confidence."""
    series: list[dict[str, Any]] = [{"name": "perfect", "kind": "dashed", "x": [0, 1], "y": [0, 1]}]
    for index, model in enumerate(models):
        if not model.test.has_diverged:
            confidence, accuracy, share = reliability(model.test.probabilities, model.test.labels)
            notes = [f"{round(part * len(model.test.labels)):,} images" for part in share]
            values = {"x": confidence.round(4).tolist(), "y": accuracy.round(4).tolist(), "notes": notes}
            series.append({"name": model.name, "model": index, "kind": "line", **values})
    return {
        "group": "calibration", "title": "accuracy by confidence", "x": "confidence", "y": "accuracy", "series": series
    }  # fmt: skip


def costs(models: Sequence[Model]) -> list[Chart]:
    """Return the test accuracy of each run against its parameters and its training time."""
    return [
        {
            "group": "calibration", "title": f"test accuracy by {name.partition(',')[0]}", "x": name, "y": "accuracy",
            "log": is_wide([getattr(run, cost) for model in models for run in model.runs]),
            "series": [
                {
                    "name": model.name, "model": index, "kind": "points",
                    "x": [round(getattr(run, cost), 1) for run in model.runs], "y": model.accuracies,
                    "notes": [str(run.path) for run in model.runs],
                }
                for index, model in enumerate(models)
            ],
        }
        for name, cost in (("parameters", "parameters"), ("training time, s", "seconds"))
    ]  # fmt: skip


def study_charts(study: optuna.Study) -> list[Chart]:
    """Return the history of a study, its Pareto fronts, and its first metric against each parameter."""
    metric = metrics_of(study)[0]
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        history(trials, metric),
        *fronts(trials, metrics_of(study)),
        *(slice_of(trials, metric, key) for key in searched(study)),
    ]


def history(trials: Sequence[FrozenTrial], metric: Metric) -> Chart:
    """Return the values of the trials in their order, those of their executions, and the best so far."""
    numbers, best, so_far = [trial.number for trial in trials], [], -math.inf
    for trial in trials:
        so_far = max(so_far, metric.sign * trial.values[0])
        best.append(metric.sign * so_far)
    single = [
        (trial, execution["score"])
        for trial in trials
        if len(executions := TrialRecord.of(trial).executions) > 1
        for execution in executions
    ]
    dots = _points(
        [trial for trial, _ in single], [trial.number for trial, _ in single], [score for _, score in single]
    )
    series = [
        {"name": "executions", "kind": "dots", **dots},
        {"name": "best so far", "kind": "step", **_points(trials, numbers, best)},
        {"name": "trials", "kind": "points", **_points(trials, numbers)},
    ]
    return {"group": "study", "title": "history", "x": "trial", "y": metric.name, "series": series}


def fronts(trials: Sequence[FrozenTrial], metrics: Sequence[Metric]) -> list[Chart]:
    """Return the first metric against each other metric, with the Pareto front of the two."""
    first, *others = metrics
    charts = []
    for index, metric in enumerate(others, start=1):
        front: list[tuple[float, float]] = []
        points = [(trial.values[index], trial.values[0]) for trial in trials]
        for x, y in sorted(points, key=lambda point: (-metric.sign * point[0], -first.sign * point[1])):
            if not front or first.sign * y > first.sign * front[-1][1]:
                front.append((x, y))
        front.sort()
        line = {"x": [_finite(x) for x, _ in front], "y": [_finite(y) for _, y in front]}
        series = [
            {"name": "Pareto front", "kind": "step", **line},
            {"name": "trials", "kind": "points", **_points(trials, [x for x, _ in points])},
        ]
        title = f"{first.name} by {metric.name}"
        charts.append({"group": "study", "title": title, "x": metric.name, "y": first.name, "series": series})
    return charts


def slice_of(trials: Sequence[FrozenTrial], metric: Metric, key: str) -> Chart:
    """Return the values of the trials against one parameter."""
    drawn = [trial for trial in trials if key in trial.params]
    values = [trial.params[key] for trial in drawn]
    chart: Chart = {"group": "slices", "title": f"by {short_key(key)}", "x": short_key(key), "y": metric.name}
    spaces = [trial.distributions[key] for trial in drawn]
    if any(isinstance(space, CategoricalDistribution) for space in spaces):
        are_numbers = all(isinstance(value, int | float) for value in values)
        chart["labels"] = [*dict.fromkeys(map(short_value, sorted(values, key=None if are_numbers else short_value)))]
        values = [chart["labels"].index(short_value(value)) for value in values]
    else:
        chart["log"] = any(getattr(space, "log", False) for space in spaces) and is_wide(values)
    return chart | {"series": [{"name": "trials", "kind": "points", **_points(drawn, values)}]}


def _points(
    trials: Sequence[FrozenTrial], x: Sequence[float], y: Sequence[float] | None = None
) -> dict[str, Sequence[float | None]]:
    """Return the points of trials, by default with their first metric as y."""
    y = [trial.values[0] for trial in trials] if y is None else y
    return {"x": [*map(_finite, x)], "y": [*map(_finite, y)], "trials": [trial.number for trial in trials]}


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def is_wide(values: Sequence[float]) -> bool:
    """Return whether values are more than a power of ten apart."""
    return min(values) > 0 and min(values) * 10 < max(values)
