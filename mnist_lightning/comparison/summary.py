"""The verdict, the table and ``report.json``."""

import html
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from mnist_lightning.comparison.evaluation import Model
from mnist_lightning.comparison.significance import Comparison, accuracy_interval, compare_to_first, verdict
from mnist_lightning.comparison.table import quantities
from mnist_lightning.search.record import is_counted, metrics_of
from mnist_lightning.search.space import bounds, short_key, short_value
from mnist_lightning.search.study import best_trial, pareto_front, results


class Report:
    """The results that the page and the other files share.

    Args:
        models: Any number of models, or none; the others are compared with the first. Where only one run of each can
            be compared or shown, it is the first.
        study: The study, or None if there is none with a complete trial.

    Attributes:
        path: Path of the page, once it is written.
        quantities: A table of the models: a row for each quantity, as text.
        trials: A table of the study's complete trials; None without a study.
    """

    def __init__(self, models: Sequence[Model], study: optuna.Study | None) -> None:
        self.models, self.study = models, study
        self.path: Path | None = None
        self.edges = describe_edges(study) if study and len(study.directions) == 1 else ""
        self.trials = results(study, list(searched(study))).set_index("trial") if study else None
        self.comparisons: dict[str, Comparison] = {}
        lines = []
        if models:
            first, *others = models
            accuracies = [model.accuracies for model in models]
            found = compare_to_first([model.test.correct for model in models], accuracies)
            self.comparisons = {model.name: one for model, one in zip(others, found, strict=True)}
            count = len(first.test.labels)
            lines = [verdict(name, first.name, one, count, len(models)) for name, one in self.comparisons.items()] or [
                _describe(first)
            ]
            lines += filter(None, map(_describe_divergence, models))
        self.verdict = " ".join(lines)
        self.lines = [*lines, *filter(None, [self.edges])]
        self.quantities = quantities(models, self.comparisons)

    def _repr_html_(self) -> str:
        """Show the page in a cell of a notebook."""
        page = self.path.read_text(encoding="utf-8") if self.path else ""
        return f'<iframe srcdoc="{html.escape(page)}" style="width: 100%; height: 800px; border: 0"></iframe>'

    @property
    def title(self) -> str:
        """The title of the page."""
        names = [model.name for model in self.models]
        return (" against " if len(names) == 2 else ", ").join(names) or f"Study {self.study and self.study.study_name}"

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``report.json``."""
        study = self.study and {
            "name": self.study.study_name,
            "trials": _count_trials(self.study),
            **_describe_best(self.study),
            "edges": self.edges,
        }
        models = {model.name: _describe_model(model) for model in self.models}
        return {
            "weights": self.models[0].weights if models else None,
            "images": len(self.models[0].test.labels) if models else 0,
            "models": models,
            "differences": {name: asdict(comparison) for name, comparison in self.comparisons.items()},
            "verdict": self.verdict,
            "comparison": [{"name": name, "values": values} for name, *values in self.quantities.itertuples()],
            "study": study,
        }


def _describe_model(model: Model) -> dict[str, Any]:
    return {
        "runs": [str(run.path) for run in model.runs],
        "parameters": model.runs[0].parameters,
        "training_seconds": [round(run.seconds, 1) for run in model.runs],
        "epochs": [len(run.history) for run in model.runs],
        "best_epoch": [run.best_epoch for run in model.runs],
        "metrics": {metric: values for metric, values in model.metrics.items() if values},
        "accuracy_interval": accuracy_interval(model.test.correct),
        "calibration_error": model.test.calibration_error,
        "confusion_matrix": model.test.confusion_matrix.tolist(),
        "per_class": model.test.scores.to_dict("list"),
    }


def _describe(model: Model) -> str:
    """Describe the accuracy of a single model."""
    low, high = accuracy_interval(model.test.correct)
    text = (
        f"{model.name} gets {model.test.accuracy:.4f} of {len(model.test.labels):,} test images right "
        f"(95 % interval {low:.4f} to {high:.4f}) and {len(model.test.mistakes):,} wrong."
    )
    if len(model.runs) == 1:
        return text
    means = f"{statistics.mean(model.accuracies):.4f} ± {statistics.stdev(model.accuracies):.4f}"
    return f"{model.name} has a mean test accuracy of {means} over {len(model.runs)} seeds. Its first run: {text}"


def _describe_divergence(model: Model) -> str:
    """Say that runs of a model have diverged, if any have."""
    diverged = [run for run in model.runs if run.evaluations[model.weights, "test"].has_diverged]
    who = (
        f"{model.name} has"
        if len(model.runs) == 1
        else f"{len(diverged)} of {len(model.runs)} runs of {model.name} have"
    )
    text = (
        f"{who} diverged: where probabilities are not numbers, the first class, {model.test.classes[0]}, is predicted."
    )
    return text if diverged else ""


def _count_trials(study: optuna.Study) -> dict[str, int]:
    counts = Counter(trial.state for trial in study.get_trials(deepcopy=False) if is_counted(trial))
    return {state.name.lower(): counts[state] for state in TrialState}


def _describe_best(study: optuna.Study) -> dict[str, Any]:
    best = best_trial(study)
    described: dict[str, Any] = {"best_trial": best.number, "best_value": best.values[0], "best_params": best.params}
    if len(study.directions) > 1:
        described["metrics"] = [metric.name for metric in metrics_of(study)]
        described["pareto_front"] = {trial.number: trial.values for trial in pareto_front(study)}
    return described


def searched(study: optuna.Study) -> dict[str, BaseDistribution]:
    """Return the distributions of all complete trials; not every trial has every parameter."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {key: distribution for trial in trials for key, distribution in trial.distributions.items()}


def describe_edges(study: optuna.Study) -> str:
    """Say which of the best values lie at the edge of the search space, if any do."""
    best, at_edge = best_trial(study), []
    for key, distribution in best.distributions.items():
        edges, value = bounds(distribution), best.params[key]
        is_ordered = all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in edges)
        if is_ordered and len(edges) > 1 and value in (min(edges), max(edges)):
            at_edge.append(f"{short_key(key)} ({short_value(value)})")
    if not at_edge:
        return ""
    listed = " and ".join([", ".join(at_edge[:-1]), at_edge[-1]][len(at_edge) == 1 :])
    return (
        f"In study {study.study_name}, the best {listed} lie{'s' * (len(at_edge) == 1)} at the edge of the search "
        "space: better values may lie beyond."
    )
