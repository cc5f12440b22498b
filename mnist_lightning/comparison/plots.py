"""Figures of the models and of a study, for slides."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray
from optuna.trial import TrialState

from mnist_lightning.comparison.charts import is_wide, metrics
from mnist_lightning.comparison.evaluation import Model
from mnist_lightning.comparison.gallery import SAMPLES
from mnist_lightning.comparison.significance import reliability
from mnist_lightning.comparison.summary import searched
from mnist_lightning.search.record import Metric, metrics_of
from mnist_lightning.search.space import short_key, short_value
from mnist_lightning.training import figures
from mnist_lightning.training.figures import themed

STUDY = figures.COLORS[2]
"""Color of trials: the first two are those of the baseline and of the tuned model."""


def model_figures(models: Sequence[Model]) -> dict[str, Figure]:
    """Return the figures of the models by name: the notebook's, calibration and cost."""
    images = {"samples": (models, np.arange(min(SAMPLES, len(models[0].test.labels))))}
    for right, wrong in [pair for other in models[1:] for pair in ((models[0], other), (other, models[0]))]:
        differing = np.flatnonzero(right.test.correct & ~wrong.test.correct)
        images[f"only_{right.slug}_not_{wrong.slug}"] = ([right, wrong], differing)
    return {
        "curves": curves(models),
        **{name: predictions(shown, indices) for name, (shown, indices) in images.items() if len(indices)},
        **{f"confusion_matrix_{model.slug}": confusion_matrix(model) for model in models},
        "reliability": reliability_diagram(models),
        "costs": costs(models),
    }


def predictions(models: Sequence[Model], indices: NDArray[np.intp]) -> Figure:
    """Draw the first of some test images, titled with the truth and the predictions: green where all are right."""
    shown, test = indices[:SAMPLES], models[0].test
    names = [test.classes[label] for label in test.labels[shown]]
    titles = [
        "\n".join([f"true {name}", *(f"{model.name} {test.classes[model.test.predicted[index]]}" for model in models)])
        for name, index in zip(names, shown, strict=True)
    ]
    all_right = np.all([model.test.correct[shown] for model in models], axis=0)
    colors = [figures.RIGHT if right else figures.WRONG for right in all_right]
    images = figures.pictures(test.split.scaled(shown))
    return figures.image_grid(images, titles, min(5, len(shown)), colors, scale=1.5)


def curves(models: Sequence[Model]) -> Figure:
    """Draw all metrics over the epochs, with a band from the lowest to the highest run of a model."""
    table = figures.tidy({model.name: [run.history for run in model.runs] for model in models})
    return figures.curves(table, metrics(models), {model.name: model.color for model in models})


def confusion_matrix(model: Model) -> Figure:
    """Draw the confusion matrix of a model's first run."""
    title = f"{model.name}: {len(model.test.mistakes):,} mistakes"
    return figures.confusion_matrix(model.test.confusion_matrix, title, model.test.classes, model.color)


@themed
def reliability_diagram(models: Sequence[Model]) -> Figure:
    """Plot accuracy against confidence; the size of each bin's point is its share of the images."""
    figure, axes = _plot("accuracy of images by confidence", "confidence", "accuracy", size=(6, 5.2))
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="perfectly calibrated")
    for model in models:
        if model.test.has_diverged:
            continue
        confidence, accuracy, share = reliability(model.test.probabilities, model.test.labels)
        sns.lineplot(x=confidence, y=accuracy, color=model.color, label=model.name, estimator=None, ax=axes)
        axes.scatter(confidence, accuracy, 10 + 400 * share, color=model.color, alpha=0.6)
    axes.legend()
    return figure


@themed
def costs(models: Sequence[Model]) -> Figure:
    """Plot test accuracy against the number of parameters and against the training time."""
    runs = pd.DataFrame(
        [(model.name, run.parameters, run.seconds, accuracy)
         for model in models for run, accuracy in zip(model.runs, model.accuracies, strict=True)],
        columns=["model", "parameters", "training time in seconds", "test accuracy"],
    )  # fmt: skip
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    colors = {model.name: model.color for model in models}
    for axes, cost in zip(figure.subplots(1, 2, sharey=True), runs.columns[1:3], strict=True):
        sns.scatterplot(
            runs, x=cost, y="test accuracy", hue="model", palette=colors, s=80, legend=cost == "parameters", ax=axes
        )
        axes.set(title=f"test accuracy by {cost.split(' in')[0]}")
    _make_log(figure.axes[0], runs["parameters"])
    return figure


def study_figures(study: optuna.Study) -> dict[str, Figure]:
    """Return the history of a study and the parameters of its trials by name; none if all have one value."""
    metric, trials = metrics_of(study)[0], study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    names = {key: short_key(key) for key in searched(study)}
    rows = [
        {"trial": trial.number, metric.name: trial.values[0]}
        | {
            names[key]: value if isinstance(value, int | float) else short_value(value)
            for key, value in trial.params.items()
        }
        for trial in trials
    ]
    # a metric of an infinite trial cannot be placed
    table = pd.DataFrame(rows).replace([np.inf, -np.inf], np.nan).dropna(subset=[metric.name])
    if table[metric.name].nunique() < 2:
        return {}
    logs = {
        names[key] for trial in trials for key, space in trial.distributions.items() if getattr(space, "log", False)
    }
    return {
        "study_optimization_history": history(table, metric),
        "study_parallel_coordinate": parallel_coordinates(table, metric.name, [*names.values()], logs),
    }


@themed
def history(table: pd.DataFrame, metric: Metric) -> Figure:
    """Plot the value of each trial, and the best so far."""
    figure, axes = _plot("history of the study", "trial", metric.name)
    sns.scatterplot(table, x="trial", y=metric.name, color=STUDY, s=60, label="trials", ax=axes)
    so_far = table[metric.name].cummax() if metric.sign == 1 else table[metric.name].cummin()
    axes.step(table["trial"], so_far, where="post", color="black", label="best so far")
    axes.legend()
    figures.integer_axis(axes)
    return figure


@themed
def parallel_coordinates(table: pd.DataFrame, metric: str, names: Sequence[str], logs: set[str]) -> Figure:
    """Draw each trial as a line through its value and its parameters, colored by value."""
    figure, axes = _plot("parameters of the trials, colored by value", size=(max(9, 1.3 * len(names)), 5))
    columns = [metric, *names]
    lines = np.empty((len(table), len(columns), 2))
    for index, name in enumerate(columns):
        places, labels = _spread(table[name], name in logs)
        lines[:, index] = [(index, place) for place in places]
        for text, place in labels.items():  # outside of the lines where possible
            side = -1 if place == 0 else 1 if place == 1 else 0
            axes.annotate(
                text, (index, place), (0, 6 * side), textcoords="offset points", ha="center", fontsize=10, zorder=3,
                va=["center", "bottom", "top"][side], bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    collection = LineCollection(
        [*lines], array=table[metric], cmap="viridis", alpha=0.6
    )  # seaborn takes ten times as long
    axes.add_collection(collection)
    figure.colorbar(collection, ax=axes, label=metric, pad=0.02)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set(xlabel="", ylabel="", yticks=[], xlim=(-0.5, len(columns) - 0.5), ylim=(-0.12, 1.12))
    axes.grid(axis="x", color="#57606a")
    axes.spines[:].set_visible(False)
    return figure


def _spread(values: "pd.Series[Any]", is_log: bool) -> tuple["pd.Series[float]", dict[str, float]]:
    """Spread values over 0 to 1; return them with the places of some of their names."""
    if not _is_number(values):
        values = values.map(str, na_action="ignore")
        choices = sorted(values.dropna().unique())
        places = {choice: index / max(1, len(choices) - 1) for index, choice in enumerate(choices)}
        return values.map(places), places
    low, high = values.min(), values.max()
    scaled = np.log(values) if is_log else values
    width = scaled.max() - scaled.min()
    return (scaled - scaled.min()) / (width or 1), {short_value(low): 0.0, short_value(high): float(width > 0)}


def _is_number(values: "pd.Series[Any]") -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def _plot(title: str, x: str = "", y: str = "", size: tuple[float, float] = (8, 4.5)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot(title=title, xlabel=x, ylabel=y)


def _make_log(axes: Axes, values: "pd.Series[Any]") -> None:
    """Make the horizontal axis logarithmic if its values are more than a power of ten apart; the numbers stay plain."""
    if is_wide(values.tolist()):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
