"""The report's pictures of two models and of a study."""

import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from mnist_lightning.figures import RIGHT, WRONG, digits
from mnist_lightning.report.runs import Run
from mnist_lightning.report.statistics import reliability
from mnist_lightning.tune.space import short_value

COLORS = ("tab:blue", "tab:green")


def comparison_curves(sides: dict[str, list[Run]], metric: str) -> Figure:
    """A metric of all runs over the epochs, a colour for each side."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel=metric.replace("_", " "))
    for (name, runs), color in zip(sides.items(), COLORS, strict=True):
        for number, run in enumerate(runs):
            points = [(row["epoch"] + 1, row[metric]) for row in run.history if metric in row]
            label = name if number == 0 else None
            axes.plot(
                *zip(*points, strict=True), color=color, marker=".", label=label, alpha=1 if len(runs) == 1 else 0.6
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def sample_predictions(
    images: NDArray[Any], labels: NDArray[Any], predicted: dict[str, NDArray[Any]], indices: Sequence[int]
) -> Figure:
    """Digits under the truth and what each model says; green where all are right, red where one is not."""
    titles, colors = [], []
    for index in indices:
        guesses = [f"{name} {guess[index]}" for name, guess in predicted.items()]
        titles.append("\n".join([f"true {labels[index]}", *guesses]))
        right = all(guess[index] == labels[index] for guess in predicted.values())
        colors.append(RIGHT if right else WRONG)
    columns = min(5, len(titles))
    missing = -len(titles) % columns
    shown = np.concatenate([images[list(indices)], np.zeros((missing, 28, 28), images.dtype)])
    return digits(
        shown, [*titles, *["\n" * titles[0].count("\n")] * missing], columns, [*colors, *["black"] * missing], 1.5
    )


def reliability_diagram(probabilities: dict[str, NDArray[np.float32]], labels: NDArray[np.int64]) -> Figure:
    """Accuracy against confidence, with a point for each bin as large as its share of the images."""
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="confidence", ylabel="accuracy")
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="perfectly calibrated")
    for (name, values), color in zip(probabilities.items(), COLORS, strict=True):
        confidence, accuracy, weight = reliability(values, labels)
        axes.plot(confidence, accuracy, color=color, label=name)
        axes.scatter(confidence, accuracy, 10 + 400 * weight, color=color, alpha=0.6)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def costs(sides: dict[str, list[Run]], weights: str) -> Figure:
    """Test accuracy against parameters and against training time."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for (name, runs), color in zip(sides.items(), COLORS, strict=True):
        accuracies = [run.evaluations[weights, "test"].accuracy for run in runs]
        left.scatter([run.parameters for run in runs], accuracies, color=color, label=name)
        right.scatter([run.seconds for run in runs], accuracies, color=color, label=name)
    left.set(xlabel="parameters", ylabel="test accuracy", xscale="log")
    right.set(xlabel="training time in seconds")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def executions(trials: Sequence[FrozenTrial]) -> Figure:
    """The score of each execution of each trial, and their mean."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="trial", ylabel="score")
    for trial in trials:
        scores = [execution["score"] for execution in trial.user_attrs.get("executions", [])]
        axes.plot([trial.number] * len(scores), scores, color="tab:green", marker="o", alpha=0.5)
    means: Any = [trial.value for trial in trials]
    axes.scatter([trial.number for trial in trials], means, color="black", marker="_", s=120)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return figure


def of_study(study: optuna.Study, names: dict[str, str]) -> dict[str, Figure]:
    """Optuna's own figures of a study.

    Args:
        study: With at least two complete trials.
        names: What to call each parameter.
    """
    matplotlib.use("agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    # a copy with short names, since long ones leave no room for anything else
    short = optuna.create_study(direction=study.direction)
    for trial in study.get_trials(states=(TrialState.COMPLETE,)):
        distributions: dict[str, BaseDistribution] = {}
        for key, distribution in trial.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                distribution = CategoricalDistribution([_shorten(choice) for choice in distribution.choices])
            distributions[names[key]] = distribution
        params = {names[key]: _shorten(value) for key, value in trial.params.items()}
        short.add_trial(optuna.create_trial(value=trial.value, params=params, distributions=distributions))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    # these functions are experimental, and set a style for all that comes after
    with warnings.catch_warnings(action="ignore"), pyplot.style.context("default"):
        axes: dict[str, Any] = {
            "optimization_history": plots.plot_optimization_history(short),
            "param_importances": plots.plot_param_importances(short, evaluator=evaluator),
            "parallel_coordinate": plots.plot_parallel_coordinate(short),
            **{f"slice_{name}": plots.plot_slice(short, params=[name]) for name in names.values()},
        }
        figures = {name: ax.figure for name, ax in axes.items()}
        for name, figure in figures.items():
            figure.set_size_inches((4.5, 3.5) if name.startswith("slice") else (8, 4.5))
            figure.tight_layout()
            pyplot.close(figure)
    return figures


def _shorten(value: Any) -> Any:
    return short_value(value) if isinstance(value, str) else value
