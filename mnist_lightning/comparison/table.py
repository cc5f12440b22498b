"""The table that compares models: a row for each quantity."""

import math
import statistics
from collections.abc import Sequence

import pandas as pd

from mnist_lightning.comparison.evaluation import Model, have_same
from mnist_lightning.comparison.significance import Comparison

TIME = "training time, s"


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
    for model, own in zip(models[1:], values[1:], strict=True):
        column = {name: _format_difference(name, values[0][name], numbers) for name, numbers in own.items()}
        if not have_same("val", models[0].runs[0], model.runs[0]):
            column |= {name: "-" for name in own if name.startswith("val/")}
        found, counts = comparisons[model.name], (len(models[0].runs), len(model.runs))
        if found.seeds or counts == (1, 1):  # otherwise there is no interval of this difference
            low, high = (found.seeds or found).interval
            column[f"test/accuracy ({model.weights} epoch)"] += f" ({low:+.4f} to {high:+.4f})"
        table[f"{model.name} - {models[0].name}"] = column
    return pd.DataFrame(table).rename_axis("quantity")


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
    if len(values) > 1:  # statistics.stdev takes only finite numbers
        spread = f" ± {statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _format_difference(name: str, first: Sequence[float], second: Sequence[float]) -> str:
    if not first or not second:
        return "-"
    difference = statistics.mean(second) - statistics.mean(first)
    if not math.isfinite(difference):
        return "-"
    return f"{difference:+,}" if isinstance(difference, int) else f"{difference:+.{_digits(name, first)}f}"


def _digits(name: str, values: Sequence[float]) -> int:
    return 1 if name == TIME or isinstance(values[0], int) or max(values) >= 10 else 4
