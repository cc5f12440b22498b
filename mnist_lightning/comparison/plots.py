"""Pictures of the models and of a study."""

import base64
import io
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState
from PIL import Image

from mnist_lightning.comparison.evaluation import Model
from mnist_lightning.comparison.significance import reliability
from mnist_lightning.search.record import metrics_of
from mnist_lightning.search.space import short_value
from mnist_lightning.search.study import best_trial
from mnist_lightning.training import figures

SAMPLES = 10
"""The number of images in a picture of predictions."""


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
            figure.set_dpi(200)  # sharp on a high-density screen, as it is shown at half the width
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


def reliability_diagram(models: Sequence[Model]) -> Picture:
    """Plot accuracy against confidence; the size of each bin's point is its share of the images."""
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="confidence", ylabel="accuracy")
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="perfectly calibrated")
    calibrated = [model for model in models if not model.test.has_diverged]
    for model in calibrated:
        confidence, accuracy, share = reliability(model.test.probabilities, model.test.labels)
        axes.plot(confidence, accuracy, color=model.color, label=model.name)
        axes.scatter(confidence, accuracy, 10 + 400 * share, color=model.color, alpha=0.6)
    _add_grid_and_legend(axes)
    errors = ", ".join(f"{model.name} {model.test.calibration_error:.4f}" for model in calibrated)
    return Picture("reliability", figure, f"reliability diagram; calibration error: {errors}")


def costs(models: Sequence[Model]) -> Picture:
    """Plot test accuracy against the number of parameters and against the training time."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for model in models:
        style = {"color": model.color, "label": model.name}
        left.scatter([run.parameters for run in model.runs], model.accuracies, **style)
        right.scatter([run.seconds for run in model.runs], model.accuracies, **style)
    left.set(xlabel="parameters", ylabel="test accuracy", xscale="log")
    right.set(xlabel="training time in seconds")
    _add_grid_and_legend(left)
    _add_grid_and_legend(right)
    return Picture("costs", figure, f"test accuracy of {_names(models)} against parameters and training time")


def execution_scores(study: optuna.Study) -> Picture:
    """Plot the scores of the executions of each trial, and their mean."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="trial", ylabel=metrics_of(study)[0].name)
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    for trial in trials:
        scores = [execution["score"] for execution in trial.user_attrs.get("executions", [])]
        axes.plot([trial.number] * len(scores), scores, color="tab:green", marker="o", alpha=0.5)
    means: Any = [trial.values[0] for trial in trials]
    axes.scatter([trial.number for trial in trials], means, color="black", marker="_", s=120)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    alt = f"scores of the executions of each trial of study {study.study_name}"
    return Picture("study_executions", figure, alt)


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
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel=metric.name, ylabel=first.name)
        axes.scatter(*zip(*points, strict=True), color="tab:gray", alpha=0.6, label="trials")
        axes.step(*zip(*front, strict=True), where="post", color="tab:green", marker="o", label="Pareto front")
        _add_grid_and_legend(axes)
        alt = f"{first.name} of the trials of {study.study_name} against {metric.name}; {len(front)} are on the front"
        pictures.append(Picture(f"study_front_{metric.name.replace('/', '_')}", figure, alt))
    return pictures


def study_plots(study: optuna.Study, names: dict[str, str]) -> list[Picture]:
    """Draw Optuna's own plots of a study, for its first metric.

    Args:
        study: A study whose complete trials have different values.
        names: The name to show for each parameter.
    """
    matplotlib.use("agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as optuna_plots

    # a copy with short names: long ones leave no room for anything else
    short = optuna.create_study(direction=study.directions[0])
    for trial in study.get_trials(states=(TrialState.COMPLETE,)):
        distributions: dict[str, BaseDistribution] = {}
        for key, distribution in trial.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                distribution = CategoricalDistribution([_shorten(choice) for choice in distribution.choices])
            distributions[names[key]] = distribution
        params = {names[key]: _shorten(value) for key, value in trial.params.items()}
        short.add_trial(optuna.create_trial(value=trial.values[0], params=params, distributions=distributions))
    best, evaluator = best_trial(study), optuna.importance.FanovaImportanceEvaluator(seed=0)
    history = f"values of the trials of {study.study_name}; the best is {best.values[0]:.4f}, of trial {best.number}"
    parallel = "parameters of the trials as lines, colored by value"
    # these functions warn that they are experimental, and set a global style
    with warnings.catch_warnings(action="ignore"), pyplot.style.context("default"):
        importances = optuna_plots.plot_param_importances(short, evaluator=evaluator)
        plots: list[tuple[str, str, Any]] = [
            ("optimization_history", history, optuna_plots.plot_optimization_history(short)),
            ("param_importances", "importance of each parameter", importances),
            ("parallel_coordinate", parallel, optuna_plots.plot_parallel_coordinate(short)),
        ]
        for name in names.values():
            axes = optuna_plots.plot_slice(short, params=[name])
            plots.append((f"slice_{name}", f"values of the trials against {name}", axes))
        for name, _, axes in plots:
            axes.figure.set_size_inches((4.5, 3.5) if name.startswith("slice") else (8, 4.5))
            axes.figure.tight_layout()
            pyplot.close(axes.figure)
    return [Picture(f"study_{name}", axes.figure, alt) for name, alt, axes in plots]


def _shorten(value: Any) -> Any:
    return short_value(value) if isinstance(value, str) else value


def _names(models: Sequence[Model]) -> str:
    return ", ".join(model.name for model in models)


def _add_grid_and_legend(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.legend()
