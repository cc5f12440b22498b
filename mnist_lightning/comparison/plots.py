"""Pictures of the models and of a study."""

import base64
import io
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
from PIL import Image

from mnist_lightning.comparison.evaluation import Model
from mnist_lightning.comparison.significance import reliability
from mnist_lightning.search.record import metrics_of
from mnist_lightning.search.space import short_value
from mnist_lightning.search.study import best_trial, importances
from mnist_lightning.training import figures
from mnist_lightning.training.figures import themed

SAMPLES = 10
"""The number of images in a picture of predictions."""
STUDY = figures.COLORS[2]
"""Color of trials: the first two are those of the baseline and of the tuned model."""


class Picture:
    """A rendered figure.

    Args:
        name: Name of the file, without the suffix.
        figure: The figure, or None to show only the caption.
        alt: Alternative text for people who cannot see the picture.
        caption: Text above the picture.
        is_photo: Whether the picture shows color images, which dark mode must not invert.
    """

    def __init__(self, name: str, figure: Figure | None, alt: str, caption: str = "", is_photo: bool = False) -> None:
        self.is_photo = is_photo
        self.name, self.alt, self.caption, self.png = name, alt, caption, b""
        if figure is not None:
            # sharp on a high-density screen, as it is shown at half the width; a matrix of many classes is large enough
            figure.set_dpi(min(200, 4000 / figure.get_figheight()))
            pixels, file = figures.render(figure), io.BytesIO()
            # the default method takes three times as long, and its colors are less exact
            image = Image.fromarray(pixels).quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            image.save(file, "png", optimize=True)
            self.height, self.width = (size // 2 for size in pixels.shape[:2])
            self.png = file.getvalue()

    @property
    def src(self) -> str:
        """The picture as a data URL."""
        return data_url(self.png)


def data_url(png: bytes) -> str:
    """Return a data URL of a PNG file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def first_images(models: Sequence[Model]) -> Picture:
    """Draw the first test images."""
    caption = f"The first ten test images: green where {['all models are', 'the model is'][len(models) == 1]} right"
    alt = f"the first ten test images with the predictions of {_names(models)}"
    return _predictions("samples", models, np.arange(min(SAMPLES, len(models[0].test.labels))), alt, caption)


def right_in_one(model: Model, other: Model) -> Picture:
    """Draw the first test images that one model gets right and the other wrong."""
    indices = np.flatnonzero(model.test.correct & ~other.test.correct)
    count = f"the first of {len(indices)}" if len(indices) > SAMPLES else len(indices)
    caption = f"{model.name} right, {other.name} wrong: {count}"
    alt = f"images that {model.name} gets right and {other.name} wrong"
    return _predictions(f"only_{model.slug}_not_{other.slug}", [model, other], indices, alt, caption)


def _predictions(name: str, models: Sequence[Model], indices: NDArray[np.intp], alt: str, caption: str) -> Picture:
    """Draw the first of some test images, titled with the truth and the predictions: green where all are right."""
    shown = indices[:SAMPLES]
    if not len(shown):
        return Picture(name, None, alt, caption)
    test = models[0].test
    names = [test.classes[label] for label in test.labels[shown]]
    titles = [
        "\n".join([f"true {name}", *(f"{model.name} {test.classes[model.test.predicted[index]]}" for model in models)])
        for name, index in zip(names, shown, strict=True)
    ]
    all_right = np.all([model.test.correct[shown] for model in models], axis=0)
    colors = [figures.RIGHT if right else figures.WRONG for right in all_right]
    images = figures.pictures(test.split.scaled(shown))
    figure = figures.image_grid(images, titles, min(5, len(shown)), colors, scale=1.5)
    return Picture(name, figure, f"{alt}; true classes: {', '.join(names)}", caption, is_photo=images.ndim == 4)


def curves(models: Sequence[Model], metrics: Sequence[str]) -> Picture:
    """Draw metrics over the epochs, with a band from the lowest to the highest run of a model."""
    table = figures.tidy({model.name: [run.history for run in model.runs] for model in models})
    figure = figures.curves(table, metrics, {model.name: model.color for model in models})
    return Picture("curves", figure, f"{', '.join(metrics)} of {_names(models)} over the epochs")


def confusion_matrix(model: Model) -> Picture:
    """Draw the confusion matrix of a model's first run."""
    title = f"{model.name}: {len(model.test.mistakes):,} mistakes"
    figure = figures.confusion_matrix(model.test.confusion_matrix, title, model.test.classes, model.color)
    return Picture(f"confusion_matrix_{model.slug}", figure, f"confusion matrix of {model.name}")


@themed
def reliability_diagram(models: Sequence[Model]) -> Picture:
    """Plot accuracy against confidence; the size of each bin's point is its share of the images."""
    figure, axes = _plot("accuracy of images by confidence", "confidence", "accuracy", size=(6, 5.2))
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="perfectly calibrated")
    calibrated = [model for model in models if not model.test.has_diverged]
    for model in calibrated:
        confidence, accuracy, share = reliability(model.test.probabilities, model.test.labels)
        sns.lineplot(x=confidence, y=accuracy, color=model.color, label=model.name, estimator=None, ax=axes)
        axes.scatter(confidence, accuracy, 10 + 400 * share, color=model.color, alpha=0.6)
    axes.legend()
    errors = ", ".join(f"{model.name} {model.test.calibration_error:.4f}" for model in calibrated)
    return Picture("reliability", figure, f"reliability diagram; calibration error: {errors}")


@themed
def costs(models: Sequence[Model]) -> Picture:
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
    return Picture("costs", figure, f"test accuracy of {_names(models)} against parameters and training time")


@themed
def execution_scores(study: optuna.Study) -> Picture:
    """Plot the scores of the executions of each trial, and their mean."""
    metric = metrics_of(study)[0].name
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    scores = pd.DataFrame(
        [
            (trial.number, execution["score"])
            for trial in trials
            for execution in trial.user_attrs.get("executions", [])
        ],
        columns=["trial", metric],
    )
    means = pd.DataFrame({"trial": [trial.number for trial in trials], metric: [trial.values[0] for trial in trials]})
    figure, axes = _plot("executions of each trial, and their mean", "trial", metric)
    if len(scores):  # a study that tune did not make has none
        sns.lineplot(scores, x="trial", y=metric, units="trial", estimator=None, color=STUDY, marker="o", ax=axes)
    sns.scatterplot(means, x="trial", y=metric, color="black", marker="_", s=150, linewidth=2, ax=axes)
    figures.integer_axis(axes)
    alt = f"scores of the executions of each trial of study {study.study_name}"
    return Picture("study_executions", figure, alt)


@themed
def pareto_fronts(study: optuna.Study) -> list[Picture]:
    """Plot the first metric of all trials against each other metric, with the Pareto front of the two."""
    first, *others = metrics_of(study)
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    pictures = []
    for index, metric in enumerate(others, start=1):
        points = [(trial.values[index], trial.values[0]) for trial in trials]
        front: list[tuple[float, float]] = []
        for x, y in sorted(points, key=lambda point: (-metric.sign * point[0], -first.sign * point[1])):
            if not front or first.sign * y > first.sign * front[-1][1]:
                front.append((x, y))
        figure, axes = _plot(f"{first.name} against {metric.name}", metric.name, first.name)
        sns.scatterplot(x=[x for x, _ in points], y=[y for _, y in points], color="gray", s=60, label="trials", ax=axes)
        axes.step(*zip(*front, strict=True), where="post", color=STUDY, marker="o", label="Pareto front")
        axes.legend()
        alt = f"{first.name} of the trials of {study.study_name} against {metric.name}; {len(front)} are on the front"
        pictures.append(Picture(f"study_front_{metric.name.replace('/', '_')}", figure, alt))
    return pictures


def study_plots(study: optuna.Study, names: dict[str, str]) -> list[Picture]:
    """Draw the history of a study, the values of its parameters and, of enough trials, their importance.

    All are for the first metric.

    Args:
        study: A study whose complete trials have different values.
        names: The name to show for each parameter.
    """
    metric = metrics_of(study)[0]
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
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
    logs = {
        names[key] for trial in trials for key, space in trial.distributions.items() if getattr(space, "log", False)
    }
    return [
        history(study, table),
        *([importance_bars(study, found, names)] if (found := importances(study)) else []),
        parallel_coordinates(table, metric.name, [*names.values()], logs),
        *(slice_of(table, metric.name, name, name in logs) for name in names.values()),
    ]


@themed
def history(study: optuna.Study, table: pd.DataFrame) -> Picture:
    """Plot the value of each trial, and the best so far."""
    metric, best = metrics_of(study)[0], best_trial(study)
    figure, axes = _plot("history of the study", "trial", metric.name)
    sns.scatterplot(table, x="trial", y=metric.name, color=STUDY, s=60, label="trials", ax=axes)
    so_far = table[metric.name].cummax() if metric.sign == 1 else table[metric.name].cummin()
    axes.step(table["trial"], so_far, where="post", color="black", label="best so far")
    axes.legend()
    figures.integer_axis(axes)
    alt = f"values of the trials of {study.study_name}; the best is {best.values[0]:.4f}, of trial {best.number}"
    return Picture("study_optimization_history", figure, alt)


@themed
def importance_bars(study: optuna.Study, found: dict[str, float], names: dict[str, str]) -> Picture:
    """Plot the importance of each parameter."""
    figure, axes = _plot(f"importance for {metrics_of(study)[0].name}", size=(8, 1.5 + 0.35 * len(found)))
    sns.barplot(x=[*found.values()], y=[names[key] for key in found], color=STUDY, ax=axes)
    for bars in axes.containers:
        axes.bar_label(bars, fmt="%.2f", padding=4)  # type: ignore[arg-type]
    axes.set(
        xlabel="share of the variance that the parameter explains",
        ylabel="",
        xlim=(0, 1.1 * max(found.values(), default=1)),
    )
    return Picture("study_param_importances", figure, "importance of each parameter")


@themed
def slice_of(table: pd.DataFrame, metric: str, name: str, is_log: bool) -> Picture:
    """Plot the trials' values against one parameter."""
    figure, axes = _plot(f"{metric} by {name}", name, metric, size=(5.5, 4.2))
    values = table.dropna(subset=[name])
    if not _is_number(values[name]):
        values = values.assign(**{name: values[name].map(str)}).sort_values(name)
    sns.scatterplot(values, x=name, y=metric, color=STUDY, s=60, alpha=0.7, ax=axes)
    if is_log:
        _make_log(axes, values[name])
    return Picture(f"study_slice_{name}", figure, f"values of the trials against {name}")


@themed
def parallel_coordinates(table: pd.DataFrame, metric: str, names: Sequence[str], logs: set[str]) -> Picture:
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
    return Picture("study_parallel_coordinate", figure, "parameters of the trials as lines, colored by value")


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


def _names(models: Sequence[Model]) -> str:
    return ", ".join(model.name for model in models)


def _plot(title: str, x: str = "", y: str = "", size: tuple[float, float] = (8, 4.5)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot(title=title, xlabel=x, ylabel=y)


def _make_log(axes: Axes, values: "pd.Series[Any]") -> None:
    """Make the horizontal axis logarithmic if its values are more than a power of ten apart; the numbers stay plain."""
    if values.min() * 10 < values.max():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
