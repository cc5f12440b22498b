"""The table that compares models: a row for each quantity."""

import math
import statistics
from collections.abc import Sequence

import pandas as pd

from mnist_lightning.comparison.evaluation import Model, have_same
from mnist_lightning.comparison.significance import Comparison

TIME = "training time, s"
COLUMNS = ["quantity", "epoch", "model", "runs", "mean", "deviation", "difference", "low", "high"]


def quantities(models: Sequence[Model], comparisons: dict[str, Comparison]) -> pd.DataFrame:
    """Return the comparison as text: a column for each model, and one for its difference from the first."""
    values = [_quantities(model) for model in models]
    metrics = {name for model in models for name in model.metrics}
    names = sorted(dict.fromkeys(name for own in values for name in own), key=lambda name: name not in metrics)
    values = [{name: own.get(name, []) for name in names} for own in values]  # models may have different metrics
    table = {
        model.name: {name: _format(name, numbers) for name, numbers in own.items()}
        for model, own in zip(models, values, strict=True)
    }
    for model in models[1:]:
        differences = _differences(models[0], model)
        column = {name: _format_difference(name, values[0][name], differences.get(name)) for name in names}
        if found := _interval(models[0], model, comparisons):
            column[_compared(model)] += f" ({found[0]:+.4f} to {found[1]:+.4f})"
        table[f"{model.name} - {models[0].name}"] = column
    return pd.DataFrame(table).rename_axis("quantity")


def numbers(models: Sequence[Model], comparisons: dict[str, Comparison]) -> pd.DataFrame:
    """Return the comparison as numbers: a row for each quantity, epoch and model.

    The difference is from the first model; ``low`` and ``high`` are its interval, where there is one.
    """
    rows = []
    for model in models:
        differences = _differences(models[0], model) if model is not models[0] else {}
        for name, values in _quantities(model).items():
            if not values:
                continue
            quantity, _, epoch = name.removesuffix(" epoch)").partition(" (")
            row = {"quantity": quantity, "epoch": epoch, "model": model.name, "runs": len(values)}
            row |= {"mean": statistics.mean(values), "deviation": _deviation(values) if len(values) > 1 else None}
            row["difference"] = differences.get(name)
            if name == _compared(model) and (found := _interval(models[0], model, comparisons)):
                row["low"], row["high"] = found
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def _differences(first: Model, model: Model) -> dict[str, float]:
    """Return the differences from the first model, of the quantities that both have of the same images."""
    has_same_images = have_same("val", first.runs[0], model.runs[0])
    before = _quantities(first)
    return {
        name: statistics.mean(values) - statistics.mean(before[name])
        for name, values in _quantities(model).items()
        if values and before.get(name) and (has_same_images or not name.startswith("val/"))
    }


def _compared(model: Model) -> str:
    """Return the name of the quantity whose difference has an interval."""
    return f"test/accuracy ({model.weights} epoch)"


def _interval(first: Model, model: Model, comparisons: dict[str, Comparison]) -> tuple[float, float] | None:
    """Return the interval of a model's difference from the first; None if only one of them has several runs."""
    found = comparisons.get(model.name)
    if found is None or not (found.seeds or (len(first.runs), len(model.runs)) == (1, 1)):
        return None
    return (found.seeds or found).interval


def _deviation(values: Sequence[float]) -> float:
    """Return the standard deviation; NaN if a value is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _quantities(model: Model) -> dict[str, Sequence[float]]:
    error = model.test.calibration_error
    return {
        **model.metrics,
        "parameters": [model.runs[0].parameters],
        TIME: [run.seconds for run in model.runs],
        "epochs": [len(run.history) for run in model.runs],
        "best epoch": [run.best_epoch for run in model.runs],
        f"calibration error ({model.weights} epoch)": [] if error is None else [error],
    }


def _format(name: str, values: Sequence[float]) -> str:
    """Format a value, or mean ± standard deviation of several."""
    if not values:
        return "-"
    if all(isinstance(value, int) for value in values) and len({*values}) == 1:
        return f"{values[0]:,}"
    digits = _digits(name, values)
    spread = ""
    if len(values) > 1:
        spread = f" ± {_deviation(values):.{digits}f}"
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _format_difference(name: str, first: Sequence[float], difference: float | None) -> str:
    if difference is None or not math.isfinite(difference):
        return "-"
    return f"{difference:+,}" if isinstance(difference, int) else f"{difference:+.{_digits(name, first)}f}"


def _digits(name: str, values: Sequence[float]) -> int:
    return 1 if name == TIME or isinstance(values[0], int) or max(values) >= 10 else 4
